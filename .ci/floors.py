"""Print constraints that hold what the package needs at its floor in pyproject.toml, and torch as in constraints.txt.

The tools of the tests are not among them: a user does not need them.
"""

import re
import tomllib
from pathlib import Path

root = Path(__file__).parents[1]
project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
needed = {*project["dependencies"], *(line for name in extras if name not in ("test", "dev") for line in extras[name])}
floors = dict(re.match(r"([\w.-]+)>=([\w.]+)", line).groups() for line in needed)
assert len(floors) == len(needed), "a dependency has two floors"
del floors["torch"]
print(re.search(r"^torch==.*$", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0])
print("\n".join(f"{name}=={version}" for name, version in sorted(floors.items())))

"""Imports go down only, so that a layer can be read, tested and changed without those above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokmask_peft

PACKAGE = Path(tokmask_peft.__file__).parent
LAYERS = (
    ("errors",),
    ("console",),
    ("html",),
    ("masking",),
    ("spans",),
    ("examples",),
    ("multilabel",),
    ("tasks",),
    ("recipe",),
    ("data",),
    ("model",),
    ("artifacts",),
    ("hub",),
    ("training",),
    ("inference",),
    ("report", "study"),  # neither knows the other
    ("cli",),
    ("__main__",),
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the parts of the package that code imports, also inside functions, but not for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "tokmask_peft" and rest not in ([], ["__version__"]):
                yield rest[0]
        yield from imported(child)


def test_every_part_of_the_package_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__"} == set(HEIGHT)


@pytest.mark.parametrize("part", HEIGHT)
def test_imports_go_down_only(part):
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else (PACKAGE / part).rglob("*.py")
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in files
        for other in imported(ast.parse(path.read_text(encoding="utf-8")))
        if other != part and HEIGHT.get(other, len(LAYERS)) >= HEIGHT[part]
    ]
    assert not upward

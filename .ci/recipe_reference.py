"""Write `docs/recipe.md` from the schema of recipes: `python .ci/recipe_reference.py`."""

import sys
from pathlib import Path

from tokmask_peft.recipe.errors import choices
from tokmask_peft.recipe.loading import shown
from tokmask_peft.recipe.schema import all_fields

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Recipe reference

A recipe is a YAML file. `tokmask recipes` lists the shipped ones, `tokmask recipes copy NAME FILE` copies one with its
bases merged in, `tokmask validate FILE` reports every mistake at once, and
`tokmask train FILE training.epochs=3 masking.p=0` overrides keys for one run. `base: other.yaml` takes everything else
from another recipe. This page is written from the schema; `tokmask recipes fields` prints the same.
"""


def page() -> str:
    """Return the page: a table for each section."""
    tables: dict[str, list[str]] = {}
    for path, field in all_fields():
        section = path.partition(".")[0] if "." in path else "The run"
        if path.startswith("data.test_source."):
            if path.endswith(".path"):
                meaning = "other source of the test texts, with the keys above"
                tables["data"].append(f"| `data.test_source` | `null` | a section | {meaning} |")
            continue
        default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        cells = (f"`{path}`", default, choices(field), field.description or "")
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        tables.setdefault(section, []).append(f"| {row} |")
    head = "| key | default | takes | meaning |\n|---|---|---|---|"
    return HEAD + "".join("\n".join([f"\n## {name}\n", head, *rows, ""]) for name, rows in tables.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")

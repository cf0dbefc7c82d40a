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
                row = "| `data.test_source` | `null` | a section | other source of the test texts, with the keys above |"
                tables["data"].append(row)
            continue
        default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        cells = (f"`{path}`", default, choices(field), field.description or "")
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        tables.setdefault(section, []).append(f"| {row} |")
    parts = [HEAD]
    for section, rows in tables.items():
        parts += [f"\n## {section}\n\n| key | default | takes | meaning |\n|---|---|---|---|\n", *(f"{row}\n" for row in rows)]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")

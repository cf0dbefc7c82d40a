"""Write `docs/recipe.md` from the schema of recipes: `python .ci/recipe_reference.py`."""

import sys
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tokmask_peft.recipe.loading import shown
from tokmask_peft.recipe.schema import all_fields

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Recipe reference

A recipe is a YAML file. `tokmask recipes` lists the shipped ones, `tokmask recipes copy NAME FILE` copies one with its
bases merged in, `tokmask validate FILE` reports every mistake at once, and
`tokmask train FILE training.epochs=3 masking.p=0` overrides keys for one run. `base: other.yaml` takes everything else
from another recipe. This page is written from the schema; `tokmask recipes fields` prints the same.
"""


def choices(annotation: Any, metadata: list[Any]) -> str:
    """Return the values that a field takes, or nothing if any value of its type will do."""
    for mark in metadata:
        if names := getattr(mark, "registry", None):
            return " \\| ".join(f"`{name}`" for name in names)
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return choices(inner, marks)
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in {Union, UnionType}:
        return " \\| ".join(
            found for part in get_args(annotation) if part is not NoneType and (found := choices(part, []))
        )
    return ""


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for section, fields in groupby(all_fields(), lambda item: item[0].rpartition(".")[0]):
        parts.append(f"\n## {section or 'The run'}\n\n| key | default | meaning |\n|---|---|---|\n")
        for path, field in fields:
            default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
            values = choices(field.annotation, field.metadata)
            text = (field.description or "").replace("|", "\\|")
            parts.append(f"| `{path}` | {default} | {f'{values}. ' if values else ''}{text} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")

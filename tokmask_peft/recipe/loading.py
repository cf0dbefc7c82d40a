"""Read recipes from YAML: bases, `dotted.key=value` overrides, and errors that come all together."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.recipe.errors import explain, shown
from tokmask_peft.recipe.schema import Recipe, all_fields, section_of

_PACKAGE = Path(__file__).parent.parent
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
"""The recipes that come with the package (in a source checkout, the ones at its top)."""


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes, `folder/name` without the ending; bases are left out."""
    return sorted(
        path.relative_to(SHIPPED).with_suffix("").as_posix()
        for path in SHIPPED.rglob("*.yaml")
        if not any(part.startswith("_") for part in path.relative_to(SHIPPED).parts)
    )


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe given by path, or by the name of a shipped one.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped_recipes():
        return SHIPPED / f"{name}.yaml"
    raise RecipeError(
        [f"no such file, and no shipped recipe of that name.{nearest(name, shipped_recipes())} See `tokmask recipes`."],
        source=str(recipe),
    )


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override and check a recipe; see `Recipe.load`."""
    return _overridden(_read_merged(find_recipe(recipe), ()), overrides, str(recipe))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a checked copy of a recipe with `dotted.key=value` overrides.

    Raises:
        RecipeError: with every problem found.
    """
    return _overridden(recipe.model_dump(mode="json"), overrides, recipe.name)


def _overridden(content: dict[str, Any], overrides: Sequence[str], source: str) -> Recipe:
    problems: list[str] = []
    for override in overrides:
        key, sign, value = override.partition("=")
        keys = key.strip().split(".")
        if not sign or not all(keys):
            problems.append(f"{override}: expected dotted.key=value, for example training.epochs=3")
            continue
        if keys[0] == "base":
            problems.append(f"{override}: a base can only be named in the recipe file")
            continue
        _set(content, keys, _scalar(value), problems, override)
    try:
        checked = Recipe.model_validate(content)
    except ValidationError as error:
        problems.extend(explain(error))
    if problems:
        raise RecipeError(problems, source=source)
    return checked


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def copy_recipe(recipe: str | Path, target: Path) -> None:
    """Write a recipe with its bases merged in; the comments at its head stay, with the command for the new file.

    Raises:
        RecipeError: there is no such recipe, the target exists, or it cannot be written.
    """
    path = find_recipe(recipe)
    body = yaml.safe_dump(_read_merged(path, ()), sort_keys=False, allow_unicode=True)
    head = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head += re.sub(r"(tokmask train) \S+", lambda found: f"{found[1]} {shlex.quote(str(target))}", line) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(head + body)
    except FileExistsError as error:
        raise RecipeError([f"{error.filename} exists; choose another name or remove it"], source=str(recipe)) from error
    except OSError as error:
        raise RecipeError([f"{target} cannot be written: {error.strerror}"], source=str(recipe)) from error


def field_help() -> list[str]:
    """Return a line per key of a recipe: name, default and meaning."""
    lines: list[str] = []
    for path, field in all_fields():
        default = field.get_default(call_default_factory=True)
        about = f": {field.description}" if field.description else ""
        lines.append(f"{path} ({'required' if field.is_required() else f'default {shown(default)}'}){about}")
    return lines


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Return a line per field that differs, apart from where the run lies and whether it scores the n-gram baseline.

    The baseline does not touch training. In a sweep one run of a seed fits it for all, and which one changes when the
    sweep is extended.
    """
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return [
        f"{key}: {shown(old.get(key))} before, {shown(new.get(key))} now"
        for key in sorted({*old, *new} - {"name", "output_dir", "training.baseline"})
        if old.get(key) != new.get(key)
    ]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without its traps.

    A key given twice is an error, not a silent last one. Only `true` and `false` are switches, and no date is read
    out of digits: `no` is Norwegian, and 2024-01-01 a name.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a single value", problem_mark=key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_TRAPS = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _TRAPS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError([f"{where}{error.problem or error.context}"], str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"is not UTF-8 text (byte {error.start}); save it as UTF-8"], str(path)) from error
    except OSError as error:
        raise RecipeError([f"cannot be read: {error.strerror}"], str(path)) from error
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML refuses, numbers that Python does
        raise RecipeError([" ".join(str(error).split())], str(path)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError([f"expected keys with values, as name: my-run, but the file is {shown(content)}"], str(path))
    return content


def _read_merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in above:
        raise RecipeError(
            [f"base: the recipe is its own base ({' -> '.join(map(str, [*above, resolved]))})"], str(path)
        )
    content = _read(path)
    bases = content.pop("base", None) or []
    files = [path.parent / str(base) for base in (bases if isinstance(bases, list) else [bases])]
    missing = [f"base: {base} is not a file; a base is named from the folder of its recipe" for base in files]
    if missing := [line for line, base in zip(missing, files, strict=True) if not base.is_file()]:
        raise RecipeError(missing, str(path))
    merged: dict[str, Any] = {}
    for base in files:
        merged = _merge(merged, _read_merged(base, (*above, resolved)), Recipe)
    return _merge(merged, content, Recipe)


def _merge(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Merge sections key by key; a value, also one that is a mapping (`label_map`), is replaced as a whole."""
    merged = dict(base)
    for key, value in over.items():
        before, field = merged.get(key), model.model_fields.get(str(key))
        section = None if field is None else section_of(field.annotation)
        if section is not None and isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _merge(before, value, section)
        else:
            merged[key] = value
    return merged


def _scalar(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader) if text.strip() else ""  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, ValueError):
        return text


def _set(content: dict[str, Any], keys: list[str], value: Any, problems: list[str], override: str) -> None:
    place = content
    for key in keys[:-1]:
        if place.get(key) is None:
            place[key] = {}
        if not isinstance(place[key], dict):
            problems.append(f"{override}: '{key}' is a single value, it has no keys below it")
            return
        place = place[key]
    place[keys[-1]] = value

"""Read recipes from YAML: bases, `dotted.key=value` overrides, and errors that come all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.recipe import Recipe

_PACKAGE = Path(__file__).parent
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
    path = find_recipe(recipe)
    problems: list[str] = []
    content = _read_merged(path, ())
    for override in overrides:
        key, sign, value = override.partition("=")
        keys = key.strip().split(".")
        if not sign or not all(keys):
            problems.append(f"{override}: expected dotted.key=value, for example training.epochs=3")
            continue
        _set(content, keys, _scalar(value), problems, override)
    try:
        checked = Recipe.model_validate(content)
    except ValidationError as error:
        problems.extend(_explain(error))
    if problems:
        raise RecipeError(problems, source=str(recipe))
    return checked


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def copy_recipe(recipe: str | Path, target: Path) -> None:
    """Write a recipe with its bases merged in, comments of the recipe itself kept at its head.

    Raises:
        RecipeError: there is no such recipe, or the target exists.
    """
    path = find_recipe(recipe)
    if target.exists():
        raise RecipeError([f"{target} exists; choose another name or remove it"], source=str(recipe))
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for index, line in enumerate(lines) if all(above.startswith("#") for above in lines[: index + 1])]
    head = [
        line.replace(f"recipes/{path.relative_to(SHIPPED).as_posix()}", str(target)) for line in head if _inside(path)
    ]
    body = yaml.safe_dump(_read_merged(path, ()), sort_keys=False, allow_unicode=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in head) + body, encoding="utf-8")


def _inside(path: Path) -> bool:
    return path.resolve().is_relative_to(SHIPPED.resolve())


def field_help(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return a line per key of a recipe: name, default and meaning."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            lines.extend(field_help(section, f"{prefix}{name}."))
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        about = f": {field.description}" if field.description else ""
        lines.append(f"{prefix}{name} ({default}){about}")
    return lines


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Return a line per field that differs, apart from where the run lies."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    return [
        f"{key}: {old.get(key)} before, {new.get(key)} now"
        for key in sorted({*old, *new} - {"name", "output_dir"})
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
    """YAML's safe loader, but a key given twice is an error, not a silent last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in above:
        raise RecipeError(
            [f"base: the recipe is its own base ({' -> '.join(map(str, [*above, resolved]))})"], str(path)
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError([f"{where}{error.problem or error.context}"], str(path)) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError([str(error)], str(path)) from error
    if not isinstance(content, dict):
        raise RecipeError([f"expected a mapping of keys to values, found {type(content).__name__}"], str(path))
    bases = content.pop("base", None) or []
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        below = path.parent / str(base)
        if not below.is_file():
            raise RecipeError([f"base: {base} is not a file (looked for {below})"], str(path))
        merged = _merge(merged, _read_merged(below, (*above, resolved)))
    return _merge(merged, content)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        merged[key] = _merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
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


def _explain(error: ValidationError) -> list[str]:
    """Turn pydantic's errors into one line per field."""
    lines: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        path, candidates, description = _place(detail["loc"])
        text = _problem(detail, candidates)
        if description and detail["type"] in {"missing", "literal_error"}:
            text += f" ({description})"
        lines.setdefault(".".join(path) or "recipe", []).append(text)
    return [f"{path}: {'; or '.join(dict.fromkeys(texts))}" for path, texts in lines.items()]


def _problem(detail: ErrorDetails, siblings: list[str]) -> str:
    kind, found = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        return f"unknown key.{nearest(name, siblings)} Known here: {', '.join(siblings)}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        expected = str(detail["ctx"]["expected"]) if "ctx" in detail else ""
        names = [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]
        return f"is {found!r}; expected {expected}.{nearest(str(found), names)}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if message.startswith("Input") else message
    if kind in {"value_error"} or isinstance(found, Mapping):
        return message
    return f"is {found!r}; {message.replace('input should be', 'it should be')}"


def _place(loc: tuple[int | str, ...]) -> tuple[list[str], list[str], str | None]:
    """Return the dotted path without pydantic's union branches, the keys known there, and the description."""
    path: list[str] = []
    model: type[BaseModel] | None = Recipe
    siblings: list[str] = list(Recipe.model_fields)
    description: str | None = None
    for index, part in enumerate(loc):
        if model is None:
            break
        path.append(str(part))
        siblings = list(model.model_fields)
        field = model.model_fields.get(str(part))
        if field is None:
            break
        description = field.description
        model = _section(field.annotation)
        if model is None and get_origin(field.annotation) is dict and index + 1 < len(loc):
            path.append(str(loc[index + 1]))
    return path, siblings, description


def _section(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) in {Union, UnionType}:
        return next((found for part in get_args(annotation) if (found := _section(part))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None

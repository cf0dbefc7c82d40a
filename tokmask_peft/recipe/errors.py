"""Turn pydantic's findings on a recipe into lines: path, value, what is expected (types, bounds, titles), a guess."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tokmask_peft.errors import nearest
from tokmask_peft.masking.config import NameIn
from tokmask_peft.recipe.schema import Recipe, all_fields, section_of

_NOUNS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
MOST_LISTED = 100
_MEANT = {
    **dict.fromkeys(("4", "4bit", "int4", "fp4", "qlora"), "nf4"),
    **dict.fromkeys(("8", "8bit", "int8", "llmint8"), "int8 8bit"),
    **dict.fromkeys(("bfloat16",), "bf16"),
    **dict.fromkeys(("float16", "half", "16"), "fp16"),
    **dict.fromkeys(("float32", "full", "32"), "fp32"),
    **dict.fromkeys(("false", "no", "off", "null"), "none"),
    **dict.fromkeys(("text", "textclassification", "sentiment", "seqcls"), "sequence"),
    **dict.fromkeys(("word", "words", "ner", "pos", "tagging", "tokencls"), "token"),
    **dict.fromkeys(("packed", "packing"), "padding_free"),
    **dict.fromkeys(("delete", "deletion"), "remove drop"),
    "balanced": "inverse",
    "sqrt": "sqrt_inverse",
    "cpu": "offload",
    "ce": "cross_entropy",
    "subword": "token",
}
"""What values are called elsewhere, without case and separators, and here."""
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def explain(error: ValidationError) -> list[str]:
    """Return a line per problem of a recipe; the branches of a union make one line together."""
    found: dict[str, list[tuple[ErrorDetails, _Place]]] = {}
    details = error.errors(include_url=False)
    for detail in details[:MOST_LISTED]:
        place = _find(detail["loc"])
        found.setdefault(place.path, []).append((detail, place))
    lines: list[str] = []
    for path, pairs in found.items():
        # If a value fits a container of the union, only what is wrong inside it matters.
        inner = [pair for pair in pairs if pair[1].inside] or pairs
        for detail, place in inner:
            # with [key], the key itself is wrong
            parts = place.inside[:-2] if "[key]" in place.inside else place.inside
            subscript = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
            lines.append(f"{path}{subscript}: {_problem(detail, place)}")
    more = [f"recipe: and {len(details) - MOST_LISTED:,} more problems"] if len(details) > MOST_LISTED else []
    return [*dict.fromkeys(lines), *more]


def choices(field: FieldInfo) -> str:
    """Return what a field takes, in the words of a recipe: its names, or a kind of value with its bounds."""
    return _expected(_Place("", field, ()))


def shown(value: Any) -> str:
    """Return a value as a recipe would write it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error is: the path of the field, the field, the keys of its section, and the place inside the value."""

    path: str
    field: FieldInfo | None
    siblings: tuple[str, ...]
    inside: tuple[int | str, ...] = ()


def _find(loc: tuple[int | str, ...]) -> _Place:
    model: type[BaseModel] = Recipe
    for index, part in enumerate(loc):
        field = model.model_fields.get(str(part))
        section = None if field is None else section_of(field.annotation)
        if section is None or index + 1 == len(loc):
            inside = loc[index + 1 :]
            if field is not None and len([one for one in _types(field) if one is not NoneType]) > 1:
                inside = inside[1:]  # pydantic's name of the branch
            return _Place(".".join(map(str, loc[: index + 1])), field, tuple(model.model_fields), inside)
        model = section
    return _Place("recipe", None, tuple(Recipe.model_fields))


def _problem(detail: ErrorDetails, place: _Place) -> str:
    kind, value = detail["type"], detail.get("input")
    known = ", ".join(place.siblings)
    if kind == "invalid_key":
        return f"unknown key, and not text. Known here: {known}"
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        elsewhere = [path for path, _ in all_fields() if path.rpartition(".")[2] == name and "test_source" not in path]
        misplaced = elsewhere and not isinstance(value, Mapping)  # a mapping is a section
        guess = f" Did you mean '{elsewhere[0]}'?" if misplaced else nearest(name, place.siblings)
        return f"unknown key.{guess} Known here: {known}"
    if kind == "missing":
        about = f" ({place.field.description})" if place.field and place.field.description else ""
        return f"is missing; expected {_expected(place)}{about}"
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return message if isinstance(value, Mapping) else f"is {shown(value)}; {message}"
    if place.inside[-1:] == ("[key]",):
        return f"the key {shown(value)} is not text: put it in quotes"
    text = f"is {shown(value)}; expected {_expected(place)}"
    types = _innermost(place)
    names = [name for part in types if get_origin(part) is Literal for name in get_args(part)]
    called = re.sub(r"[-_. \[\]<>']", "", shown(value)).lower()
    meant = [name for name in _MEANT.get(called, "").split() if name in names]
    if meant or isinstance(value, str):
        guess = f" Did you mean '{meant[0]}'?" if meant else nearest(value, names)
        return f"{text}.{guess}" if guess else text
    only_text = str in types and not {*types} - {str, NoneType}
    quotable = only_text and value is not None and not isinstance(value, Mapping | Sequence)
    return f"{text}: put it in quotes" if quotable else text


def _types(field: FieldInfo) -> list[Any]:
    """Return the types that a field takes; the names of a registry as a `Literal`."""
    if names := [tuple(mark.registry) for mark in field.metadata if isinstance(mark, NameIn)]:
        return [Literal[names[0]]]
    annotation = field.annotation
    return list(get_args(annotation)) if get_origin(annotation) in {Union, UnionType} else [annotation]


def _innermost(place: _Place) -> list[Any]:
    """Return the types that are right at the place."""
    types = [] if place.field is None else _types(place.field)
    if not place.inside:
        return types
    bare = [FieldInfo.from_annotation(part).annotation for part in types]
    return [get_args(part)[get_origin(part) is dict] for part in bare if get_origin(part) in {dict, tuple}]


def _expected(place: _Place) -> str:
    if place.field is None:
        return "a mapping of keys to values"
    if (section := section_of(place.field.annotation)) is not None:
        keys = sorted(section.model_fields, key=lambda key: not section.model_fields[key].is_required())
        return f"a section with keys such as {', '.join(keys[:4])}"
    outer = () if place.inside else tuple(place.field.metadata)
    words: list[str] = []
    for part in _innermost(place):
        words += map(repr, get_args(part)) if get_origin(part) is Literal else [_noun(part, outer)]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _noun(annotation: Any, outer: tuple[Any, ...]) -> str:
    """Describe a type in the words of a recipe: by its title, or by a noun with its bounds."""
    field = FieldInfo.from_annotation(annotation)
    if field.title:
        return field.title
    bare: Any = field.annotation
    rules = [(rule, name) for name in _BOUNDS for rule in (*outer, *field.metadata) if hasattr(rule, name)]
    bounds = [f"{_BOUNDS[name]} {str(getattr(rule, name)).removesuffix('.0')}" for rule, name in rules]
    noun = _NOUNS.get(bare) or {tuple: "a list such as [a, b]", dict: "a mapping such as {a: b}"}[get_origin(bare)]
    return f"{noun} ({', '.join(bounds)})" if bounds and bare in {int, float} else noun

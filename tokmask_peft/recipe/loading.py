"""Read recipes from YAML, with bases and `dotted.key=value` overrides; all errors are reported at once."""

import contextlib
import errno
import itertools
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tokmask_peft.errors import RecipeError, boundary, nearest, write_whole
from tokmask_peft.recipe.errors import choices, explain, shown
from tokmask_peft.recipe.schema import Recipe, all_fields, section_of

MOST_VALUES, DEEPEST = 100_000, 20
_PACKAGE = Path(__file__).parent.parent
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
"""The shipped recipes; in a source checkout those in its top folder."""


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes, `folder/name` without the ending; bases are left out."""
    names = [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml")]
    return sorted(name for name in names if not name.startswith("_") and "/_" not in name)


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe, given its path or the name of a shipped recipe; RecipeError if there is neither."""
    path = Path(recipe)
    if path.is_file():
        return path
    name, there = path.as_posix().removeprefix("recipes/").removesuffix(".yaml"), list[str]()
    if name in shipped_recipes():
        return SHIPPED / f"{name}.yaml"
    with contextlib.suppress(OSError):
        there = [file.name for file in path.parent.iterdir() if file.is_file()]
    guess = nearest(name, shipped_recipes()) or nearest(path.name, there)
    problem = f"no such file, and no shipped recipe of that name.{guess} See `tokmask recipes`."
    raise RecipeError([problem], str(recipe), code="no-such-recipe", recipe=name)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override and check a recipe, whose `data.path` may be relative to its folder; see `Recipe.load`."""
    with boundary(f"reading the recipe {recipe}"):
        content = _read_located(find_recipe(recipe))
        return check(content, override(content, overrides), str(recipe))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a checked copy of a recipe with `dotted.key=value` overrides; RecipeError with every problem found."""
    content = recipe.model_dump(mode="json")
    return check(content, override(content, overrides), recipe.name)


def override(content: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set `dotted.key=value` overrides in the content of a recipe; return what is wrong with them."""
    problems: list[str] = []
    for given in overrides:
        key, sign, value = given.partition("=")
        keys = key.strip().split(".")
        if not sign or not all(keys):
            problems.append(f"{given}: expected dotted.key=value, for example training.epochs=3")
        elif keys[0] == "base":
            problems.append(f"{given}: a base can only be named in the recipe file")
        else:
            _set(content, keys, value, problems, given)
    return problems


def check(content: Mapping[str, Any], problems: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """Return the recipe of a file's content; RecipeError with every problem, after those that were found before."""
    found = list(problems)
    try:
        checked = Recipe.model_validate(content)
    except ValidationError as error:
        found.extend(explain(error))
    if found:
        raise RecipeError(found, source)
    return checked


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, every field written out."""
    return as_yaml(recipe.model_dump(mode="json"))


def as_yaml(value: Any, **options: Any) -> str:
    """Return a value as YAML that is read as the same: PyYAML takes Unicode's line ends in quotes for blanks."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, **options)
    return yaml.safe_dump(value, sort_keys=False, **options) if {*"\x85\u2028\u2029"} & {*text} else text


def copy_recipe(recipe: str | Path, target: Path, overrides: Sequence[str] = ()) -> None:
    """Write a recipe with its bases merged in, keeping the comments at its head, with the command for the new file."""
    path = find_recipe(recipe)
    content = _read_located(path)
    if overrides:
        check(content, override(content, overrides), str(recipe))
    body = as_yaml(content)
    lines = path.read_text(encoding="utf-8").splitlines()
    head = "".join(f"{line}\n" for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    head = re.sub(r"(tokmask train) \S+", lambda found: f"{found[1]} {shlex.quote(str(target))}", head)
    write_new(target, head + body)


def write_new(target: Path, text: str | None = None) -> None:
    """Write the file of a recipe, with its folder, or only find out whether that is possible, if there is no text.

    RecipeError if there is a file of that name already, or it cannot be written.
    """
    try:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        if text is None:
            folder = next(above for above in target.absolute().parents if above.exists())
            tempfile.TemporaryFile(dir=folder).close()
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        code, file = "recipe-unwritable", str(target)
        problem = f"{target} cannot be written: {error.strerror}; choose another place"
        if isinstance(error, FileExistsError):
            code, file, problem = (
                "recipe-exists",
                error.filename,
                f"{error.filename} exists; choose another name or remove it",
            )
        raise RecipeError([problem], str(target), code=code, file=file) from error


def field_help(wanted: str = "") -> list[str]:
    """Return a line on each key whose name, or else whose meaning, has `wanted` in it; RecipeError if none has."""
    fields, name = dict(all_fields()), wanted.strip().lower()
    about = [path for path, field in fields.items() if name in str(field.description).lower()]
    found = [path for path in fields if name in path] or about
    if not found:
        guess = nearest(name, [*fields, *(path.rpartition(".")[2] for path in fields)])
        raise RecipeError([f"no key of a recipe is about '{wanted}'.{guess}"], "fields", code="no-such-field")
    lines = []
    for path in found:
        default = shown(fields[path].get_default(call_default_factory=True))
        state = "required" if fields[path].is_required() else f"default {default}"
        lines.append(f"{path} ({state}): {fields[path].description} [{choices(fields[path])}]")
    return lines


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Return a line per field that differs, except the run's place and which run scores the n-grams for its seed."""
    old, new = flat(before.model_dump(mode="json")), flat(after.model_dump(mode="json"))
    return [
        f"{key}: {shown(old.get(key))} before, {shown(new.get(key))} now"
        for key in sorted({*old, *new} - {"name", "output_dir", "training.baseline"})
        if old.get(key) != new.get(key)
    ]


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without its traps: a key given twice is an error, `no` is Norwegian, and 2024-01-01 a name.

    A document that is nested too deeply, or too large once its aliases are written out, is refused.
    """

    def get_single_node(self) -> Any:
        try:
            root = super().get_single_node()
        except RecursionError:
            raise yaml.MarkedYAMLError(problem="nested too deeply") from None
        nodes: list[Any] = [root]
        count = 0
        while nodes:
            node, count = nodes.pop(), count + 1
            if count > MOST_VALUES:
                problem = f"more than {MOST_VALUES:,} values, each alias counted as what it stands for"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            if isinstance(node, yaml.CollectionNode):
                pairs = isinstance(node, yaml.MappingNode)
                nodes.extend(itertools.chain.from_iterable(node.value) if pairs else node.value)
        return root

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
    def problem(text: str, code: str) -> RecipeError:
        if path.suffix.lower() not in (".yaml", ".yml"):
            text += f". If it has data, make a recipe for them: tokmask init {shlex.quote(str(path))}"
        return RecipeError([text], str(path), code=code, file=str(path))

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise problem(f"{where}{error.problem or error.context}", "not-yaml") from error
    except UnicodeDecodeError as error:
        raise problem(f"is not UTF-8 text (byte {error.start}); save it as UTF-8", "not-utf8") from error
    except OSError as error:
        raise problem(f"cannot be read: {error.strerror}", "recipe-unreadable") from error
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML refuses, numbers that Python does
        raise problem(" ".join(str(error).split()), "not-yaml") from error
    if not isinstance(content, dict | None):
        expected = "expected keys with values, for example name: my-run"
        raise problem(f"{expected}, but the file is {shown(content)}", "not-a-mapping")
    return content or {}


def _read_located(path: Path) -> dict[str, Any]:
    """Read a recipe with its bases; a `data.path` that is not here, but next to the recipe, becomes absolute."""
    content = _read_merged(path)
    sources: list[Any] = [content.get("data")]
    sources += [sources[0].get("test_source")] if isinstance(sources[0], dict) else []
    for source in (one for one in sources if isinstance(one, dict) and isinstance(one.get("path"), str)):
        at = path.parent / source["path"]
        if not os.path.exists(source["path"]) and os.path.exists(at):  # noqa: PTH110 (Path.exists fails at long names)
            source["path"] = str(at.absolute())
    return content


def _read_merged(
    path: Path, above: tuple[Path, ...] = (), known: dict[Path, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Read a recipe with its bases; `above` are the recipes whose base it is, `known` those that were read before."""
    resolved, known = path.resolve(), {} if known is None else known
    if resolved in known:
        return known[resolved]
    if len(above) == DEEPEST:
        problem = f"base: more than {DEEPEST} recipes, each the base of the one before; merge some"
        raise RecipeError([problem], str(above[0]), code="deep-base")
    if resolved in above:
        chain = " -> ".join(map(str, [*above, resolved]))
        raise RecipeError([f"base: the recipe is its own base ({chain})"], str(path), code="circular-base")
    content = _read(path)
    bases = content.pop("base", None) or []
    files = [path.parent / str(base) for base in (bases if isinstance(bases, list) else [bases])]
    if missing := [base for base in files if not base.is_file()]:
        lines = [f"base: {base} is not a file; give its path relative to the folder of this recipe" for base in missing]
        raise RecipeError(lines, str(path), code="no-such-base")
    merged: dict[str, Any] = {}
    for base in files:
        merged = _merge(merged, _read_merged(base, (*above, resolved), known), Recipe)
    known[resolved] = _merge(merged, content, Recipe)
    return known[resolved]


def _merge(base: dict[str, Any], over: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Merge sections key by key; a value is replaced as a whole, even if it is a mapping (`label_map`)."""
    merged = dict(base)
    for key, value in over.items():
        before, field = merged.get(key), model.model_fields.get(str(key))
        section = None if field is None else section_of(field.annotation)
        if section is not None and isinstance(before, dict) and isinstance(value, dict):
            value = _merge(before, value, section)
        merged[key] = value
    return merged


def _set(content: dict[str, Any], keys: list[str], text: str, problems: list[str], override: str) -> None:
    for key in keys[:-1]:
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
        if not isinstance(content, dict):
            problems.append(f"{override}: '{key}' is a single value, with no keys below it")
            return
    try:
        plain = text.strip() in ("", "|", ">", "-", "?", "#")  # marks that begin something in YAML
        content[keys[-1]] = text.strip() if plain else yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, ValueError):
        content[keys[-1]] = text

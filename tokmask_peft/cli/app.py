"""The application: what all commands share, and the recipes that come with the package (`recipes`)."""

from __future__ import annotations

import os
import re
import shlex
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tokmask_peft import __version__
from tokmask_peft.console import Decision, echo, mute, stop_signals
from tokmask_peft.errors import DataError, RunInterruptedError, TokmaskError, as_ours

if TYPE_CHECKING:
    from tokmask_peft.data.readers import TextFile
    from tokmask_peft.recipe.schema import Recipe


class _Commands(TyperGroup):
    """Commands that end with one message: exit code 2 after a mistake, 130 after an interruption."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with stop_signals(signal.default_int_handler):
                return super().invoke(ctx)
        except BrokenPipeError:  # whoever read the output has enough of it
            mute()
            raise typer.Exit(130) from None
        except KeyboardInterrupt:
            echo("Interrupted.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):  # typer's own
                raise
            if os.environ.get("TOKMASK_DEBUG") == "1":
                traceback.print_exception(error)
            echo(f"Error: {as_ours(error)}", err=True)
            raise typer.Exit(130 if isinstance(error, RunInterruptedError) else 2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Token-masked LoRA and QLoRA fine-tuning for text classification.",
)

TRAIN, LOOK, USE = "Train an adapter", "Look at runs", "Use and share an adapter"
"""The groups of commands in `tokmask --help`."""

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, for example training.epochs=3")
]

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a run folder, an adapter folder, or a Hub id")]
BackboneOption = Annotated[
    str | None, typer.Option(help="load the backbone from this Hub id, folder or package:NAME/FOLDER")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the backbone's own code, if it has any; read it first")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cpu, …; default: a GPU if there is one")]
QuantizationOption = Annotated[str | None, typer.Option(help="nf4, int8 or none; default: as in training")]
PrecisionOption = Annotated[str | None, typer.Option(help="bf16, fp16 (NVIDIA GPUs) or fp32; default: as in training")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Handle the options before the command."""
    if version:
        echo(__version__)
        raise typer.Exit


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """Name options of a command in place of keys of a recipe: with `format: --format`, that of `data.format`."""
    return re.sub(r"\bdata\.(\w+)", lambda found: flags.get(found[1], found[0]), text)


def read_columns(given: list[str] | None, pair: tuple[str, str] | None, flag: str) -> str | tuple[str, str] | None:
    """Return the column of the texts that an option names, or the two of a model that reads pairs; none if none is."""
    if not given:
        return None
    if len(given) != (1 if pair is None else 2):
        reads = "one text, so name one column" if pair is None else f"pairs ({' and '.join(pair)}), so name two columns"
        raise typer.BadParameter(f"this model reads {reads}", param_hint=flag)
    return given[0] if pair is None else (given[0], given[1])


@contextmanager
def own_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Let errors name a command's own options; see `with_flags`."""
    try:
        yield
    except TokmaskError as error:
        error.args = (with_flags(str(error), flags),)
        raise


def checked(recipe: str, overrides: list[str] | None) -> Recipe:
    """Load a recipe with its overrides; every problem is reported at once."""
    from tokmask_peft.recipe.schema import Recipe

    return Recipe.load(recipe, overrides or [])


def open_texts(model: str, asked: dict[str, Any], read: Callable[..., TextFile]) -> TextFile:
    """Open a file; if no column is named, the text's is that of the run's data: first by name, last by number.

    `asked` has what the command says of `format`, `text_column`, `header` and `group_column`, with which `read` is
    called. A number comes first if neither file has a header. A file that nothing else reads is read as CoNLL if the
    run's data are, and has a header if they do; words are joined by the group of the run's data.

    Raises:
        DataError: no way fits; that of the command alone.
    """
    from tokmask_peft.artifacts import is_run
    from tokmask_peft.recipe.loading import load_recipe

    ways = [asked]
    if asked["text_column"] is None and is_run(model):
        data = load_recipe(Path(model) / "recipe.yaml").data
        conll = (asked["format"], data.format) == ("auto", "conll")
        in_run = asked | {"text_column": data.text_column}
        in_run |= {"format": "conll"} if conll else {}
        in_run |= {"header": data.header} if asked["header"] == "auto" else {}
        numbered = str(data.text_column).removeprefix("-").isdecimal()
        first = isinstance(data.text_column, str) and not (numbered or conll)
        if numbered and data.header is False:
            first = _has_no_header(asked, read)
        grouped = asked["group_column"] is None and data.group_column is not None
        joined = [in_run | {"group_column": data.group_column}] if grouped else []
        ways = [*joined, in_run, asked] if first else [asked, *joined, in_run]
    problems: list[DataError] = []
    for way in ways:
        try:
            source = read(**way)
            whole = way["group_column"] != asked["group_column"] and _has_texts(source)
        except DataError as error:
            problems.insert(0 if way is asked else 1, error)
            continue
        if whole:
            continue  # nothing to join
        columns = source.rows or way["format"] != asked["format"]  # a file of lines has none
        if way is not asked and way != asked and columns:
            choice = f"column {way['text_column'] or 0}" + (" of conll" if way["format"] != asked["format"] else "")
            why = "as in the data of the run; data.text_column sets it"
            source.decisions = (*source.decisions, Decision(f"texts of {source.path.name}", choice, why))
        return source
    raise problems[0]


def _has_texts(source: TextFile) -> bool:
    """Return whether rows near the beginning have whole texts rather than a word each."""
    first = islice(source, 20)
    return any(len(word.split()) > 1 for one in first for word in getattr(one, "words", ()))


def _has_no_header(asked: dict[str, Any], read: Callable[..., TextFile]) -> bool:
    """Return whether the first row of a table is data: as the command says, or as its cells show."""
    if asked["header"] != "auto":
        return not asked["header"]
    with suppress(DataError):
        found = read(**asked | {"text_column": 0}).decisions
        return any(one.what.startswith("header of") and one.choice == "none" for one in found)
    return False


recipes_app = typer.Typer(no_args_is_help=False, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes", rich_help_panel=TRAIN)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes() -> None:
    """List the shipped recipes with their purposes."""
    from tokmask_peft.recipe.loading import SHIPPED, shipped_recipes

    names = shipped_recipes()
    width = max(map(len, names))
    for name in names:
        lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        about = next((line.lstrip("# ") for line in lines if line.startswith("#") and "tokmask train" not in line), "")
        echo(f"{name:<{width}}  {about}")


@recipes_app.command("show")
def show_recipe(
    name: RecipeArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="Include its bases and all defaults.")] = False,
) -> None:
    """Print a recipe."""
    from tokmask_peft.recipe.loading import find_recipe, load_recipe, to_yaml

    path = find_recipe(name)
    echo(to_yaml(load_recipe(path)) if resolved else path.read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeArgument,
    target: Annotated[Path, typer.Argument(help="the file to write; never overwritten")],
    overrides: Overrides = None,
) -> None:
    """Copy a recipe, with its bases merged in and KEYs set, as a starting point for your own."""
    from tokmask_peft.recipe.loading import copy_recipe as copy

    copy(name, target, overrides or [])
    echo(f"{target} is yours to edit; run it with: tokmask train {shlex.quote(str(target))}")


@recipes_app.command("fields")
def list_fields(
    about: Annotated[str, typer.Argument(metavar="FILTER", help="only keys with this text in name or meaning")] = "",
) -> None:
    """List the keys of a recipe, with their meanings, defaults and possible values."""
    from tokmask_peft.recipe.loading import field_help

    echo("\n".join(field_help(about)))

"""The application: what all commands share, and the recipes that come with the package (`recipes`)."""

from __future__ import annotations

import os
import re
import shlex
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


def open_texts(model: str, asked: tuple[str, Any, Any], read: Callable[[str, Any, Any], TextFile]) -> TextFile:
    """Open a file; if no column is named, the text's is that of the run's data: first by name, last by number.

    `asked` and the arguments of `read` are a format, a column, and whether there is a header.

    A file that nothing else reads is read as CoNLL if the run's data are, and has a header if they do.

    Raises:
        DataError: neither way fits; that of the command alone.
    """
    from tokmask_peft.artifacts import is_run
    from tokmask_peft.recipe.loading import load_recipe

    ways, (format, column, header) = [asked], asked
    if column is None and is_run(model):
        data = load_recipe(Path(model) / "recipe.yaml").data
        conll = (format, data.format) == ("auto", "conll")
        in_run = ("conll" if conll else format, data.text_column, data.header if header == "auto" else header)
        by_name = isinstance(data.text_column, str) and not data.text_column.removeprefix("-").isdecimal()
        ways = [in_run, asked] if by_name and not conll else [asked, in_run]
    problems: list[DataError] = []
    for way in ways:
        try:
            source = read(*way)
        except DataError as error:
            problems.insert(0 if way is asked else 1, error)
            continue
        if way is not asked and way != asked:
            choice = f"column {way[1] or 0}" + (" of conll" if way[0] != format else "")
            why = "as in the data of the run; data.text_column sets it"
            source.decisions = (*source.decisions, Decision(f"texts of {source.path.name}", choice, why))
        return source
    raise problems[0]


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
    about: Annotated[str, typer.Argument(metavar="FILTER", help="only keys with this text in their names")] = "",
) -> None:
    """List the keys of a recipe, with their meanings, defaults and possible values."""
    from tokmask_peft.recipe.loading import field_help

    echo("\n".join(field_help(about)))

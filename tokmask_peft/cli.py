"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokmask_peft import __version__
from tokmask_peft.errors import RunInterruptedError, TokmaskError


class _Commands(TyperGroup):
    """Commands that end in one message and exit code 2 on a mistake of the user's, in 130 on an interruption."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TokmaskError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(130 if isinstance(error, RunInterruptedError) else 2) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Token-masked LoRA and QLoRA fine-tuning for text classification.",
)
recipes_app = typer.Typer(no_args_is_help=False, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, for example training.epochs=3")
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Handle the options before the command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train an adapter as RECIPE says; the run lies in runs/NAME."""
    from tokmask_peft.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    _quiet_libraries()
    from tokmask_peft.training import fit

    fit.train(checked, resume=resume, quiet=quiet)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart")],
    split: Annotated[str, typer.Option(help="train, validation or test; with --data, a split or file there")] = "test",
    data: Annotated[str | None, typer.Option(help="folder or file with other texts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score the adapter of RUN on one of its splits, or on other texts."""
    import json

    from tokmask_peft.training.run_folder import open_finished

    open_finished(run)  # before the libraries are loaded, which takes seconds
    _quiet_libraries()
    from tokmask_peft.console import make_console, print_scores
    from tokmask_peft.training.evaluate import evaluate as score

    result = score(run, split=split, data=data)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_scores(make_console(), {split: result})


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository on the Hub; made if there is none")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Push the adapter of RUN with its model card to the Hugging Face Hub (log in with: hf auth login)."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    from tokmask_peft import hub

    set_verbosity_error()  # its retries print addresses that are signed
    if not sys.stderr.isatty():
        disable_progress_bars()
    hub.push(run, repo, private)


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check RECIPE and print every problem at once, without loading anything."""
    from tokmask_peft.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    typer.echo(f"{recipe} is valid: {checked.data.task} task on {checked.model.backbone}, run {checked.run_dir}")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes() -> None:
    """List the shipped recipes with what they are for."""
    from tokmask_peft.recipe_io import SHIPPED, shipped_recipes

    names = shipped_recipes()
    width = max(map(len, names))
    for name in names:
        lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        about = next((line.lstrip("# ") for line in lines if line.startswith("#") and "tokmask train" not in line), "")
        typer.echo(f"{name:<{width}}  {about}")


@recipes_app.command("show")
def show_recipe(
    name: RecipeArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="With its bases and all defaults.")] = False,
) -> None:
    """Print a recipe."""
    from tokmask_peft.recipe_io import find_recipe, load_recipe, to_yaml

    path = find_recipe(name)
    typer.echo(to_yaml(load_recipe(path)) if resolved else path.read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeArgument, target: Annotated[Path, typer.Argument(help="the file to write; never overwritten")]
) -> None:
    """Copy a recipe, with its bases merged in, as a start for your own."""
    from tokmask_peft.recipe_io import copy_recipe as copy

    copy(name, target)
    typer.echo(f"{target} is yours to change; run it with: tokmask train {shlex.quote(str(target))}")


@recipes_app.command("fields")
def list_fields() -> None:
    """Explain every key that a recipe may hold."""
    from tokmask_peft.recipe_io import field_help

    for line in field_help():
        typer.echo(line)


def _quiet_libraries() -> None:
    """Silence what the libraries say on a normal run: load reports, progress bars of theirs, advice for others."""
    # first: importing transformers imports bitsandbytes, which warns of optional kernels at once
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|bitsandbytes|accelerate)(\..*)?$")


def main() -> None:
    """Run the command line."""
    app()

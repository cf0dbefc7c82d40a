"""The recipes that come with the package: `recipes list`, `show`, `copy`, `fields`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tokmask_peft.cli.app import RecipeArgument, app

recipes_app = typer.Typer(no_args_is_help=False, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")


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
        typer.echo(f"{name:<{width}}  {about}")


@recipes_app.command("show")
def show_recipe(
    name: RecipeArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="Include its bases and all defaults.")] = False,
) -> None:
    """Print a recipe."""
    from tokmask_peft.recipe.loading import find_recipe, load_recipe, to_yaml

    path = find_recipe(name)
    typer.echo(to_yaml(load_recipe(path)) if resolved else path.read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeArgument, target: Annotated[Path, typer.Argument(help="the file to write; never overwritten")]
) -> None:
    """Copy a recipe, with its bases merged in, as a starting point for your own."""
    from tokmask_peft.recipe.loading import copy_recipe as copy

    copy(name, target)
    typer.echo(f"{target} is yours to edit; run it with: tokmask train {shlex.quote(str(target))}")


@recipes_app.command("fields")
def list_fields() -> None:
    """Explain every key that a recipe may hold."""
    from tokmask_peft.recipe.loading import field_help

    typer.echo("\n".join(field_help()))

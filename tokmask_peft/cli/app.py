"""The application: what all commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokmask_peft import __version__
from tokmask_peft.errors import RunInterruptedError, TokmaskError


class _Commands(TyperGroup):
    """Commands that end with one message: exit code 2 after a mistake of the user, 130 after an interruption."""

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

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overrides, for example training.epochs=3")
]

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a run folder, an adapter folder, or a Hub id")]
BackboneOption = Annotated[
    str | None, typer.Option(help="load the backbone from this Hub id, folder or package:NAME/FOLDER")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cpu, …; default: a GPU if there is one")]
QuantizationOption = Annotated[str | None, typer.Option(help="nf4, int8 or none; default: as in training")]
PrecisionOption = Annotated[str | None, typer.Option(help="bf16 or fp32; default: as in training")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Handle the options before the command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit

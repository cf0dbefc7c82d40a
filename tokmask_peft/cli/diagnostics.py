"""Commands that ask what masking does: `diagnose` (gradients), `robustness` (disturbed texts)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokmask_peft.cli.app import Overrides, RecipeArgument, app, quiet_libraries


@app.command()
def diagnose(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    p: Annotated[str, typer.Option("--p", help="masking rates to measure at")] = "0,0.1,0.2,0.3",
    draws: Annotated[int, typer.Option(help="mask draws per batch")] = 16,
    batches: Annotated[int, typer.Option(help="batches of training texts")] = 8,
    at: Annotated[str, typer.Option(help="shares of the training at which to measure")] = "0,0.5,1",
    out: Annotated[Path | None, typer.Option(help="folder to write to; runs/NAME-diagnose if not given")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train RECIPE and measure what masking does to its gradients: variance, agreement, shift of the mean.

    The training uses the recipe's own masking rate and keeps no adapter; training.max_steps=60 makes it short.
    """
    from tokmask_peft.recipe import Recipe
    from tokmask_peft.study.diagnostics.gradient_plan import GradientPlan

    checked = Recipe.load(recipe, overrides or [])
    plan = GradientPlan.make(checked, p, draws, batches, at, out)
    quiet_libraries()
    from tokmask_peft.study.diagnostics.gradient_plot import matplotlib

    matplotlib()  # before a training whose plot could not be drawn
    from tokmask_peft.study.diagnostics.gradients import diagnose as measure

    report = measure(checked, plan, quiet=quiet)
    if not quiet:
        typer.echo(report.summary)
        typer.echo(f"Report: {report.markdown}")

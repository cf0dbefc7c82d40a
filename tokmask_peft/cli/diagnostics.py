"""Commands that ask what masking does: `diagnose` (gradients), `robustness` (disturbed texts)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokmask_peft.cli.app import BackboneOption, DeviceOption, Overrides, RecipeArgument, app
from tokmask_peft.console import quiet_libraries


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
    from tokmask_peft.recipe.schema import Recipe
    from tokmask_peft.study.diagnostics.plans import GradientPlan

    checked = Recipe.load(recipe, overrides or [])
    plan = GradientPlan.make(checked, p, draws, batches, at, out)
    quiet_libraries()
    from tokmask_peft.study.diagnostics.gradient_report import matplotlib

    matplotlib()  # before a training whose plot could not be drawn
    from tokmask_peft.study.diagnostics.gradients import diagnose as measure

    report = measure(checked, plan, quiet=quiet)
    if not quiet:
        typer.echo(report.summary)
        typer.echo(f"Report: {report.markdown}")


@app.command()
def robustness(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="folders of finished runs, or of one sweep")],
    p: Annotated[str, typer.Option("--p", help="shares of sub-tokens to mask")] = "0,0.1,0.2,0.3,0.4,0.5",
    noise: Annotated[str, typer.Option(help="shares of words to misspell")] = "0,0.1,0.2,0.4",
    draws: Annotated[int, typer.Option(min=1, help="random draws of each; scores are their means")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="score at most so many texts, drawn at random")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of masks, misspellings and the choice of texts")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="folder to write to; RUN/robustness if not given, with one RUN")
    ] = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Score RUNs on masked and misspelt test texts and on unseen words, by their masking rate in training.

    Runs that differ by their seed alone are one line, with an interval; a run that was scored is not scored again.
    """
    from tokmask_peft.study.diagnostics import plans as robustness_plan

    rates, shares = robustness_plan.read_options(p, noise)
    folder = robustness_plan.choose_folder(runs, out)
    members = robustness_plan.find_members(runs)
    quiet_libraries()
    from tokmask_peft.study.diagnostics.gradient_report import matplotlib

    matplotlib()
    from tokmask_peft.study.diagnostics import robustness as measuring
    from tokmask_peft.study.diagnostics.robustness import Disturbances

    what = Disturbances(rates, shares, draws, seed, limit)
    report = measuring.robustness(members, what, folder, backbone=backbone, device=device, quiet=quiet)
    if not quiet:
        typer.echo(report.summary)
        typer.echo(f"Report: {report.markdown}")

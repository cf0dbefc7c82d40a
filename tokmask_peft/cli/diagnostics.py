"""Commands that measure what masking does: `diagnose`, `robustness`, `faithfulness`."""

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
    from tokmask_peft.study.diagnostics.gradients import diagnose as measure
    from tokmask_peft.study.report import matplotlib

    matplotlib()  # before a training whose plot could not be drawn
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
    limit: Annotated[int | None, typer.Option(min=1, help="score at most this many texts, drawn at random")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of masks, misspellings and the choice of texts")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="folder to write to; RUN/robustness if not given, with one RUN")
    ] = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Score RUNs on masked and misspelt test texts and on unseen words, by their masking rate in training.

    Runs that differ only by their seed are one line, with an interval; a run is not scored twice in the same way.
    """
    from tokmask_peft.study.diagnostics.plans import Perturbations, find_members, folder_of

    what = Perturbations.make(p, noise, draws, seed, limit)
    folder = folder_of(out, Path(runs[0]) / "robustness" if len(set(runs)) == 1 else None)
    members = find_members(runs)
    quiet_libraries()
    from tokmask_peft.study.diagnostics.robustness import robustness as measure
    from tokmask_peft.study.report import matplotlib

    matplotlib()
    report = measure(members, what, folder, backbone=backbone, device=device, quiet=quiet)
    if not quiet:
        typer.echo(report.summary)
        typer.echo(f"Report: {report.markdown}")


@app.command()
def faithfulness(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart")],
    against: Annotated[str | None, typer.Option(help="a run of the same recipe with p = 0, to compare with")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test; with --data, a split or file there")] = "test",
    data: Annotated[str | None, typer.Option(help="folder or file with other texts")] = None,
    limit: Annotated[int, typer.Option(min=2, help="number of texts, drawn at random")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="of texts, orders and bootstrap")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="masked texts per forward pass")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure whether `tokmask explain` ranks words correctly for RUN: mask the most influential words first."""
    import json

    from tokmask_peft.artifacts import open_finished

    for folder in (run, against):
        if folder is not None:
            open_finished(folder)  # before the libraries are loaded, which takes seconds
    quiet_libraries()
    from tokmask_peft.study.diagnostics.faithfulness import faithfulness as measure
    from tokmask_peft.study.diagnostics.faithfulness import report_text

    found = measure(run, against, split=split, data=data, limit=limit, seed=seed, batch_size=batch_size)
    typer.echo(json.dumps(found, indent=2) if as_json else report_text(found))

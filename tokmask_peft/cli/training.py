"""Commands that train: `train`, `sweep`; and those that look ahead: `validate`, `estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from tokmask_peft.cli.app import Overrides, RecipeArgument, app
from tokmask_peft.console import quiet_libraries


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train an adapter as RECIPE says; the run lies in runs/NAME."""
    from tokmask_peft.recipe.schema import Recipe

    checked = Recipe.load(recipe, overrides or [])
    quiet_libraries()
    from tokmask_peft.training import train as run

    run.train(checked, resume=resume, quiet=quiet)


@app.command()
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    p: Annotated[str | None, typer.Option("--p", help="masking rates, for example 0,0.1,0.2")] = None,
    seeds: Annotated[str, typer.Option(help="how many (5 is the seeds 1 to 5), or which: 11,12,13")] = "5",
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="another axis, as training.learning_rate=1e-4,3e-4; may be repeated"),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="compare regularizers: none, lora_dropout, attention_dropout, neftune, label_smoothing, mask, and "
            "combinations such as mask+neftune, separated by commas"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the sweep; its folder is runs/NAME")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="database to share with other machines; SQLite in the folder else")
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe")] = "grid",
    trials: Annotated[int | None, typer.Option(help="number of runs, with random and tpe")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Stop runs below the median; biases a grid's report.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="runs at once on this machine")] = 1,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of finished runs.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trials again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and start none.")] = False,
) -> None:
    """Train RECIPE once for each masking rate, seed and grid value; the same command goes on where it stopped."""
    from tokmask_peft.study.plan import make_plan

    plan = make_plan(
        recipe,
        overrides or [],
        p=p,
        seeds=seeds,
        grid=grid or [],
        arms=arms,
        sampler=sampler,
        trials=trials,
        name=name,
    )
    if dry_run:
        for cell in plan.cells:
            typer.echo(f"{cell.name}  {' '.join((f'seed={cell.seed}', *cell.overrides))}")
        return
    from tokmask_peft.study import runner as running
    from tokmask_peft.study.runner import Options

    options = Options(workers, keep_checkpoints, prune, retry_failed)
    cells = running.run_sweep(plan, storage, options)
    for line in running.closing_lines(plan, cells):
        typer.echo(line)
    if running.failures(cells):
        raise typer.Exit(1)


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check RECIPE and print every problem at once, without loading anything."""
    from tokmask_peft.recipe.schema import Recipe

    checked = Recipe.load(recipe, overrides or [])
    typer.echo(f"{recipe} is valid: {checked.data.task} task on {checked.model.backbone}, run {checked.run_dir}")


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="memory of a GPU, for example 6GB, taken for one with bf16 (GTX and RTX 20 have none: add "
            "model.precision=fp32); default: this machine"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bytes as JSON.")] = False,
) -> None:
    """Say how much memory RECIPE takes, whether it fits, and what to change; no weights are needed."""
    from tokmask_peft.recipe.schema import Recipe

    checked = Recipe.load(recipe, overrides or [])
    quiet_libraries()
    from tokmask_peft.training.memory import print_forecast, without_training

    found = without_training(checked, gpu)
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_forecast(found)

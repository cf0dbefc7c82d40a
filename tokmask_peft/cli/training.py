"""Commands that train: `train`, `sweep`; and those that look ahead: `validate`, `estimate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokmask_peft.cli.app import Overrides, RecipeArgument, app
from tokmask_peft.console import make_console, quiet_libraries
from tokmask_peft.model.memory.estimate import USABLE, Estimate, Setting, shown
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.model.memory.suggestions import Remedy
from tokmask_peft.training.memory import Forecast

ROWS = {
    "weights": "frozen backbone",
    "embedding": "its input embedding",
    "adapter": "adapter and head, fp32",
    "optimizer": "AdamW's states, fp32",
    "activations": "kept for the backward pass",
    "workspace": "gradients and results on their way, on top of that",
    "evaluation": "an evaluation takes more than a step",
    "overhead": "Python, libraries, CUDA context",
}


def print_report(cast: Forecast, setting: Setting, ways: list[Remedy]) -> None:
    """Print the bytes, whether they fit, and what would save some."""
    console = make_console()
    precision = "bf16" if str(setting.dtype) == "torch.bfloat16" else "fp32"
    known = "of your texts" if cast.shapes.known else "every text as long as data.max_length"
    console.print(
        f"{cast.recipe.model.backbone} on {setting.device_type}, {precision}, quantization {setting.quantization}, "
        f"embedding {cast.recipe.model.embedding}",
        markup=False,
    )
    if setting.assumed is not None:
        console.print(setting.assumed, markup=False)
    console.print(f"gradient checkpointing {cast.decision.choice}: {cast.decision.reason}", markup=False)
    console.print(f"largest batch: {_described(cast.shapes.largest)} ({known})\n", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("what")
    table.add_column("largest batch", justify="right")
    if cast.usual is not None:
        table.add_column("usual batch", justify="right")
    table.add_column("")
    for name, about in ROWS.items():
        columns = [cast.largest] if cast.usual is None else [cast.largest, cast.usual]
        cells = [_cell(column, name) for column in columns]
        if any(cells):
            table.add_row(name, *(cell or "-" for cell in cells), about)
    totals = [shown(column.total) for column in (cast.largest, cast.usual) if column is not None]
    table.add_row("[bold]total[/bold]", *(f"[bold]{total}[/bold]" for total in totals), "")
    console.print(table)
    if cast.largest.host:
        console.print(f"and {shown(cast.largest.host)} of the host's memory, for the embedding", markup=False)
    console.print()
    if cast.room is None:
        console.print(f"Nobody tells how much memory this {setting.device_type} has.", markup=False)
        return
    verdict = "It fits" if cast.fits else "It does NOT fit"
    have = f"{escape(cast.room.name)} has {shown(cast.room.bytes)}, of which {USABLE:.0%} are counted on"
    console.print(f"[bold]{verdict}[/bold]: {have}.")
    for number, remedy in enumerate(ways):
        if number == 0:
            console.print("What would take less, with its total:")
        console.print(f"  {remedy.told}", markup=False)
    if not cast.fits and not any(remedy.fits for remedy in ways):
        console.print("Nothing here makes it fit: take a smaller backbone.")


def to_dict(cast: Forecast, setting: Setting, ways: list[Remedy]) -> dict[str, Any]:
    """Return the report for JSON; all sizes in bytes."""
    return {
        "backbone": cast.recipe.model.backbone,
        "device": setting.device_type,
        "precision": str(setting.dtype).removeprefix("torch."),
        "quantization": setting.quantization,
        "assumed": setting.assumed,
        "gradient_checkpointing": cast.decision.choice == "on",
        "shapes": {"largest": _described(cast.shapes.largest), "from_texts": cast.shapes.known},
        "largest": cast.largest.to_dict(),
        "usual": None if cast.usual is None else cast.usual.to_dict(),
        "available": None if cast.room is None else cast.room.bytes,
        "fits": cast.fits,
        "remedies": [{"changes": dict(way.changes), "total": way.total, "fits": way.fits} for way in ways],
    }


def _cell(column: Estimate, name: str) -> str:
    """Leave out what does not count: the smaller of a step and an evaluation."""
    larger = column.evaluation > column.activations + column.workspace
    if (name == "evaluation" and not larger) or (name in ("activations", "workspace") and larger):
        return ""
    size: int = getattr(column, name)
    return shown(size) if size else ""


def _described(shape: Shape) -> str:
    if shape.packed:
        return f"{len(shape.lengths)} texts packed into {shape.tokens:,} sub-tokens"
    return f"{len(shape.lengths)} texts padded to {max(shape.lengths)} sub-tokens"


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
        str | None,
        typer.Option(
            metavar="URL", help="database to share with machines that do not share the folder; default: a file in it"
        ),
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe")] = "grid",
    trials: Annotated[int | None, typer.Option(help="number of runs, with random and tpe")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Stop runs below the median; biases a grid's report.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="runs at once on this machine")] = 1,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of finished runs.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and start none.")] = False,
) -> None:
    """Train RECIPE once for each masking rate, seed and grid value; the same command continues a sweep that stopped."""
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
    from tokmask_peft.study.runner import Options, closing_lines, run_sweep

    cells = run_sweep(plan, storage, Options(workers, keep_checkpoints, prune, retry_failed))
    for line in closing_lines(plan, cells):
        typer.echo(line)
    if any(cell.state == "failed" for cell in cells.values()):
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
    from tokmask_peft.training.memory import without_training

    found = without_training(checked, gpu)
    if as_json:
        import json

        typer.echo(json.dumps(to_dict(*found), indent=2))
    else:
        print_report(*found)

"""Commands that train: `train`, `sweep`; and those that look ahead: `validate`, `estimate`."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Annotated

import typer

from tokmask_peft.cli.app import Overrides, RecipeArgument, app, checked
from tokmask_peft.console import echo, quiet_libraries

if TYPE_CHECKING:
    from tokmask_peft.training.memory import Forecast

ARMS = (
    "compare regularizers: none, lora_dropout, attention_dropout, neftune, label_smoothing, mask, and combinations "
    "such as mask+neftune, separated by commas"
)
GPU = (
    "memory of a GPU, for example 6GB; it is assumed to have bf16 (GTX and RTX 20 cards do not: add "
    "model.precision=fp32); default: this machine"
)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train an adapter as RECIPE says; the run is saved in runs/NAME."""
    whole = checked(recipe, overrides)
    quiet_libraries()
    from tokmask_peft.training import train as run

    run.train(whole, resume=resume, quiet=quiet)


@app.command()
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    p: Annotated[str | None, typer.Option("--p", help="masking rates, for example 0,0.1,0.2")] = None,
    seeds: Annotated[str, typer.Option(help="how many (5 means seeds 1 to 5), or which: 11,12,13")] = "5",
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUES", help="an axis, as training.epochs=3,6; repeatable")
    ] = None,
    arms: Annotated[str | None, typer.Option(help=ARMS)] = None,
    name: Annotated[str | None, typer.Option(help="name of the sweep; its folder is runs/NAME")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="database to share with other machines; default: a file")
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe")] = "grid",
    trials: Annotated[int | None, typer.Option(help="number of runs, with random and tpe")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Stop runs below the median; biases a grid's report.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="number of runs at once on this machine")] = 1,
    keep_checkpoints: Annotated[bool, typer.Option("--keep-checkpoints", help="Keep those of finished runs.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed trials again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs without starting any.")] = False,
) -> None:
    """Train RECIPE once for each masking rate, seed and grid value; the same command continues where it stopped."""
    from tokmask_peft.study.plan import make_plan

    more, axes = overrides or [], grid or []
    plan = make_plan(recipe, more, p=p, seeds=seeds, grid=axes, arms=arms, sampler=sampler, trials=trials, name=name)
    if dry_run:
        for cell in plan.cells:
            echo(f"{cell.name}  {' '.join((f'seed={cell.seed}', *cell.overrides))}")
        return
    from tokmask_peft.study.runner import Options, closing_lines, run_sweep

    cells = run_sweep(plan, storage, Options(workers, keep_checkpoints, prune, retry_failed))
    for line in closing_lines(plan, cells):
        echo(line)
    if any(cell.state == "failed" for cell in cells.values()):
        raise typer.Exit(1)


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check RECIPE and print every problem at once, without loading the backbone or the data."""
    from tokmask_peft.model.location import check_length, config_at_hand

    whole = checked(recipe, overrides)
    check_length(whole, config_at_hand(whole.model))
    echo(f"{recipe} is valid: {whole.data.task} task on {whole.model.backbone}, run {whole.run_dir}")


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help=GPU)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bytes as JSON.")] = False,
) -> None:
    """Estimate how much memory RECIPE takes, whether it fits, and what to change; no weights are needed."""
    whole = checked(recipe, overrides)
    quiet_libraries()
    from tokmask_peft.training.memory import without_training

    found = without_training(whole, gpu)
    if as_json:
        echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_forecast(found)


def print_forecast(found: Forecast) -> None:
    """Print the bytes, whether they fit, and what would save some."""
    from rich.markup import escape
    from rich.table import Column, Table

    from tokmask_peft.console import make_console
    from tokmask_peft.model.memory.estimate import PARTS, USABLE, shown

    console, setting, memory, model = make_console(), found.setting, found.memory, found.recipe.model
    say = functools.partial(console.print, markup=False)
    precision = "bf16" if found.to_dict()["precision"] == "bfloat16" else "fp32"
    device = f"{model.backbone} on {setting.device_type}, {precision}, quantization {setting.quantization}"
    say(f"{device}, embedding {model.embedding}")
    if setting.assumed:
        say(setting.assumed)
    say(f"gradient checkpointing {found.decision.choice}: {found.decision.reason}")
    known = "of your texts" if found.shapes.known else "every text as long as data.max_length"
    say(f"largest batch: {found.shapes.largest} ({known})\n")
    columns = {"largest batch": found.largest, **({"usual batch": found.usual} if found.usual else {})}
    table = Table("what", *(Column(name, justify="right") for name in columns), "", box=None, padding=(0, 2, 0, 0))
    for part, about in PARTS.items():
        sizes = [column.parts.get(part) for column in columns.values()]
        if any(sizes):
            table.add_row(part, *(shown(size) if size else "-" for size in sizes), about)
    table.add_row("total", *(shown(column.total) for column in columns.values()), "", style="bold")
    console.print(table)
    if found.largest.host:
        say(f"and {shown(found.largest.host)} of the host's memory, for the embedding")
    checked = "" if setting.device_type == "cpu" else ", which has not been checked on a GPU yet"
    say(f"The tensors of a real step should be within {found.margin:.0%} of this{checked}.\n")
    if memory is None:
        say(f"The memory of this {setting.device_type} is unknown.")
        return
    verdict = "It fits" if found.fits else "It does NOT fit"
    console.print(f"[bold]{verdict}[/bold]: {escape(str(memory))}, of which {USABLE:.0%} are counted on.")
    if found.suggestions:
        say("What would take less, with its total:")
    for one in found.suggestions:
        say(f"  {one}")
    if not found.fits and not any(one.fits for one in found.suggestions):
        say("Nothing here makes it fit: take a smaller backbone.")

"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokmask_peft import __version__
from tokmask_peft.errors import RunError, RunInterruptedError, TokmaskError


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

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="a run folder, an adapter folder, or a Hub id")]
BackboneOption = Annotated[
    str | None, typer.Option(help="load the backbone from this Hub id, folder or package:NAME/FOLDER")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cpu, …; a GPU if there is one")]
QuantizationOption = Annotated[str | None, typer.Option(help="nf4, int8 or none; as in training")]
PrecisionOption = Annotated[str | None, typer.Option(help="bf16 or fp32; as in training")]


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
    quiet_libraries()
    from tokmask_peft.training import fit

    fit.train(checked, resume=resume, quiet=quiet)


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="memory of a GPU, for example 6GB; default: this machine")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bytes as JSON.")] = False,
) -> None:
    """Say how much memory RECIPE takes, whether it fits, and what to change; no weights are needed."""
    from tokmask_peft.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    quiet_libraries()
    from tokmask_peft import memory_report
    from tokmask_peft.training.fits import without_training

    found = without_training(checked, gpu)
    if as_json:
        import json

        typer.echo(json.dumps(memory_report.to_dict(*found), indent=2))
    else:
        memory_report.print_report(*found)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart")],
    split: Annotated[str, typer.Option(help="train, validation or test; with --data, a split or file there")] = "test",
    data: Annotated[str | None, typer.Option(help="folder or file with other texts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    faithfulness: Annotated[
        bool, typer.Option("--faithfulness", help="Measure whether `tokmask explain` ranks words rightly, instead.")
    ] = False,
    against: Annotated[str | None, typer.Option(help="with --faithfulness: a p = 0 run of the same recipe")] = None,
    limit: Annotated[int, typer.Option(min=2, help="with --faithfulness: texts, drawn at random")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="with --faithfulness: of texts, orders and bootstrap")] = 0,
) -> None:
    """Score the adapter of RUN on one of its splits, or on other texts."""
    import json

    from tokmask_peft.training.run_folder import open_finished

    if against is not None and not faithfulness:
        raise typer.BadParameter("it goes with --faithfulness", param_hint="--against")
    for folder in (run, against):
        if folder is not None:
            open_finished(folder)  # before the libraries are loaded, which takes seconds
    quiet_libraries()
    if faithfulness:
        from tokmask_peft.inference import faithfulness as measure

        measured = measure.faithfulness(run, against, split=split, data=data, limit=limit, seed=seed)
        typer.echo(json.dumps(measured, indent=2) if as_json else "\n".join(measure.report_lines(measured)))
        return
    from tokmask_peft.console import make_console, print_scores
    from tokmask_peft.training.evaluate import evaluate as score

    result = score(run, split=split, data=data)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_scores(make_console(), {split: result})


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
    prune: Annotated[bool, typer.Option("--prune", help="Stop runs that fall below the median.")] = False,
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
    from tokmask_peft.study import sweep as running

    options = running.Options(workers, keep_checkpoints, prune, retry_failed)
    cells = running.run_sweep(plan, storage, options)
    for line in running.closing_lines(plan, cells):
        typer.echo(line)
    if running.failures(cells):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run or a sweep, such as runs/quickstart")],
    out: Annotated[
        Path | None, typer.Option(help="the page to write; report.html in the run folder if not given")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    examples: Annotated[
        bool, typer.Option("--examples/--no-examples", help="show the worst mistakes; needs the data and the backbone")
    ] = True,
    backbone: BackboneOption = None,
) -> None:
    """Write one HTML page of RUN: scores, curves, calibration, mistakes, data. It loads nothing from anywhere.

    Of a sweep: compare its arms; tables, a plot and statistics in RUN/report.
    """
    from tokmask_peft.report.record import is_run

    if (Path(run) / "sweep.json").is_file():
        from tokmask_peft.study.report import sweep_report

        paths = sweep_report(Path(run))
        typer.echo(paths.summary)
        typer.echo(f"Report: {paths.markdown}")
        return
    if not is_run(run):
        raise RunError(f"{run} is neither a run folder (it holds no recipe.yaml) nor a sweep (no sweep.json)")
    from tokmask_peft.report.make import prepare, report_run

    prepare(run, out)  # before the libraries are loaded, which takes seconds
    quiet_libraries()
    path, left_out = report_run(run, out, examples=examples, backbone=backbone)
    if left_out:
        typer.echo(f"Note: the page shows no mistakes: {left_out}", err=True)
    typer.echo(path)
    if show:
        typer.launch(str(path))


@app.command()
def demo(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="address to listen on; by default only for this machine")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port; else a free one from 7860 on")] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public link through gradio's servers.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, …; a GPU if there is one")] = None,
    backbone: BackboneOption = None,
) -> None:
    """Try MODEL in the browser: text in, label and coloured words out (needs the extra demo)."""
    from tokmask_peft.inference.saved import find_saved
    from tokmask_peft.report.demo import build, check_address, require_gradio, serve

    require_gradio()
    check_address(host, port)
    saved = find_saved(model, backbone)
    quiet_libraries()
    from tokmask_peft.inference.classifier import load

    serve(build(load(saved, device), Path(model).name), host, port, share=share, said=typer.echo)


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


def quiet_libraries() -> None:
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

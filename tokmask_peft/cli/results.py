"""Commands that look at runs: scores and pages, and what masking does to gradients, scores and influences."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tokmask_peft.cli.app import (
    LOOK,
    USE,
    BackboneOption,
    DeviceOption,
    ModelArgument,
    Overrides,
    RecipeArgument,
    TrustOption,
    app,
    checked,
    own_flags,
    read_columns,
)
from tokmask_peft.console import echo, make_console, print_classes, print_scores, quick_imports, quiet_libraries
from tokmask_peft.errors import RunError, require


@app.command(rich_help_panel=LOOK)
def diagnose(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    p: Annotated[str, typer.Option("--p", help="masking rates to measure at")] = "0,0.1,0.2,0.3",
    draws: Annotated[int, typer.Option(help="mask draws per batch")] = 16,
    batches: Annotated[int, typer.Option(help="batches of training texts")] = 8,
    at: Annotated[str, typer.Option(help="shares of the training at which to measure")] = "0,0.5,1",
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: runs/NAME-diagnose")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train RECIPE and measure what masking does to its gradients: variance, agreement, shift of the mean.

    The training uses the recipe's own masking rate and keeps no adapter; training.max_steps=60 makes it short.
    """
    from tokmask_peft.study.diagnostics.plans import GradientPlan

    whole = checked(recipe, overrides)
    plan = GradientPlan.make(whole, p, draws, batches, at, out)
    quiet_libraries()
    from tokmask_peft.study.diagnostics.gradients import diagnose as measure

    report = measure(whole, plan, quiet=quiet)
    if not quiet:
        echo(f"{report.summary}\nReport: {report.markdown}")


@app.command(rich_help_panel=LOOK)
def robustness(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="folders of finished runs, or of one sweep")],
    p: Annotated[str, typer.Option("--p", help="shares of sub-tokens to mask")] = "0,0.1,0.2,0.3,0.4,0.5",
    noise: Annotated[str, typer.Option(help="shares of words to misspell")] = "0,0.1,0.2,0.4",
    draws: Annotated[int, typer.Option(min=1, help="random draws of each; scores are their means")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="score at most this many texts, drawn at random")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of masks, misspellings and the choice of texts")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder to write to; default with one RUN: RUN/robustness")] = None,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
    trust_remote_code: TrustOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Score RUNs on masked and misspelt test texts and on unseen words, and compare them by masking rate.

    Runs that differ only in their seed share a line, with an interval. A run that was scored in the same way before is
    not scored again.
    """
    from tokmask_peft.study.diagnostics.plans import Perturbations, find_members, folder_of

    what = Perturbations.make(p, noise, draws, seed, limit)
    folder = folder_of(out, Path(runs[0]) / "robustness" if len(set(runs)) == 1 else None)
    members = find_members(runs)
    quiet_libraries()
    from tokmask_peft.study.diagnostics.robustness import robustness as measure

    report = measure(
        members, what, folder, backbone=backbone, device=device, quiet=quiet, trust_remote_code=trust_remote_code
    )
    if not quiet:
        echo(f"{report.summary}\nReport: {report.markdown}")


@app.command(rich_help_panel=LOOK)
def faithfulness(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")],
    against: Annotated[str | None, typer.Option(help="a run of the same recipe with p = 0, to compare with")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test (the default); with --data, a split or file there")
    ] = None,
    data: Annotated[str | None, typer.Option(help="folder or file with other texts")] = None,
    limit: Annotated[int, typer.Option(min=2, help="number of texts, drawn at random")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="seed of the choice of texts, random orders and bootstrap")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="masked texts per forward pass")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure whether `tokmask explain` ranks words correctly for RUN: mask the most influential words first."""
    from tokmask_peft.artifacts import open_finished

    for folder in (run, against):
        if folder is not None:
            open_finished(folder)  # before the libraries are loaded, which takes seconds
    quiet_libraries()
    from tokmask_peft.study.diagnostics.faithfulness import faithfulness as measure
    from tokmask_peft.study.diagnostics.faithfulness import report_text

    found = measure(
        run,
        against,
        split=split,
        data=data,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    echo(json.dumps(found, indent=2) if as_json else report_text(found))


@app.command(rich_help_panel=LOOK)
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")],
    split: Annotated[
        str | None, typer.Option(help="train, validation or test (the default); with a folder as DATA, a split in it")
    ] = None,
    data: Annotated[str | None, typer.Option(help="a file with other labelled texts, or a folder")] = None,
    format: Annotated[
        str | None, typer.Option(help="format of DATA, if neither its ending nor the run says it, for example tsv")
    ] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="text column of DATA: a name, or a number from 0; twice for pairs")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="label column of DATA: a name, or a number from 0")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="texts per forward pass; as in training")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Score the adapter of RUN on one of its splits, or on other texts."""
    from tokmask_peft.artifacts import open_finished

    folder = open_finished(run)  # before the libraries are loaded, which takes seconds
    with quick_imports():
        from tokmask_peft.recipe.schema import Recipe
        from tokmask_peft.training.evaluate import evaluate as score

    flags = {"text_column": "--text-column", "label_column": "--label-column", "format": "--format"}
    with own_flags(flags if data is not None else {}):
        result = score(
            run,
            split=split,
            data=data,
            format=format,
            text_column=read_columns(text_column, Recipe.load(folder.recipe).data.pair, "--text-column"),
            label_column=label_column,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        console, name = make_console(), split or Path(data or "test").name
        print_scores(console, {name: result})
        print_classes(console, name, result)
        for reason in (*result.get("warnings", ()), *result.get("not_as_trained", ())):
            console.print(f"Caution: {reason}", markup=False)


@app.command(rich_help_panel=LOOK)
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="the folder of a run or a sweep, for example runs/quickstart")
    ],
    out: Annotated[Path | None, typer.Option(help="the page to write; default: report.html in the run folder")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    examples: Annotated[bool, typer.Option(help="show the worst mistakes; needs the data and the backbone")] = True,
    backbone: BackboneOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write one HTML page about RUN: scores, curves, calibration, mistakes, data. The page loads nothing.

    For a sweep: compare its arms, on a page, and with tables, a plot and statistics in RUN/report.
    """
    from tokmask_peft.artifacts import is_run

    if (Path(run) / "sweep.json").is_file():
        from tokmask_peft.study.report import sweep_report

        paths = sweep_report(Path(run), out)
        echo(f"{paths.summary}\nReport: {paths.markdown}\nPage: {paths.page}")
        if show:
            typer.launch(str(paths.page))
        return
    if not is_run(run):
        problem = "is neither a run (recipe.yaml is missing) nor a sweep (sweep.json is missing)"
        raise RunError(f"{run} {problem}", code="not-a-run")
    from tokmask_peft.report.page import prepare, report_run

    prepare(run, out)  # before the libraries are loaded, which takes seconds
    quiet_libraries()
    path, left_out = report_run(run, out, examples=examples, backbone=backbone, trust_remote_code=trust_remote_code)
    if left_out:
        echo(f"Note: the page shows no mistakes: {left_out}", err=True)
    echo(path)
    if show:
        typer.launch(str(path))


@app.command(rich_help_panel=USE)
def demo(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="address to listen on; the default serves this machine only")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port; default: a free one from 7860 on")] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public link through gradio's servers.")] = False,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Try MODEL in the browser: text in, label and coloured words out (needs the extra demo)."""
    from tokmask_peft.artifacts import find_saved
    from tokmask_peft.report.demo import build, check_address, launch, of_run

    require("gradio", "demo", "the demo")
    check_address(host, port)
    saved = find_saved(model, backbone, trust_remote_code=trust_remote_code)
    with quick_imports():
        from tokmask_peft.inference.classifier import load

    app = build(load(saved, device), Path(model).name, *of_run(model))
    _, url, public = launch(app, host, port, share=share)
    echo(f"The demo runs at {public or url} (Ctrl-C stops it)")
    app.block_thread()

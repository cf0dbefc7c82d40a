"""Commands that look at a run: `evaluate`, `report`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokmask_peft.cli.app import BackboneOption, DeviceOption, ModelArgument, app
from tokmask_peft.console import quiet_libraries
from tokmask_peft.errors import RunError


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")],
    split: Annotated[str, typer.Option(help="train, validation or test; with --data, a split or file there")] = "test",
    data: Annotated[str | None, typer.Option(help="folder or file with other texts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="texts per forward pass; as in training")] = None,
) -> None:
    """Score the adapter of RUN on one of its splits, or on other texts."""
    import json

    from tokmask_peft.artifacts import open_finished

    open_finished(run)  # before the libraries are loaded, which takes seconds
    quiet_libraries()
    from tokmask_peft.console import make_console, print_scores
    from tokmask_peft.training.evaluate import evaluate as score

    result = score(run, split=split, data=data, batch_size=batch_size)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        console = make_console()
        print_scores(console, {split: result})
        for reason in result.get("not_as_trained", ()):
            console.print(f"Caution: {reason}", markup=False)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run or a sweep, as runs/quickstart")],
    out: Annotated[Path | None, typer.Option(help="the page to write; default: report.html in the run folder")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    examples: Annotated[
        bool, typer.Option("--examples/--no-examples", help="show the worst mistakes; needs the data and the backbone")
    ] = True,
    backbone: BackboneOption = None,
) -> None:
    """Write one HTML page about RUN: scores, curves, calibration, mistakes, data. The page loads nothing.

    For a sweep: compare its arms, with tables, a plot and statistics in RUN/report.
    """
    from tokmask_peft.artifacts import is_run

    if (Path(run) / "sweep.json").is_file():
        from tokmask_peft.study.report import sweep_report

        paths = sweep_report(Path(run))
        typer.echo(f"{paths.summary}\nReport: {paths.markdown}")
        return
    if not is_run(run):
        raise RunError(
            f"{run} is neither a run (recipe.yaml is missing) nor a sweep (sweep.json is missing)", code="not-a-run"
        )
    from tokmask_peft.report.page import prepare, report_run

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
    host: Annotated[str, typer.Option(help="address to listen on; the default serves this machine only")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port; default: a free one from 7860 on")] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public link through gradio's servers.")] = False,
    device: DeviceOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Try MODEL in the browser: text in, label and coloured words out (needs the extra demo)."""
    from tokmask_peft.artifacts import find_saved
    from tokmask_peft.report.demo import build, check_address, require_gradio, serve

    require_gradio()
    check_address(host, port)
    saved = find_saved(model, backbone)
    quiet_libraries()
    from tokmask_peft.inference.classifier import load

    serve(build(load(saved, device), Path(model).name), host, port, share=share, report=typer.echo)

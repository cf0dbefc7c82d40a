"""Commands that use an adapter: `predict`, `explain`, `export`, `push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tokmask_peft.cli.app import BackboneOption, DeviceOption, ModelArgument, PrecisionOption, QuantizationOption, app
from tokmask_peft.console import quiet_libraries
from tokmask_peft.errors import write_whole
from tokmask_peft.tasks import get_task


@app.command()
def predict(
    model: ModelArgument,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="texts to classify")] = None,
    file: Annotated[Path | None, typer.Option(help="classify a file: txt, csv, tsv, jsonl, parquet or conll")] = None,
    out: Annotated[Path | None, typer.Option(help="with --file: the JSON lines to write")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    format: Annotated[str, typer.Option(help="format of the file; auto chooses by its ending")] = "auto",
    column: Annotated[str | None, typer.Option(help="column of the text, or of the words in token tasks")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per TEXT.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per forward pass")] = 32,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    precision: PrecisionOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Classify TEXTs, or the texts of a file, with MODEL.

    MODEL is a run folder, an adapter folder, or the id of an adapter on the Hub.
    """
    from tokmask_peft.artifacts import find_saved

    if (file is None) == (not texts):
        raise typer.BadParameter("give either texts or --file", param_hint="TEXT")
    if (file is None) != (out is None):
        raise typer.BadParameter("--file and --out go together", param_hint="--out")
    saved = find_saved(model, backbone)  # before the libraries are loaded, which takes seconds
    source = None
    if file is not None and out is not None:
        from tokmask_peft.data.readers import TextFile
        from tokmask_peft.inference.export import check_output

        source = TextFile(file, saved.task, format, column)
        check_output(out, file, force)
    quiet_libraries()
    from tokmask_peft.inference import display as show
    from tokmask_peft.inference.classifier import load

    classifier = load(saved, device, quantization, precision)
    if source is None or out is None:
        show.print_answers(texts or [], classifier.predict(texts or [], batch_size), as_json)
    else:
        show.predict_with_bar(classifier, source, out, force, batch_size)


@app.command()
def explain(
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="texts to explain")],
    word: Annotated[str | None, typer.Option(help="token tasks: the word to explain, or its number")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page that can be shared")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per TEXT.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="masked texts per forward pass")] = 32,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    precision: PrecisionOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Show which words of TEXTs support or contradict MODEL's label, by masking each as in training.

    A word's influence is the drop of the label's log-odds when the word is masked, in nats; next to it is the label's
    probability without the word. In word-level tasks each word's label is explained by masking the word itself.
    """
    from tokmask_peft.artifacts import find_saved
    from tokmask_peft.inference.explain import find_word
    from tokmask_peft.inference.export import check_output

    saved = find_saved(model, backbone)  # before the libraries are loaded, which takes seconds
    chosen = int(word) if word is not None and word.removeprefix("-").isdecimal() else word
    if chosen is not None and not get_task(saved.task).words_given:
        problem = f"{model} gives {get_task(saved.task).description}; --word is for word-level tasks"
        raise typer.BadParameter(problem, param_hint="--word")
    for number, text in enumerate(texts if chosen is not None else (), start=1):
        find_word(text.split(), chosen, f"text {number}")  # type: ignore[arg-type]
    if html is not None:
        check_output(html, None, force)
    quiet_libraries()
    from rich.console import Console

    from tokmask_peft.inference import display as show
    from tokmask_peft.inference.classifier import load

    classifier = load(saved, device, quantization, precision)
    explanations = classifier.explain(texts, word=chosen, batch_size=batch_size)
    note = classifier.occlusion.note
    if as_json:
        show.print_json(explanations)
    else:
        show.print_explanations(explanations, Console(highlight=False))
        typer.echo(f"Note: {note}.", err=True)
    if html is not None:
        name = Path(model).name if Path(model).exists() else model  # the page may be shared: no local path
        write_whole(html, show.explanations_page(name, explanations, note))
        typer.echo(f"Page: {html}", err=True)


@app.command()
def export(
    model: ModelArgument,
    merged: Annotated[Path, typer.Option(help="the folder to make")],
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the saved weights")] = "fp32",
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx (extra onnx) and compare it.")] = False,
    backbone: BackboneOption = None,
) -> None:
    """Merge MODEL into its backbone: a plain transformers model for pipeline(), without PEFT."""
    from tokmask_peft.artifacts import find_saved
    from tokmask_peft.inference.export import check_folder

    saved = find_saved(model, backbone)
    check_folder(merged)
    quiet_libraries()
    from tokmask_peft.inference.export import export_merged

    done = export_merged(saved, merged, precision=precision, onnx=onnx)
    typer.echo(f"{done.folder}: logits differ from the adapter's by at most {done.difference:.1e}")
    if done.onnx is not None:
        typer.echo(f"{done.folder / 'model.onnx'}: onnxruntime's logits differ from those by at most {done.onnx:.1e}")
    for note in done.notes:
        typer.echo(f"Note: {note}.")


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository on the Hub; created if missing")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Push a plain transformers model, merged.")] = False,
) -> None:
    """Push the adapter of RUN with its model card to the Hugging Face Hub (log in with: hf auth login)."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # its retries print addresses that are signed
    if not sys.stderr.isatty():
        disable_progress_bars()
    if merged:
        quiet_libraries()
    from tokmask_peft.inference.export import push as push_run

    push_run(run, repo, private, merged=merged)

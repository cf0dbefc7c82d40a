"""Commands that make an adapter (`train`, `sweep`), look ahead (`validate`, `estimate`), and use one."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tokmask_peft.cli.app import (
    TRAIN,
    USE,
    BackboneOption,
    DeviceOption,
    ModelArgument,
    Overrides,
    PrecisionOption,
    QuantizationOption,
    RecipeArgument,
    TrustOption,
    app,
    checked,
    open_texts,
    own_flags,
    read_columns,
    with_flags,
)
from tokmask_peft.cli.start import print_data, recipe_of
from tokmask_peft.console import SafeConsole, echo, make_console, quick_imports, quiet_libraries
from tokmask_peft.errors import write_whole
from tokmask_peft.examples import Pair
from tokmask_peft.tasks import get_task

if TYPE_CHECKING:
    from tokmask_peft.artifacts import SavedAdapter
    from tokmask_peft.training.memory import Forecast

ARMS = (
    "compare regularizers: none, lora_dropout, attention_dropout, neftune, label_smoothing, views, mask; ways to mask: "
    "drop, random, own, unk, trained, anneal, share, overfit, with a strength as drop:0.1; and combinations such as "
    "mask+neftune, separated by commas"
)
RecipeOrData = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="a YAML file, the name of a shipped recipe, a data file or folder, or a dataset of the Hub",
    ),
]
GPU = (
    "memory of a GPU, for example 6GB; it is assumed to have bf16 (for T4, V100, GTX 16 and RTX 20 add "
    "model.precision=fp16, for GTX 10 fp32); default: this machine"
)


@app.command(rich_help_panel=TRAIN)
def train(
    recipe: RecipeOrData,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With data: never ask.")] = False,
) -> None:
    """Train an adapter as RECIPE says, or as `init` would for data; the run is saved in runs/NAME."""
    whole = recipe_of(recipe, overrides or [], resume=resume, quiet=quiet, yes=yes)
    with quick_imports():
        from tokmask_peft.training import train as run

    run.train(whole, resume=resume, quiet=quiet)


@app.command(rich_help_panel=TRAIN)
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    p: Annotated[str | None, typer.Option("--p", help="masking rates, for example 0,0.1,0.2")] = None,
    seeds: Annotated[str, typer.Option(help="how many seeds (5 means 1 to 5), or which: 11,12,13")] = "5",
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="a key and its values, for example training.epochs=3,6; repeatable"),
    ] = None,
    arms: Annotated[str | None, typer.Option(help=ARMS)] = None,
    name: Annotated[str | None, typer.Option(help="name of the sweep; its folder is runs/NAME")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="database to share with other machines; default: a file")
    ] = None,
    sampler: Annotated[str, typer.Option(help="grid, random or tpe")] = "grid",
    trials: Annotated[int | None, typer.Option(help="number of runs, with random and tpe")] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Stop runs that are below the median; this biases the report of a grid.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="number of runs at once on this machine")] = 1,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of finished runs.")
    ] = False,
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


@app.command(rich_help_panel=TRAIN)
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="Read the data, too: paths, columns, labels, lengths.")] = False,
) -> None:
    """Check RECIPE and print every problem at once, without loading the backbone."""
    from tokmask_peft.model.location import check_length, config_at_hand

    whole = checked(recipe, overrides)
    check_length(whole, config_at_hand(whole.model))
    if data:
        print_data(whole)
    echo(f"{recipe} is valid: {whole.data.task} task on {whole.model.backbone}, run {whole.run_dir}")


@app.command(rich_help_panel=TRAIN)
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help=GPU)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the bytes as JSON.")] = False,
) -> None:
    """Estimate how much memory RECIPE takes, whether it fits, and what to change; no weights are needed."""
    whole = checked(recipe, overrides)
    with quick_imports():
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

    from tokmask_peft.model.decisions import PRECISIONS
    from tokmask_peft.model.memory.estimate import PARTS, USABLE, shown

    console, setting, memory, model = make_console(), found.setting, found.memory, found.recipe.model
    say = functools.partial(console.print, markup=False)
    held = f"{PRECISIONS[setting.dtype]}, quantization {setting.quantization}, embedding {model.embedding}"
    say(f"{model.backbone} on {setting.device_type}, {held}")
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
    console.print(f"[bold]{verdict}[/bold]: {escape(str(memory))}, of which a run can use {USABLE:.0%}.")
    if found.suggestions:
        say("What would take less memory, with the new total:")
    for one in found.suggestions:
        say(f"  {one}")
    if not found.fits and not any(one.fits for one in found.suggestions):
        say("Nothing here makes it fit: take a smaller backbone.")


@app.command(rich_help_panel=USE)
def predict(
    model: ModelArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="texts to classify; - reads standard input, as does a pipe"),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="a file to classify: txt, csv, tsv, xlsx, jsonl, parquet, conll; or one in a zip or gz"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="the file to write: a csv, tsv, parquet or xlsx with all columns of the input, or jsonl"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    format: Annotated[
        str, typer.Option(help="format of the file; auto: by its ending, and txt for standard input")
    ] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            "--text-column",
            help="name or number of the column of the text, or of the words; twice for pairs, if the columns are "
            "not those of training",
        ),
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="for a table with a word in each row: the column that says which text it is in")
    ] = None,
    header: Annotated[
        Literal["auto", "true", "false"], typer.Option(help="whether a CSV or TSV file has one; auto: from its cells")
    ] = "auto",
    separator: Annotated[
        str, typer.Option(help="of the columns: one character, or tab; auto: what fits most rows")
    ] = "auto",
    encoding: Annotated[str, typer.Option(help="of a text file, for example cp1252; auto: from its bytes")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each text.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per forward pass")] = 32,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    precision: PrecisionOption = None,
    backbone: BackboneOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Classify TEXTs, the texts of a file, or those of standard input, with MODEL.

    A model of pairs takes two TEXTs for each answer, or a file with two columns of texts.

    MODEL is a run folder, an adapter folder, or the id of an adapter on the Hub. A table has a row for each row of the
    input: its columns, then label and confidence; a column of that name in the input stays, and the new one is called
    predicted_label or predicted_confidence.
    """
    from tokmask_peft.artifacts import find_saved

    if file is None and (texts == ["-"] or (not texts and not sys.stdin.isatty())):
        file, texts = Path("-"), None
    if (file is None) == (not texts):
        raise typer.BadParameter("give texts, or --file, or pipe texts into the command", param_hint="TEXT")
    if file is None and out is not None:
        raise typer.BadParameter("it goes with --file or standard input", param_hint="--out")
    # before the libraries are loaded, which takes seconds
    saved = find_saved(model, backbone, trust_remote_code=trust_remote_code)
    given = as_given(texts or [], saved)
    flags = {"text_column": "--column", "group_column": "--group-column", "format": "--format", "header": "--header"}
    flags |= {"separator": "--separator", "encoding": "--encoding"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_flags(flags))
        source = None
        if file is not None:
            from tokmask_peft.data.readers import TextFile

            path, name = file, None
            if str(file) == "-" or (file.exists() and not file.is_file() and not file.is_dir()):
                name = "stdin" if str(file) == "-" else str(file)
                path = _saved_input(stack.enter_context(TemporaryDirectory()), file, format)
                if not path.stat().st_size:
                    raise typer.BadParameter(f"{name} is empty: give texts, or --file", param_hint="TEXT")
            more: dict[str, Any] = {"separator": separator, "encoding": encoding, "name": name}
            columns = read_columns(column, saved.info.pair, "--column") or saved.info.pair
            has_header = {"true": True, "false": False}.get(header, header)
            asked = {"format": format, "text_column": columns, "header": has_header}
            read = functools.partial(TextFile, path, saved.info.task, **more)
            source = open_texts(model, asked | {"group_column": group_column}, read)
            source.worded = functools.partial(with_flags, flags=flags)
            reasons = [replace(one, reason=with_flags(one.reason, flags)) for one in source.decisions]
            source.decisions = tuple(reasons)
        if out is not None:
            from tokmask_peft.inference.export import check_output
            from tokmask_peft.inference.files import form_of

            check_output(out, file, force)
            form_of(out)
        with quick_imports():
            from tokmask_peft.inference import display as show
            from tokmask_peft.inference.classifier import load

        classifier = load(saved, device, quantization, precision)
        if source is None:
            show.print_answers(given, classifier.predict(given, batch_size), as_json)
        elif out is None:
            show.print_file(classifier, source, as_json, batch_size)
        else:
            show.predict_with_bar(classifier, source, out, force, batch_size)


def as_given(texts: list[str], saved: SavedAdapter) -> list[Any]:
    """Return the TEXTs of a command as the classifier takes them: as they are, or two by two."""
    if saved.info.pair is None:
        return list(texts)
    if len(texts) % 2:
        problem = f"{saved.name} reads pairs ({' and '.join(saved.info.pair)}): give two texts for each answer"
        raise typer.BadParameter(problem, param_hint="TEXT")
    return [Pair(first, second) for first, second in zip(texts[::2], texts[1::2], strict=True)]


def _saved_input(folder: str, file: Path, format: str) -> Path:
    """Return a file with what a pipe or standard input (`-`) gives: a reader looks ahead, and reads it twice."""
    path = Path(folder) / f"stdin.{format if format != 'auto' and format.isalnum() else 'txt'}"
    with sys.stdin.buffer if str(file) == "-" else file.open("rb") as given, path.open("wb") as taken:
        shutil.copyfileobj(given, taken)
    return path


@app.command(rich_help_panel=USE)
def explain(
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="texts to explain")],
    word: Annotated[str | None, typer.Option(help="token tasks: the word to explain, or its number")] = None,
    label: Annotated[str | None, typer.Option(help="other tasks: the label to explain, if not the likeliest")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page that can be shared")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per TEXT.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="masked texts per forward pass")] = 32,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    precision: PrecisionOption = None,
    backbone: BackboneOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show which words of TEXTs support or contradict MODEL's label, by masking each as in training.

    A word's influence is the drop of the label's log-odds when the word is masked, in nats; next to it is the label's
    probability without the word. In word-level tasks each word's label is explained by masking the word itself.
    """
    from tokmask_peft.artifacts import find_saved
    from tokmask_peft.inference.explain import find_word
    from tokmask_peft.inference.export import check_output

    # before the libraries are loaded, which takes seconds
    saved = find_saved(model, backbone, trust_remote_code=trust_remote_code)
    chosen = int(word) if word is not None and word.removeprefix("-").isdecimal() else word
    if chosen is not None:
        if not get_task(saved.info.task).words_given:
            problem = f"{model} gives {get_task(saved.info.task).description}; --word is for word-level tasks"
            raise typer.BadParameter(problem, param_hint="--word")
        for number, text in enumerate(texts, start=1):
            find_word(text.split(), chosen, f"text {number}")
    if html is not None:
        check_output(html, None, force)
    given = as_given(texts, saved)
    with quick_imports():
        from tokmask_peft.inference import display as show
        from tokmask_peft.inference.classifier import load

    classifier = load(saved, device, quantization, precision)
    explanations = classifier.explain(given, word=chosen, label=label, batch_size=batch_size)
    note = classifier.occlusion.note
    if as_json:
        show.print_json(explanations)
    else:
        show.print_explanations(explanations, SafeConsole(highlight=False))
        echo(f"Note: {note}.", err=True)
    if html is not None:
        name = Path(model).name if Path(model).exists() else model  # the page may be shared: no local path
        write_whole(html, show.explanations_page(name, explanations, note))
        echo(f"Page: {html}", err=True)


@app.command(rich_help_panel=USE)
def export(
    model: ModelArgument,
    merged: Annotated[Path, typer.Option(help="the folder to make")],
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the saved weights")] = "fp32",
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write model.onnx and check its logits (needs the extra onnx).")
    ] = False,
    backbone: BackboneOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Merge MODEL into its backbone: a plain transformers model for pipeline(), without PEFT."""
    from tokmask_peft.artifacts import find_saved
    from tokmask_peft.inference.export import check_folder

    saved = find_saved(model, backbone, trust_remote_code=trust_remote_code)
    check_folder(merged)
    with quick_imports():
        from tokmask_peft.inference.export import export_merged

    done = export_merged(saved, merged, precision=precision, onnx=onnx)
    echo(f"{done.folder}: logits differ from the adapter's by at most {done.difference:.1e}")
    if done.onnx is not None:
        echo(f"{done.folder / 'model.onnx'}: onnxruntime's logits differ from those by at most {done.onnx:.1e}")
    for note in done.notes:
        echo(f"Note: {note}.")


@app.command(rich_help_panel=USE)
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository on the Hub; created if missing")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Push a plain transformers model, merged.")] = False,
    trust_remote_code: TrustOption = False,
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

    push_run(run, repo, private, merged=merged, trust_remote_code=trust_remote_code)

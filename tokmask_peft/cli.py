"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokmask_peft import __version__
from tokmask_peft.errors import RunInterruptedError, TokmaskError


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
    _quiet_libraries()
    from tokmask_peft.training import fit

    fit.train(checked, resume=resume, quiet=quiet)


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
    _quiet_libraries()
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
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, such as runs/quickstart")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository on the Hub; made if there is none")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Push a plain transformers model, the adapter merged in.")
    ] = False,
) -> None:
    """Push the adapter of RUN with its model card to the Hugging Face Hub (log in with: hf auth login)."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    from tokmask_peft import hub

    set_verbosity_error()  # its retries print addresses that are signed
    if not sys.stderr.isatty():
        disable_progress_bars()
    if merged:
        _quiet_libraries()
    hub.push(run, repo, private, merged=merged)


@app.command()
def predict(
    model: ModelArgument,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="texts to classify")] = None,
    file: Annotated[Path | None, typer.Option(help="classify a file: txt, csv, tsv, jsonl, parquet or conll")] = None,
    out: Annotated[Path | None, typer.Option(help="with --file: the JSON lines to write")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    format: Annotated[str, typer.Option(help="format of the file; auto goes by its ending")] = "auto",
    column: Annotated[str | None, typer.Option(help="column of the text, or of the words in token tasks")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per TEXT.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per forward pass; changes no answer")] = 32,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    precision: PrecisionOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Classify TEXTs, or the texts of a file, with MODEL.

    MODEL is a run folder, an adapter folder, or the id of an adapter on the Hub.
    """
    from tokmask_peft.inference.saved import find_saved

    if (file is None) == (not texts):
        raise typer.BadParameter("give either texts or --file", param_hint="TEXT")
    if (file is None) != (out is None):
        raise typer.BadParameter("--file and --out go together", param_hint="--out")
    saved = find_saved(model, backbone)  # before the libraries are loaded, which takes seconds
    source = None
    if file is not None and out is not None:
        from tokmask_peft.data.texts import TextFile
        from tokmask_peft.inference.outputs import check_output

        source = TextFile(file, saved.task, format, column)
        check_output(out, file, force)
    _quiet_libraries()
    from tokmask_peft.inference import show
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
    word: Annotated[
        str | None, typer.Option(help="token tasks: explain the label of this word (its number from 0, or itself)")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write a page that can be shared")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per TEXT.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="masked texts per forward pass; changes no answer")] = 32,
    device: DeviceOption = None,
    quantization: QuantizationOption = None,
    precision: PrecisionOption = None,
    backbone: BackboneOption = None,
) -> None:
    """Say which words of TEXTs MODEL's label rests on, by masking each as in training.

    A word's influence is how far the log-odds of the label fall when it is masked, in nats; beside it stands the
    label's probability without the word. In word-level tasks each word's label is explained by masking the word itself.
    """
    from tokmask_peft.inference.chosen_word import find_word
    from tokmask_peft.inference.outputs import check_output
    from tokmask_peft.inference.saved import find_saved

    saved = find_saved(model, backbone)  # before the libraries are loaded, which takes seconds
    chosen = int(word) if word is not None and word.removeprefix("-").isdecimal() else word
    if chosen is not None and saved.task == "sequence":
        raise typer.BadParameter(
            f"{model} gives one label per text; --word is for word-level tasks", param_hint="--word"
        )
    for number, text in enumerate(texts if chosen is not None else (), start=1):
        find_word(text.split(), chosen, f"text {number}")  # type: ignore[arg-type]
    if html is not None:
        check_output(html, None, force)
    _quiet_libraries()
    from rich.console import Console

    from tokmask_peft.inference import show_explanations
    from tokmask_peft.inference.classifier import load

    classifier = load(saved, device, quantization, precision)
    explanations = classifier.explain(texts, word=chosen, batch_size=batch_size)
    note = classifier.occlusion.note
    if as_json:
        show_explanations.print_json(explanations)
    else:
        show_explanations.print_explanations(explanations, Console(highlight=False))
        typer.echo(f"Note: {note}.", err=True)
    if html is not None:
        from tokmask_peft.inference.explain_page import explanations_page

        name = Path(model).name if Path(model).exists() else model  # the page is made to be shared: no local path
        html.write_text(explanations_page(name, explanations, note), encoding="utf-8")
        typer.echo(f"Page: {html}", err=True)


@app.command()
def export(
    model: ModelArgument,
    merged: Annotated[Path, typer.Option(help="the folder to make")],
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the saved weights")] = "fp32",
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx, too (extra onnx), and compare it.")] = False,
    backbone: BackboneOption = None,
) -> None:
    """Merge MODEL into its backbone: a plain transformers model for pipeline(), without PEFT."""
    from tokmask_peft.inference.outputs import check_folder
    from tokmask_peft.inference.saved import find_saved

    saved = find_saved(model, backbone)
    check_folder(merged)
    _quiet_libraries()
    from tokmask_peft.inference.export import export_merged

    done = export_merged(saved, merged, precision=precision, onnx=onnx)
    typer.echo(f"{done.folder}: logits differ from the adapter's by at most {done.difference:.1e}")
    if done.onnx is not None:
        typer.echo(f"{done.folder / 'model.onnx'}: onnxruntime's logits differ from those by at most {done.onnx:.1e}")
    for note in done.notes:
        typer.echo(f"Note: {note}.")


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


def _quiet_libraries() -> None:
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

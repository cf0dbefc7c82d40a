"""What `push --merged` sends: a plain transformers model, with a card that says so."""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tokmask_peft.recipe.schema import Recipe, SourceConfig, Task

PIPELINES: dict[Task, str] = {"sequence": "text-classification", "token": "token-classification"}
_METRICS = {
    "f1_macro": ("f1", "macro-F1", {"average": "macro"}),
    "f1_weighted": ("f1", "weighted F1", {"average": "weighted"}),
    "accuracy": ("accuracy", "accuracy", None),
}


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What may be said in public about where texts come from: never a path.

    Attributes:
        name: what the corpus is called.
        hub: its id on the Hub, if the texts were read from there.
        language: ISO 639 codes.
        license: as its source states it.
        citation: what to cite.
    """

    name: str
    hub: str | None
    language: tuple[str, ...]
    license: str | None
    citation: str | None

    @classmethod
    def of(cls, source: SourceConfig) -> Self:
        """Read the facts off a recipe; the built-in corpus knows its own."""
        if source.path is None and source.hub is None:
            name = "the built-in corpus of tokmask-peft: made-up Spanish-English posts, no benchmark"
            return cls(name, None, ("es", "en"), "Apache-2.0", None)
        hub = source.hub if source.path is None else None
        name = source.name or hub or "a local corpus without a name (data.name)"
        return cls(name, hub, source.language, source.license, source.citation)


def hub_id(backbone: str) -> str | None:
    """Return the backbone if it can be an id on the Hub, None if it is a place on this machine."""
    try:
        validate_repo_id(backbone)
    except HFValidationError:
        return None
    return None if Path(backbone).exists() else backbone


def card_data(recipe: Recipe, result: Mapping[str, Any], merged: bool = False) -> ModelCardData:
    """Return the head of the card; of the adapter, or of a plain model with the adapter merged in.

    Scores go into the model index only when they are of a test split: validation chose the checkpoint.
    """
    facts = CorpusFacts.of(recipe.data)
    tested = CorpusFacts.of(recipe.data.test_source) if recipe.data.test_source else facts
    results = _eval_results(recipe, tested, result["test"]) if result.get("test") else None
    backbone = hub_id(recipe.model.backbone)
    return ModelCardData(
        language=list(dict.fromkeys([*facts.language, *tested.language])) or None,
        license=recipe.adapter.license,
        library_name="transformers" if merged else "peft",
        base_model=backbone,
        base_model_relation=("finetune" if merged else "adapter") if backbone else None,
        pipeline_tag=PIPELINES[recipe.data.task],
        datasets=list(dict.fromkeys(corpus.hub for corpus in (facts, tested) if corpus.hub)) or None,
        tags=[*([] if merged else ["lora"]), "token-masking", "tokmask-peft"],
        metrics=["f1", "accuracy"],
        model_name=recipe.name if results else None,
        eval_results=results,
    )


def _eval_results(recipe: Recipe, corpus: CorpusFacts, part: Mapping[str, Any]) -> list[EvalResult]:
    source = recipe.data.test_source or recipe.data
    return [
        EvalResult(
            task_type=PIPELINES[recipe.data.task],
            dataset_type=corpus.hub or re.sub(r"\W+", "-", corpus.name.lower()).strip("-"),
            dataset_name=corpus.name,
            dataset_config=source.hub_config if corpus.hub else None,
            dataset_revision=source.hub_revision if corpus.hub else None,
            dataset_split=recipe.data.test,
            metric_type=kind,
            metric_name=name,
            metric_args=arguments,
            metric_value=round(part[key], 4),
        )
        for key, (kind, name, arguments) in _METRICS.items()
    ]


PICTURE = "confusion_matrix.png"
SCORES = ("f1_macro", "f1_weighted", "accuracy")
_TABLE_LABELS = 12  # a wider table is unreadable
_NUMBERED_LABELS = 24  # beyond, the cells of the picture are too small for numbers


def score_table(result: Mapping[str, Any], seeds: Sequence[Mapping[str, float]] = ()) -> str:
    """Return the scores per split, the baseline's, and the spread over seeds.

    Args:
        result: what `result.json` holds.
        seeds: test scores of runs that differ only in their seed, this run's among them.
    """
    rows = ["| split | macro-F1 | weighted F1 | accuracy |", "|---|---|---|---|"]
    names = {"validation": "validation (selected the checkpoint)", "test": "test"}
    if floor := result.get("baseline"):
        names["baseline"] = f"baseline: {floor['method']}"
    for key, name in names.items():
        if part := result.get(key):
            rows.append(f"| {cell(name)} | {' | '.join(f'{part[score]:.4f}' for score in SCORES)} |")
        if key == "test" and len(seeds) > 1:
            spread = " | ".join(_spread([scores[score] for scores in seeds]) for score in SCORES)
            rows.append(f"| test, {len(seeds)} seeds: mean ± standard deviation, 95% interval of the mean | {spread} |")
    return "\n".join(rows)


def _spread(values: Sequence[float]) -> str:
    """Return mean, standard deviation and Student's interval of a few values."""
    from scipy.stats import t  # comes with scikit-learn

    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return f"{mean:.4f} ± {deviation:.4f} [{mean - half:.4f}, {mean + half:.4f}]"


def class_table(part: Mapping[str, Any]) -> str:
    """Return precision, recall and F1 of every class."""
    rows = ["| label | precision | recall | F1 | in the split |", "|---|---|---|---|---|"]
    for label, found in part["per_class"].items():
        figures = " | ".join(f"{found[key]:.4f}" for key in ("precision", "recall", "f1"))
        rows.append(f"| {cell(label)} | {figures} | {found['support']:,} |")
    return "\n".join(rows)


def confusion_table(confusion: Mapping[str, Any]) -> str:
    """Return the confusion matrix as Markdown; empty when there are too many labels for a table."""
    labels = [cell(label) for label in confusion["labels"]]
    if len(labels) > _TABLE_LABELS:
        return ""
    rows = [f"| true label \\ predicted | {' | '.join(labels)} |", "|---|" + "---|" * len(labels)]
    for label, counts in zip(labels, confusion["matrix"], strict=True):
        rows.append(f"| {label} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(rows)


def draw_confusion(confusion: Mapping[str, Any], path: Path) -> bool:
    """Draw the confusion matrix, shaded by the share of the true label; needs the extra `plots`.

    Returns:
        Whether there is a picture: not without matplotlib, and not when its font lacks a letter of the labels.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    labels, matrix = list(confusion["labels"]), confusion["matrix"]
    count = len(labels)
    side = min(max(3.6, 0.62 * count + 1.8), 14.0)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    shares = [[100 * number / max(sum(row), 1) for number in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    size = 9 if count <= _NUMBERED_LABELS else 6
    for axis, what in ((axes.xaxis, "predicted label"), (axes.yaxis, "true label")):
        axis.set_ticks(range(count), [_short(label) for label in labels], fontsize=size, parse_math=False)
        axis.set_label_text(what)
    if count * max(map(len, labels)) > 40:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    if count <= _NUMBERED_LABELS:
        for row, numbers in enumerate(matrix):
            for column, number in enumerate(numbers):
                colour = "white" if shares[row][column] > 55 else "black"
                axes.text(column, row, f"{number:,}", ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label("% of the true label")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        try:
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
        except UserWarning:
            path.unlink(missing_ok=True)
            return False
    return True


def cell(text: object) -> str:
    """Return a text that stays inside its cell of a Markdown table."""
    flat = " ".join(str(text).split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def _short(label: str, width: int = 18) -> str:
    return label if len(label) <= width else label[: width - 1] + "…"


PLACEHOLDER = "PATH_OR_HUB_ID"
"""Stands in the snippet of a card for the place of the adapter, which a push knows."""

AUTO = {
    "sequence": "AutoPeftModelForSequenceClassification",
    "token": "AutoPeftModelForTokenClassification",
}
"""PEFT's class that loads an adapter of each task."""

_USE = {
    "sequence": """\
inputs = tokenizer(["This phone is bien bonito"], return_tensors="pt", padding=True)
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1)
print([labels[i] for i in probabilities.argmax(-1)])""",
    "token": """\
words = "This phone is bien bonito".split()
{encode}
with torch.no_grad():
    predicted = model(**inputs).logits.argmax(-1)[0]
word_ids = inputs.word_ids()
first = [i for i, word in enumerate(word_ids) if word is not None and word not in word_ids[:i]]
print([(words[word_ids[i]], labels[predicted[i]]) for i in first])""",
}

PIPELINE_SNIPPET = {
    "sequence": f"""\
from transformers import pipeline

classify = pipeline("text-classification", model="{PLACEHOLDER}")
print(classify(["This phone is bien bonito"]))""",
    "token": f"""\
from transformers import pipeline

# neighbouring words with the same label come as one piece
tag = pipeline("token-classification", model="{PLACEHOLDER}", aggregation_strategy="first", ignore_labels=[])
print([(part["word"], part["entity_group"]) for part in tag("This phone is bien bonito")])""",
}


def loading_snippet(
    recipe: Recipe, labels: list[str], auto: str, folder: str = PLACEHOLDER, spaced_words: bool = False
) -> str:
    """Return Python that loads the adapter with stock PEFT and predicts, labels included."""
    pieces, lead = "words", ""
    if spaced_words:
        pieces, lead = "spaced", 'spaced = [words[0], *(f" {word}" for word in words[1:])]  # as in a running text\n'
    encode = f'{lead}inputs = tokenizer({pieces}, is_split_into_words=True, return_tensors="pt")'
    return (
        f"import torch\nfrom peft import {auto}\nfrom transformers import AutoTokenizer\n\n"
        f'adapter = "{folder}"\n'
        f"labels = {labels!r}\n"
        f"model = {auto}.from_pretrained(\n"
        "    adapter, num_labels=len(labels), id2label=dict(enumerate(labels)),\n"
        "    label2id={label: i for i, label in enumerate(labels)},\n"
        ").eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
        "model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id\n\n"
        + _USE[recipe.data.task].format(encode=encode)
    )


_FEW = 50  # items of a class in test below which its F1 says little


def data_lines(recipe: Recipe, result: Mapping[str, Any]) -> list[str]:
    """Return what it was trained and tested on, its splits and their cleaning, as the items of a Markdown list."""
    data = result["data"]
    lines = [_corpus_line("trained on", CorpusFacts.of(recipe.data))]
    if recipe.data.test_source and result.get("test"):
        lines.append(_corpus_line("tested on", CorpusFacts.of(recipe.data.test_source)))
    for name, split in data["splits"].items():
        cut = data["truncation"].get(name, {})
        line = f"- {name}: {split['texts']:,} texts, {split['words']:,} words, {cut.get('texts_cut', 0):,} texts cut"
        lines.append(line + (f" ({cut['words_cut']:,} words lost)" if cut.get("words_cut") else ""))
    found = data["hygiene"]
    removed = found["removed_from_train"]
    lines += [
        f"- texts in train that repeat an earlier one: {found['duplicates']:,}; with different labels: "
        f"{found['conflicting']:,}",
        f"- texts shared between train and test before cleaning: {found['test_shared']:,}; between train and "
        f"validation: {found['validation_shared']:,}",
        f"- removed from train as duplicates, conflicts or leaks: {removed:,}"
        if found["mode"] == "remove"
        else "- nothing was removed: the scores above include what is shared",
    ]
    return lines


def _corpus_line(what: str, facts: CorpusFacts) -> str:
    name = f"[{facts.name}](https://huggingface.co/datasets/{facts.hub})" if facts.hub else facts.name
    languages = f"; languages: {', '.join(facts.language)}" if facts.language else ""
    return f"- {what}: {name}; licence: {facts.license or 'not given'}{languages}"


def training_lines(recipe: Recipe, result: Mapping[str, Any]) -> list[str]:
    """Return how the adapter was trained, as the items of a Markdown list."""
    masking, adapter, training = recipe.masking, recipe.adapter, recipe.training
    rate = f"p = {masking.p:g}, {masking.schedule}"
    if masking.schedule != "constant":
        rate += f" from {masking.p_start:g} between {masking.begin:.0%} and {masking.ramp_end:.0%} of training"
    unit = masking.unit if masking.unit != "span" else f"span of {masking.span_length} words"
    chosen = {decision["what"]: decision["choice"] for decision in result.get("decisions", ())}
    token = chosen.get("mask token", str(masking.mask_token))
    length = f"{training.max_steps:,} steps" if training.max_steps else f"{training.epochs:g} epochs"
    weights = "given per label" if isinstance(training.class_weights, dict) else training.class_weights
    return [
        f"- masking: {rate}; unit: {unit}; mask token: {token}{', trained' if masking.trainable_mask else ''}",
        f"- adapter: {'DoRA' if adapter.dora else 'LoRA'}, r = {adapter.r}, alpha = {adapter.alpha:g}, dropout = "
        f"{adapter.dropout:g}; quantization of the backbone: {chosen.get('quantization', recipe.model.quantization)}",
        f"- optimisation: {length}, batches of {_batch(recipe, result)}, learning rate "
        f"{training.learning_rate:g} ({training.scheduler}), loss: {training.loss}, class weights: {weights}",
        f"- seed: {recipe.seed}; tokmask-peft {result['speed']['environment']['versions']['tokmask-peft']}",
    ]


def _batch(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """Return what an optimizer step sees, over all processes."""
    training = recipe.training
    times = training.gradient_accumulation * result["speed"]["environment"].get("processes", 1)
    if training.tokens_per_batch is not None:
        return f"up to {training.tokens_per_batch * times:,} sub-tokens"
    return f"{training.batch_size * times:,} texts"


def limit_lines(recipe: Recipe, result: Mapping[str, Any], seeds: int) -> list[str]:
    """Return what the scores do not say, as the items of a Markdown list."""
    what = "text" if recipe.data.task == "sequence" else "word"
    lines = [
        f"- It gives one of the labels above to any {what}, in whatever language or domain. The scores hold for texts "
        "like those it was trained on; other platforms, dialects, spellings and times will score lower.",
        f"- In training and scoring, texts were cut at {recipe.data.max_length} sub-tokens.",
    ]
    part = result.get("test") or result["validation"]
    rare = [label for label, found in part.get("per_class", {}).items() if found["support"] < _FEW]
    if rare:
        lines.append(
            f"- Classes with fewer than {_FEW} items in the scored split, whose F1 says little: {', '.join(rare)}."
        )
    if seeds < 2:
        lines.append("- The scores are of one run with one seed: differences of a point or two may be chance.")
    if not result.get("test"):
        lines.append("- There was no test split: the validation scores chose the checkpoint and flatter it.")
    if recipe.adapter.license is None:
        lines.append("- No licence of the adapter is given. The backbone and the corpus have licences of their own.")
    return lines


def corpus_citations(recipe: Recipe) -> list[str]:
    """Return a sentence with what to cite for the data, if the recipe says so."""
    sources = [recipe.data, *([recipe.data.test_source] if recipe.data.test_source else [])]
    cited = dict.fromkeys(facts.citation for facts in map(CorpusFacts.of, sources) if facts.citation)
    return [f"The data: {'; '.join(cited)}"] if cited else []


_BIBTEX = """\
@misc{xu2025tokenmasking,
  title         = {Token Masking Improves Transformer-Based Text Classification},
  author        = {Xianglong Xu and John Bowen and Rojin Taheri},
  year          = {2025},
  eprint        = {2505.11746},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}"""


def write_card(
    folder: Path,
    recipe: Recipe,
    result: Mapping[str, Any],
    *,
    spaced_words: bool = False,
    seeds: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write the card, `README.md`, and its picture into an adapter's folder; the arguments are `model_card`'s."""
    part = result.get("test") or result["validation"]
    drawn = "confusion" in part and draw_confusion(part["confusion"], folder / PICTURE)
    text = model_card(recipe, result, spaced_words=spaced_words, seeds=seeds, picture=PICTURE if drawn else None)
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_card(
    recipe: Recipe,
    result: Mapping[str, Any],
    *,
    spaced_words: bool = False,
    seeds: Sequence[Mapping[str, float]] = (),
    picture: str | None = None,
) -> str:
    """Return the model card as Markdown with a YAML head, generated from a run.

    Args:
        recipe: the resolved recipe.
        result: what `result.json` holds.
        spaced_words: token tasks: whether words were encoded with their leading space, as byte-level tokenizers
            without a prefix space need it.
        seeds: test scores of runs that differ only in their seed, this run's among them.
        picture: file name of the confusion matrix beside the card; without, it is a table.

    Raises:
        ValueError: huggingface_hub cannot read the head back.
    """
    snippet = loading_snippet(recipe, list(result["labels"]), AUTO[recipe.data.task], spaced_words=spaced_words)
    return _card(recipe, result, card_data(recipe, result), "A LoRA adapter for", snippet, seeds, picture)


def merged_card(
    recipe: Recipe, result: Mapping[str, Any], *, notes: Sequence[str] = (), picture: str | None = None
) -> str:
    """Return the card of a plain transformers model, an adapter merged into its backbone.

    Args:
        recipe: the resolved recipe.
        result: what `result.json` holds.
        notes: what a user of the merged model should know, in sentences.
        picture: as for `model_card`.

    Raises:
        ValueError: huggingface_hub cannot read the head back.
    """
    head = card_data(recipe, result, merged=True)
    return _card(recipe, result, head, "A fine-tuned", PIPELINE_SNIPPET[recipe.data.task], (), picture, notes)


def _card(
    recipe: Recipe,
    result: Mapping[str, Any],
    head: ModelCardData,
    what: str,
    snippet: str,
    seeds: Sequence[Mapping[str, float]],
    picture: str | None,
    notes: Sequence[str] = (),
) -> str:
    labels = list(result["labels"])
    limits = [*limit_lines(recipe, result, len(seeds)), *(f"- {note[0].upper()}{note[1:]}." for note in notes)]
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {recipe.name}",
        f"{what} {_backbone(recipe)} that gives one "
        f"label per {'text' if recipe.data.task == 'sequence' else 'word'}: {', '.join(labels)}.\n" + _masked(recipe),
        "## Scores",
        score_table(result, seeds),
        _against_baseline(result),
        *_details(result, picture),
        "## How to load it",
        f"```python\n{snippet}\n```",
        "## Data",
        "\n".join(data_lines(recipe, result)),
        "## Training",
        "\n".join(training_lines(recipe, result)),
        "## Limits",
        "\n".join(limits),
        "## Citation",
        f"The method is token masking:\n\n```bibtex\n{_BIBTEX}\n```",
        *corpus_citations(recipe),
    ]
    return str(ModelCard("\n\n".join(part for part in parts if part) + "\n"))


def _backbone(recipe: Recipe) -> str:
    """Link what can be an id on the Hub; a local folder stays unnamed."""
    backbone = hub_id(recipe.model.backbone)
    return f"[{backbone}](https://huggingface.co/{backbone})" if backbone else "a backbone from a local folder"


def _masked(recipe: Recipe) -> str:
    masking = recipe.masking
    if masking.is_off:
        return "It was trained without token masking (p = 0)."
    return f"It was trained with token masking at rate p = {masking.p:g}; at inference nothing is masked."


def _against_baseline(result: Mapping[str, Any]) -> str:
    floor, mine = result.get("baseline"), result.get("test") or result["validation"]
    if not floor or mine["f1_macro"] > floor["f1_macro"]:
        return ""
    return "**The adapter does not beat the baseline of character n-grams.**"


def _details(result: Mapping[str, Any], picture: str | None) -> list[str]:
    """Return the sections on classes, for test where there is one."""
    split = "test" if result.get("test") else "validation"
    part = result[split]
    found = [f"### By class ({split})", class_table(part)] if "per_class" in part else []
    if picture:
        return [*found, f"### Confusion matrix ({split})", f"![Confusion matrix of the {split} split]({picture})"]
    if "confusion" in part and (table := confusion_table(part["confusion"])):
        return [*found, f"### Confusion matrix ({split})", table]
    return found

"""The model card of an adapter or a merged model: its facts here, its text in `card.md.j2`."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Template

from tokmask_peft.artifacts import Result
from tokmask_peft.console import baseline_verdict, printable
from tokmask_peft.errors import write_whole
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.recipe.loading import flat
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import get_task

PLACEHOLDER = "PATH_OR_HUB_ID"  # stands for the location of the model in the snippet of a card, until a push knows it
PICTURE = "confusion_matrix.png"
TEXT, PAIR = '"This phone is bien bonito"', ('"A man plays a guitar"', '"Someone makes music"')
"""The text in the snippets of the tasks, and what a model of pairs reads instead."""
_METRICS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "f1_macro": ("f1", "macro-F1", {"average": "macro"}),
    "f1_weighted": ("f1", "weighted F1", {"average": "weighted"}),
    "accuracy": ("accuracy", "accuracy", None),
    "f1_micro": ("f1", "micro-F1", {"average": "micro"}),
    "f1_samples": ("f1", "F1 by text", {"average": "samples"}),
    "f1_entities": ("f1", "F1 of entities", {"average": "micro"}),
}
_TABLE_LABELS = 12  # a wider table is unreadable
_NUMBERED_LABELS = 24  # with more labels, the cells of the picture are too small for numbers
_FEW = 50  # the F1 of a class with fewer items in the scored split is unreliable


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card is made from: the resolved recipe, the run's result, and what they do not say."""

    recipe: Recipe
    result: Result
    spaced_words: bool = False  # words were encoded with their leading space, as some byte-level tokenizers need it
    picture: str | None = None  # file name of the picture of the confusion matrix; without one, the card has a table
    merged: bool = False  # the model is a plain transformers model with the adapter merged in
    notes: Sequence[str] = ()  # sentences without a full stop that are added to the limits

    def render(self) -> str:
        """Return the card as Markdown with a YAML head."""
        recipe, result, task = self.recipe, self.result, get_task(self.recipe.data.task)
        trained, tested = (public_source(source) for source in (recipe.data, recipe.data.test_source or recipe.data))
        confusion = result.scored.get("confusion")
        if self.merged:
            snippet = pipeline_snippet(recipe, result)
        else:
            snippet = loading_snippet(recipe, result, PLACEHOLDER, self.spaced_words)
        card = ModelCard.from_template(
            self._head(trained, tested),
            template_str=_read("card.md.j2"),
            card=self,
            plain=plain,
            task=task,
            backbone=hub_id(recipe.model.backbone),
            sources={"trained": trained, "tested": tested if recipe.data.test_source and result.test else None},
            citations=dict.fromkeys(source.citation for source in (trained, tested) if source.citation),
            confusion=confusion if confusion and len(confusion["labels"]) <= _TABLE_LABELS else None,
            snippet=snippet,
            training=training_facts(recipe, result),
            limits=limits(recipe, result),
            verdict=baseline_verdict(result.scored, result.baseline),
        )
        return str(card)

    def _head(self, trained: SourceConfig, tested: SourceConfig) -> ModelCardData:
        """Return the metadata for the Hub, whose index holds test scores only: validation selected the checkpoint."""
        backbone, tag = hub_id(self.recipe.model.backbone), get_task(self.recipe.data.task).pipeline_tag
        results = None
        if self.result.test:
            name = str(tested.name)
            results = [
                EvalResult(
                    task_type=tag,
                    dataset_type=tested.hub or re.sub(r"\W+", "-", name.lower()).strip("-"),
                    dataset_name=name,
                    dataset_config=tested.hub_config,
                    dataset_revision=tested.hub_revision,
                    dataset_split=re.split(r"[/\\]", str(self.recipe.data.test))[-1],  # it may be the path of a file
                    metric_type=kind,
                    metric_name=metric,
                    metric_args=arguments,
                    metric_value=round(self.result.test[key], 4),
                )
                for key, (kind, metric, arguments) in _METRICS.items()
                if key in self.result.test
            ]
        return ModelCardData(
            language=list(dict.fromkeys([*trained.language, *tested.language])) or None,
            license=self.recipe.adapter.license,
            library_name="transformers" if self.merged else "peft",
            base_model=backbone,
            base_model_relation=("finetune" if self.merged else "adapter") if backbone else None,
            pipeline_tag=tag,
            datasets=list(dict.fromkeys(source.hub for source in (trained, tested) if source.hub)) or None,
            tags=[*([] if self.merged else ["lora"]), "token-masking", "tokmask-peft"],
            metrics=["f1", "accuracy"],
            model_name=self.recipe.name if results else None,
            eval_results=results,
        )


def write_card(folder: Path, recipe: Recipe, result: Result, *, spaced_words: bool = False) -> None:
    """Write the card, `README.md`, and its picture into an adapter's folder; the arguments are those of `Card`."""
    confusion = result.scored.get("confusion")
    picture = PICTURE if confusion and draw_confusion(confusion, folder / PICTURE) else None
    text = Card(recipe, result, spaced_words, picture=picture).render()
    write_whole(folder / "README.md", text)


def hub_id(backbone: str) -> str | None:
    """Return the backbone if it can be an id on the Hub, none if it is a folder on this machine."""
    try:
        validate_repo_id(backbone)
    except HFValidationError:
        return None
    return None if Path(backbone).exists() else backbone


def public_source(source: SourceConfig) -> SourceConfig:
    """Return what may be published about a source: never a path, and the built-in corpus by its own facts."""
    if source.path is None and source.hub is None:
        name = "the built-in corpus of tokmask-peft: made-up Spanish-English posts, not a benchmark"
        facts = {"name": name, "language": ("es", "en"), "license": "Apache-2.0", "citation": None}
    elif source.path is None:
        facts = {"name": source.name or source.hub}
    else:
        facts = {"name": source.name or "a local corpus without a name (data.name)"}
        facts |= {"path": None, "hub": None, "hub_config": None, "hub_revision": None}
    return source.model_copy(update=facts)


def label_on(recipe: Recipe, result: Result) -> str:
    """Return which sub-token of a word carries its label, as the run decided: `first`, `last`, or `mean` for all."""
    chosen = {decision["what"]: decision["choice"] for decision in result.decisions}
    return chosen.get("label on", "first") if recipe.data.label_on == "auto" else recipe.data.label_on


_MEAN = """\
with torch.no_grad():
    logits = model(**inputs).logits[0]
word_ids = inputs.word_ids()
known = sorted({*word_ids} - {None})
mean = {word: logits[[i for i, of in enumerate(word_ids) if of == word]].mean(0) for word in known}
print([(words[word], labels[row.argmax()]) for word, row in mean.items()])"""
"""What follows `inputs` if the sub-tokens of a word answer together."""


def loading_snippet(recipe: Recipe, result: Result, folder: str, spaced_words: bool = False) -> str:
    """Return Python that loads the adapter in `folder` with PEFT only and predicts, labels and pooling included."""
    task = get_task(recipe.data.task)
    use = task.use(task.snippet, result.labels, result.calibration)
    if spaced_words:  # only a task whose texts are words tokenizes `words`
        spaced = 'spaced = [words[0], *(f" {word}" for word in words[1:])]  # as in running text'
        use = use.replace("inputs = tokenizer(words,", f"{spaced}\ninputs = tokenizer(spaced,")
    if recipe.data.pair:
        use = use.replace(f"[{TEXT}]", f"[{PAIR[0]}], [{PAIR[1]}]")
    if label_on(recipe, result) == "last":
        use = use.replace("first = [", "last = [").replace("word_ids[:i]]", "word_ids[i + 1 :]]")
        use = use.replace("for i in first]", "for i in last]")
    elif label_on(recipe, result) == "mean":
        use = use.partition("with torch.no_grad")[0] + _MEAN
    return Template(_read("snippet.py.j2")).render(
        auto=task.auto_class.replace("AutoModel", "AutoPeftModel"),
        folder=json.dumps(folder, ensure_ascii=False),
        labels=repr(list(result.labels)),
        use=use,
        attention=recipe.model.attention,
        pooling=None if task.words_given else recipe.model.pooling,
        problem_type=task.problem_type,
    )


def pipeline_snippet(recipe: Recipe, result: Result) -> str:
    """Return Python that predicts with the merged model, labels included."""
    task = get_task(recipe.data.task)
    use = task.use(task.pipeline_snippet, result.labels, result.calibration).replace("MODEL", f'"{PLACEHOLDER}"')
    if recipe.data.pair:
        use = use.replace(f"[{TEXT}]", f'[{{"text": {PAIR[0]}, "text_pair": {PAIR[1]}}}]')
    if label_on(recipe, result) == "last":
        use = use.replace("# adjacent words with the same label are joined", "# a word has its last row's label")
        use = use.replace('"first"', '"none"').replace('"entity_group"', '"entity"')
    elif label_on(recipe, result) == "mean":
        use = use.replace("are joined", "are joined; a word's sub-tokens count with their mean probabilities")
        use = use.replace('"first"', '"average"')
    return f"from transformers import pipeline\n\n{use}"


def _read(template: str) -> str:
    return (files("tokmask_peft.hub") / template).read_text(encoding="utf-8")


def training_facts(recipe: Recipe, result: Result) -> list[tuple[str, str]]:
    """Return how the adapter was trained, as pairs of a subject and what was chosen."""
    masking, adapter, training = recipe.masking, recipe.adapter, recipe.training
    rate, schedule = f"p = {masking.p:g}, {masking.schedule}", masking.make_schedule()
    if schedule.reacts:
        rate = f"{masking.rates}, which follows the training"
    elif masking.schedule != "constant":
        rate += f" from {masking.p_start:g} between {masking.begin:.0%} and {schedule.end:.0%} of training"
    unit = masking.unit if masking.unit != "span" else f"span of {masking.span_length} words"
    chosen = {decision["what"]: decision["choice"] for decision in result.decisions}
    token = f"{chosen.get('mask token', masking.mask_token)}{', trained' if masking.trainable_mask else ''}"
    environment = result.speed.get("environment", {})
    per_step = training.gradient_accumulation * environment.get("processes", 1)
    if training.tokens_per_batch is not None:
        batch = f"up to {training.tokens_per_batch * per_step:,} sub-tokens"
    else:
        size = chosen.get("batch size", training.micro_batch) if training.batch_size == "auto" else training.micro_batch
        batch = f"{int(size) * per_step:,} texts"
    epochs = chosen.get("epochs", training.epochs) if training.epochs == "auto" else f"{training.epochs:g}"
    length = f"{training.max_steps:,} steps" if training.max_steps else f"{epochs} epochs"
    weights = "given per label" if isinstance(training.class_weights, dict) else training.class_weights
    method = f"{'DoRA' if adapter.dora else 'LoRA'}, r = {adapter.r}, alpha = {adapter.alpha:g}"
    if recipe.model.attention == "bidirectional":
        method += ", the backbone sees the whole text"
    quantization = chosen.get("quantization", recipe.model.quantization)
    loss = f"binary {training.loss}" if get_task(recipe.data.task).several else training.loss
    speed = f"learning rate {training.learning_rate:g} ({training.scheduler})"
    version = environment.get("versions", {}).get("tokmask-peft", "unknown")
    keys = {"masking": {"share", "per_text", "replace", "score_masked"}, "model": {"attention_dropout"}}
    keys["training"] = {"views", "views_masked", "label_smoothing", "neftune_alpha"}
    unusual = flat(recipe.model_dump(include=keys, exclude_defaults=True))  # which no other line names
    further = ", ".join(f"{key}={value}" for key, value in unusual.items())
    return [
        ("masking", f"{rate}; unit: {unit}; mask token: {token}"),
        ("adapter", f"{method}, dropout = {adapter.dropout:g}; quantization of the backbone: {quantization}"),
        ("optimisation", f"{length}, batches of {batch}, {speed}, loss: {loss}, class weights: {weights}"),
        *([("further keys", further)] if further else []),
        ("seed", f"{recipe.seed}; tokmask-peft {version}"),
    ]


def limits(recipe: Recipe, result: Result) -> list[str]:
    """Return what the scores do not say, as sentences."""
    item = get_task(recipe.data.task).item
    lines = [
        f"It assigns labels from the list above to any {item}, whatever its language or domain. The scores apply to "
        "texts like the training texts; expect lower scores on other platforms, dialects, spellings and periods."
    ]
    if recipe.data.pair:
        cut = f"Pairs were cut at {recipe.data.max_length} sub-tokens, the longer text first, for the scores too."
    else:
        cut = f"In training, texts were cut at {recipe.data.max_length} sub-tokens; for the scores, longer ones were "
        cut += "read in windows of that length."
    lines.append(cut)
    rare = [label for label, found in result.scored.get("per_class", {}).items() if found["support"] < _FEW]
    if rare:
        head = f"Classes with fewer than {_FEW} items in the scored split, so that their F1 is unreliable"
        lines.append(f"{head}: {', '.join(rare)}.")
    if "entities" in result.scored:
        head = "The labels are scored as tokmask_peft gives them, which writes illegal sequences again"
        lines.append(f"{head} (I-PER without a beginning becomes B-PER); the lines above show them as they come.")
    lines.append("The scores come from one run with one seed: differences of a point or two may be chance.")
    if not result.test:
        lines.append("There was no test split: the validation scores selected the checkpoint and are optimistic.")
    if recipe.adapter.license is None:
        lines.append("No licence is stated for the adapter. The backbone and the corpus have their own licences.")
    return lines


def plain(text: object) -> str:
    """Return untrusted text escaped for Markdown: it shows as one line without markup, in tables too."""
    flat = printable(" ".join(str(text).split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", flat)


def draw_confusion(confusion: Mapping[str, Any], path: Path) -> bool:
    """Draw the confusion matrix, shaded by the share of the true label; False if matplotlib or a letter is missing."""
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
    numbered = count <= _NUMBERED_LABELS
    names = [label if len(label) <= 18 else f"{label[:17]}…" for label in labels]
    for axis, what in ((axes.xaxis, "predicted label"), (axes.yaxis, "true label")):
        axis.set_ticks(range(count), names, fontsize=9 if numbered else 6, parse_math=False)
        axis.set_label_text(what)
    if count * max(map(len, labels)) > 40:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    for row, numbers in enumerate(matrix if numbered else ()):
        for column, number in enumerate(numbers):
            colour = "white" if shares[row][column] > 55 else "black"
            axes.text(column, row, f"{number:,}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.85).set_label("% of the true label")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        try:
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
        except UserWarning:
            path.unlink(missing_ok=True)
            return False
    return True

"""The model card: what the adapter is, what it scored, on what, and how to load it without this package.

Nothing about the machine of the training or the places of its files goes in: a card is made to be public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tokmask_peft.card_metadata import CorpusFacts, card_data, hub_id
from tokmask_peft.card_scores import PICTURE, class_table, confusion_table, draw_confusion, score_table
from tokmask_peft.recipe import Recipe

PLACEHOLDER = "PATH_OR_HUB_ID"
"""Stands in the snippet of a card for the place of the adapter, which a push knows."""

_FEW = 50  # items of a class in test below which its F1 says little

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

_PIPELINE = {
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
    return _card(recipe, result, head, "A fine-tuned", _PIPELINE[recipe.data.task], (), picture, notes)


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
        "\n".join(_data_lines(recipe, result)),
        "## Training",
        "\n".join(training_lines(recipe, result)),
        "## Limits",
        "\n".join(limits),
        "## Citation",
        f"The method is token masking:\n\n```bibtex\n{_BIBTEX}\n```",
        *_corpus_citations(recipe),
    ]
    return str(ModelCard("\n\n".join(part for part in parts if part) + "\n"))


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


def _data_lines(recipe: Recipe, result: Mapping[str, Any]) -> list[str]:
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
        f"- optimisation: {length}, batches of {training.batch_size * training.gradient_accumulation}, learning rate "
        f"{training.learning_rate:g} ({training.scheduler}), loss: {training.loss}, class weights: {weights}",
        f"- seed: {recipe.seed}; tokmask-peft {result['speed']['environment']['versions']['tokmask-peft']}",
    ]


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


def _corpus_citations(recipe: Recipe) -> list[str]:
    sources = [recipe.data, *([recipe.data.test_source] if recipe.data.test_source else [])]
    cited = dict.fromkeys(facts.citation for facts in map(CorpusFacts.of, sources) if facts.citation)
    return [f"The data: {'; '.join(cited)}"] if cited else []

"""The sections of a model card in words: the data, how the adapter was trained, and what the scores do not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokmask_peft.hub.card_metadata import CorpusFacts
from tokmask_peft.recipe import Recipe

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

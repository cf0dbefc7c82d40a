"""The model card: what the adapter is, what it scored, and how to load it without this package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokmask_peft.recipe import Recipe

_AUTO = {
    "sequence": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "token": ("token-classification", "AutoPeftModelForTokenClassification"),
}

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


def model_card(recipe: Recipe, result: Mapping[str, Any], spaced_words: bool = False) -> str:
    """Return the model card as Markdown with a YAML head, generated from a run.

    Args:
        recipe: the resolved recipe.
        result: what `result.json` holds.
        spaced_words: token tasks: whether words were encoded with their leading space, as byte-level tokenizers
            without a prefix space need it.
    """
    pipeline, auto = _AUTO[recipe.data.task]
    head = {
        "base_model": recipe.model.backbone,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": pipeline,
        "tags": ["lora", "token-masking", "tokmask-peft"],
    }
    labels = list(result["labels"])
    masking = recipe.masking
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {recipe.name}",
        f"A LoRA adapter for {_linked(recipe.model.backbone)} that gives one "
        f"label per {'text' if recipe.data.task == 'sequence' else 'word'}: {', '.join(labels)}.\n"
        f"It was trained with token masking at rate p = {masking.p:g} ({masking.schedule}, unit: {masking.unit}); "
        "at inference nothing is masked.",
        "## Scores",
        _score_table(result),
        "## How to load it",
        f"```python\n{loading_snippet(recipe, labels, auto, spaced_words=spaced_words)}\n```",
        "## Data",
        "\n".join(_data_lines(result)),
        "## Method",
        "Token masking: Xu, Bowen, Taheri (2025), *Token Masking Improves Transformer-Based Text Classification*, "
        "[arXiv:2505.11746](https://arxiv.org/abs/2505.11746). "
        "LoRA: Hu et al. (2021), [arXiv:2106.09685](https://arxiv.org/abs/2106.09685). "
        f"Trained with tokmask-peft {result['speed']['environment']['versions']['tokmask-peft']}; "
        "the scores are of one run with one seed.",
    ]
    return "\n\n".join(parts) + "\n"


def loading_snippet(
    recipe: Recipe, labels: list[str], auto: str, folder: str = "PATH_OR_HUB_ID", spaced_words: bool = False
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


def _linked(backbone: str) -> str:
    """Return a link to the Hub for what can be an id there; a local folder stays plain."""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", backbone) and not Path(backbone).exists():
        return f"[{backbone}](https://huggingface.co/{backbone})"
    return f"`{backbone}`"


def _score_table(result: Mapping[str, Any]) -> str:
    rows = ["| split | macro-F1 | weighted F1 | accuracy |", "|---|---|---|---|"]
    names = {"validation": "validation (selected the checkpoint)", "test": "test"}
    floor = result.get("baseline")
    if floor:
        names["baseline"] = f"baseline: {floor['method']}"
    for key, name in names.items():
        if part := result.get(key):
            figures = " | ".join(f"{part[score]:.4f}" for score in ("f1_macro", "f1_weighted", "accuracy"))
            rows.append(f"| {name} | {figures} |")
    return "\n".join(rows)


def _data_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, split in result["data"]["splits"].items():
        cut = result["data"]["truncation"].get(name, {}).get("texts_cut", 0)
        lines.append(f"- {name}: {split['texts']:,} texts, {split['words']:,} words, {cut:,} texts cut")
    removed = result["data"]["hygiene"]
    lines.append(
        f"- removed from train as duplicates, conflicts or leaks: {removed['removed_from_train']:,}; "
        f"texts shared between train and test before that: {removed['test_shared']:,}"
    )
    return lines

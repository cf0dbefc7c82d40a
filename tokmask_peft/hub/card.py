"""The model card: what the adapter is, what it scored, on what, and how to load it without this package.

Nothing about the machine of the training or the places of its files goes in: a card is made to be public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tokmask_peft.hub.card_metadata import card_data, hub_id
from tokmask_peft.hub.card_scores import PICTURE, class_table, confusion_table, draw_confusion, score_table
from tokmask_peft.hub.card_sections import corpus_citations, data_lines, limit_lines, training_lines
from tokmask_peft.hub.card_snippets import AUTO, PIPELINE_SNIPPET, loading_snippet
from tokmask_peft.recipe import Recipe

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

"""The YAML head of a model card: what the Hub reads to file, link and rank an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tokmask_peft.recipe import Recipe, SourceConfig, Task

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

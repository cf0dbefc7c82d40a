"""Score a finished run again: on one of its splits, or on other data."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from tokmask_peft.artifacts import Loading, held, open_finished
from tokmask_peft.data.corpus import apply_label_map, check_known, load_corpus
from tokmask_peft.data.readers import read_split
from tokmask_peft.errors import DataError
from tokmask_peft.model.adapter import load_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.memory.suggestions import changed
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import Example
from tokmask_peft.training.environment import processes
from tokmask_peft.training.memory import evaluation_memory_errors
from tokmask_peft.training.metrics import scores, scores_by_mixing
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split, argmax_logits, collator, training_arguments


def evaluate(
    run: str | Path, *, split: str = "test", data: str | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Score the adapter of a run.

    Args:
        run: the run folder.
        split: `train`, `validation` or `test` of the run's own data, as they were split and cleaned in training;
            with `data`, the split or file name there.
        data: a folder or file with other texts, in the format and with the columns of the run's recipe.
        batch_size: texts per forward pass, in place of the run's `training.eval_batch_size`.

    Returns:
        The scores of `metrics.scores`, with `by_mixing` where the recipe names language labels, and `not_as_trained`,
        with the reasons, where this machine cannot hold the backbone as it was in training.

    Raises:
        RunError, DataError, ModelError: with what to do.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected 1 or more")
    folder = open_finished(run)
    recipe = Recipe.load(folder.recipe)
    if batch_size is not None:
        recipe = changed(recipe, {"training.eval_batch_size": batch_size})
    examples, labels = split_examples(recipe, split, data, folder.adapter)
    state = processes()
    set_seed(recipe.seed)
    loading = Loading.read(folder.adapter)
    trained = loading.applied(recipe.model) if loading is not None else recipe.model
    here = held(trained, state.device)
    with evaluation_memory_errors(state.device):
        backbone = load_backbone(here.model, recipe.data.task, labels, state.device)
        model = load_adapter(backbone, folder.adapter)
    part = Split.make(examples, backbone.tokenizer, recipe.data.task, labels, recipe.data.max_length)
    bf16 = backbone.dtype == torch.bfloat16
    untracked = recipe.model_copy(update={"training": recipe.training.model_copy(update={"report_to": ()})})
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its folder, and the run may be read-only
        texts = min(recipe.training.eval_batch_size, len(examples))
        with evaluation_memory_errors(state.device):  # an unquantized backbone lies on the host until here
            trainer = OrderedEvalTrainer(
                model=model,
                args=training_arguments(untracked, Path(scratch), state.device, bf16),
                eval_dataset=part.dataset,
                data_collator=collator(backbone.tokenizer, recipe.data.task),
                memory_errors=functools.partial(evaluation_memory_errors, state.device, texts),
                preprocess_logits_for_metrics=argmax_logits,
            )
        found = trainer.predict_split(part)
    result = scores(*found.flat(), labels)
    otherwise = list(here.deviations)
    if loading is not None and loading.precision == "bf16" and not bf16:
        otherwise.append("trained in bf16, which this machine does not compute in: results differ slightly")
    if otherwise:
        result["not_as_trained"] = otherwise
    if recipe.data.task == "token" and recipe.data.language_labels:
        result["by_mixing"] = scores_by_mixing(found, labels, recipe.data.language_labels)
    return result


def split_examples(
    recipe: Recipe, split: str, data: str | None, adapter: Path
) -> tuple[list[Example], tuple[str, ...]]:
    """Return the texts of a split as the run saw them, or other texts, and the labels of the adapter.

    Args:
        recipe: of the run.
        split: `train`, `validation` or `test`; with `data`, the split or file name there.
        data: a folder or file with other texts.
        adapter: the folder of the adapter.

    Raises:
        DataError: there is no such split, or it cannot be read.
    """
    import json

    labels = tuple(json.loads((adapter / "labels.json").read_text(encoding="utf-8"))["labels"])
    if data is not None:
        source = recipe.data.model_copy(update={"path": data, "test_source": None})
        examples = apply_label_map(read_split(source, split, recipe.data.task), recipe.data.label_map)[0]
        check_known(examples, labels, split)
        return examples, labels
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    known = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    if split not in known or not known[split]:
        usable = ", ".join(name for name, part in known.items() if part)
        raise DataError(f"the run has no split '{split}'; it has {usable}. Other texts: --data FOLDER")
    return known[split], labels

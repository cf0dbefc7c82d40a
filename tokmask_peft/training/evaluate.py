"""Score a finished run again: on one of its splits, or on other data."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from tokmask_peft.artifacts import AdapterInfo, find_saved, open_finished
from tokmask_peft.data.corpus import apply_label_map, check_known, load_corpus
from tokmask_peft.data.readers import read_split
from tokmask_peft.errors import DataError, boundary
from tokmask_peft.model.adapter import load_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import plan_loading
from tokmask_peft.model.memory.suggestions import Situation, changed, memory_errors
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import Example, get_task
from tokmask_peft.training.environment import processes
from tokmask_peft.training.scoring import scores_of
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split, training_arguments


@boundary("the evaluation")
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
        The scores of `metrics.scores`, with `by_mixing` if the recipe names language labels, and `not_as_trained`,
        with the reasons, if this machine cannot load the backbone as it was in training.

    Raises:
        RunError, DataError, ModelError: with what to do.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected 1 or more", code="batch-size", batch_size=batch_size)
    folder = open_finished(run)
    recipe = changed(Recipe.load(folder.recipe), {"training.report_to": ()})
    if batch_size is not None:
        recipe = changed(recipe, {"training.eval_batch_size": batch_size})
    task = recipe.data.task
    examples, labels = split_examples(recipe, split, data, folder.adapter)
    saved, device = find_saved(folder.root), processes().device
    set_seed(recipe.seed)
    plan = plan_loading(saved.model, device)
    loading = Situation("loading", gpu=device.type == "cuda")
    with memory_errors(loading):
        backbone = load_backbone(plan.model, task, labels, device)
        model = load_adapter(backbone, folder.adapter)
    texts = Split(examples, backbone.tokenizer, task, labels, recipe.data.max_length)
    bf16 = backbone.dtype == torch.bfloat16
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer creates its folder, and the run may be read-only
        batch = min(recipe.training.eval_batch_size, len(examples))
        evaluating = replace(loading, phase="evaluation", texts=batch)
        with memory_errors(loading):  # an unquantized backbone stays on the host until here
            trainer = OrderedEvalTrainer(
                model=model,
                args=training_arguments(recipe, Path(scratch), device, bf16),
                eval_dataset=texts.dataset,
                data_collator=get_task(task).collator(backbone.tokenizer),
                memory_errors=functools.partial(memory_errors, evaluating),
            )
        found, _, _ = trainer.predict_with_logits(texts)
    result, deviations = scores_of(recipe, found, labels), list(plan.deviations)
    trained = AdapterInfo.read(folder.adapter).loading
    if trained is not None and trained.precision == "bf16" and not bf16:
        deviations.append("trained in bf16, which this machine does not compute in: results differ slightly")
    return result | ({"not_as_trained": deviations} if deviations else {})


def split_examples(
    recipe: Recipe, split: str, data: str | None, adapter: Path
) -> tuple[list[Example], tuple[str, ...]]:
    """Return the texts of a split as the run saw them, or those of a folder or file, and the labels of the adapter.

    Raises:
        DataError: there is no such split, or it cannot be read.
    """
    labels = tuple(AdapterInfo.read(adapter).labels)
    if data is not None:
        source = recipe.data.model_copy(update={"path": data, "test_source": None})
        examples = apply_label_map(read_split(source, split, recipe.data.task), recipe.data.label_map)[0]
        check_known(examples, labels, split)
        return examples, labels
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    known = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    if not known.get(split):
        usable = [name for name, part in known.items() if part]
        problem = f"the run has no split '{split}'; it has {', '.join(usable)}. Other texts: --data FOLDER"
        raise DataError(problem, code="unknown-split", split=split, known=usable)
    return known[split], labels

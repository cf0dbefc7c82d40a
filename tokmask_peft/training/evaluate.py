"""Score a finished run again: on one of its splits, or on other data."""

import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from tokmask_peft.artifacts import AdapterInfo, find_saved, open_finished
from tokmask_peft.data.batches import padded_collator
from tokmask_peft.data.corpus import apply_label_map, check_known, load_corpus, with_unseen
from tokmask_peft.data.readers import READERS, read_split
from tokmask_peft.errors import DataError, boundary
from tokmask_peft.examples import Example
from tokmask_peft.model.adapter import load_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import plan_loading
from tokmask_peft.model.layers import average_words
from tokmask_peft.model.memory.suggestions import Situation, memory_errors
from tokmask_peft.recipe.schema import Recipe, changed
from tokmask_peft.spans import NO_SPANS, Spans
from tokmask_peft.tasks import get_task
from tokmask_peft.training.environment import processes
from tokmask_peft.training.losses import ClassificationLoss
from tokmask_peft.training.scoring import scores_of
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split, training_arguments


@boundary("the evaluation")
def evaluate(
    run: str | Path,
    *,
    split: str | None = None,
    data: str | None = None,
    format: str | None = None,
    text_column: str | int | tuple[str, str] | None = None,
    label_column: str | int | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score the adapter of a run.

    Args:
        run: the run folder.
        split: `train`, `validation` or `test` of the run's own data, as they were split and cleaned in training;
            with `data`, the split or file name there. Default: test, or the file that `data` is.
        data: a file with other labelled texts, whatever its name, or a folder.
        format: of `data`, as `data.format` in a recipe; default: by its ending if the run's data have another one,
            otherwise that of the run, as of the columns.
        text_column: of `data`, as `data.text_column`; two columns for a run on pairs.
        label_column: of `data`, as `data.label_column`.
        batch_size: texts per forward pass, in place of the run's `training.eval_batch_size`.
        trust_remote_code: run the backbone's own code; whatever the run's recipe says, only you can allow it.

    Returns:
        The scores of `metrics.scores`, with `by_mixing` if the recipe names language labels; `warnings` if the texts
        have labels that training lacked; and `not_as_trained`, with the reasons, if this machine cannot load the
        backbone as it was in training.

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
    reading: dict[str, Any] = {"format": format, "text_column": text_column, "label_column": label_column}
    examples, labels = split_examples(recipe, split, data, folder.adapter, **reading)
    warnings = check_known(examples, labels, split or "test" if data is None else data)
    scored = with_unseen(labels, examples)
    saved, device = find_saved(folder.root, trust_remote_code=trust_remote_code), processes().device
    set_seed(recipe.seed)
    plan = plan_loading(saved.model, device)
    loading = Situation("loading", gpu=device.type == "cuda")
    with memory_errors(loading):
        backbone = load_backbone(plan.model, task, labels, device)
        model = load_adapter(backbone, folder.adapter, **saved.loading.trained)
    average_words(backbone.model, saved.loading.label_on)
    spans = None if saved.loading.spans == NO_SPANS else Spans(saved.loading.spans, labels)
    recipe = changed(recipe, {"data.spans": saved.loading.spans})
    texts = Split(examples, backbone.tokenizer, task, scored, recipe.data.max_length, saved.loading.label_on, spans)
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer creates its folder, and the run may be read-only
        batch = min(recipe.training.eval_batch_size, len(texts.windows))
        evaluating = replace(loading, phase="evaluation", texts=batch)
        with memory_errors(loading):  # an unquantized backbone stays on the host until here
            trainer = OrderedEvalTrainer(
                model=model,
                args=training_arguments(recipe, Path(scratch), device, backbone.dtype),
                eval_dataset=texts.window_dataset,
                data_collator=padded_collator(task, backbone.tokenizer),
                memory_errors=functools.partial(memory_errors, evaluating),
                compute_loss_func=ClassificationLoss(),  # a model's own may not fit the labels
                task=get_task(task),
            )
        cuts = get_task(task).cuts_of(labels, saved.info.calibration.model_dump())
        found, _, _ = trainer.predict_windows(texts, cuts)
    result, deviations = scores_of(recipe, found, scored), list(plan.deviations)
    trained = saved.info.loading
    if trained is not None and trained.precision == "bf16" and backbone.dtype != torch.bfloat16:
        deviations.append("trained in bf16, which this machine does not compute in: results differ slightly")
    notes = {"warnings": warnings, "not_as_trained": deviations}
    return result | {key: lines for key, lines in notes.items() if lines}


def split_examples(
    recipe: Recipe, split: str | None, data: str | None, adapter: Path, **reading: str | int | None
) -> tuple[list[Example], tuple[str, ...]]:
    """Return the texts of a split as the run saw them, or those of a folder or file, and the labels of the adapter.

    Without `split` it is test, or the file that `data` is; DataError if there is none. `reading` are `format`,
    `text_column` and `label_column` of `data`, those of the recipe if they are none.
    """
    labels, given = AdapterInfo.read(adapter).labels, {k: v for k, v in reading.items() if v is not None}
    if isinstance(columns := given.get("text_column", recipe.data.pair), tuple) != (recipe.data.pair is not None):
        wanted = "two columns, of a pair" if recipe.data.pair else "one column, not those of a pair"
        raise DataError(f"text_column is {columns!r}, but the run reads {wanted}", code="pair-columns", given=columns)
    if data is not None:
        path, before = Path(data).expanduser(), Path(os.path.expandvars(recipe.data.path or data)).expanduser()
        endings = {part.suffix.lower() for part in (before.iterdir() if before.is_dir() else [before])}
        if path.suffix.lower() in READERS and path.suffix.lower() not in {*endings, ".txt"}:
            given.setdefault("format", "auto")
        source = recipe.data.model_copy(update={"path": data, "test_source": None, **given})
        name = split or (path.name if path.is_file() else "test")
        try:
            return apply_label_map(read_split(source, name, recipe.data.task), recipe.data.label_map)[0], labels
        except DataError as error:
            hint = "All else is as in the run; evaluate takes --split, --format, --text-column and --label-column"
            raise DataError(f"{error}\n{hint}", code=error.code, **error.fields) from error
    if given:
        raise DataError("a format or a column is for other texts: --data FILE", code="no-data", given=tuple(given))
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    known = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    if not (examples := known.get(split or "test")):
        usable = [name for name, part in known.items() if part]
        problem = f"the run has no split '{split or 'test'}'; it has {', '.join(usable)}. Other texts: --data FILE"
        raise DataError(problem, code="unknown-split", split=split or "test", known=usable)
    return examples, labels

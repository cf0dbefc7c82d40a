"""A whole run, from top to bottom: data, backbone, mask, adapter, memory, trainer, loop, scores, files."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from tokmask_peft.artifacts import (
    AdapterInfo,
    Calibration,
    Loading,
    Result,
    Run,
    RunFolder,
    check_run,
    locked,
    start_run,
)
from tokmask_peft.console import Decision, make_console, print_decisions, print_lines, print_result
from tokmask_peft.data.batches import PackedCollator, TokenBudgetSampler, padded_collator
from tokmask_peft.data.corpus import Corpus, count_labels, load_corpus
from tokmask_peft.data.encoding import words_need_a_space
from tokmask_peft.errors import RecipeError, RunError, RunInterruptedError, boundary, whole, write_json
from tokmask_peft.hub.card import write_card
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.embedding import embedding_weight, find_embedding, mask_token_for, prepare_mask_row
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.model.adapter import WEIGHTS, add_adapter, check_fit, gathered_weights, save_adapter
from tokmask_peft.model.backbone import Backbone, load_backbone
from tokmask_peft.model.decisions import PRECISIONS, enable_checkpointing, in_short, out_of_memory
from tokmask_peft.model.layers import average_words, choose_label_on, placement_problem
from tokmask_peft.model.location import check_length
from tokmask_peft.model.memory.suggestions import Phase, Situation, memory_error, memory_errors, smaller_batch
from tokmask_peft.model.packed import choose_batching, enable_padding_free
from tokmask_peft.recipe.loading import to_yaml
from tokmask_peft.recipe.schema import Recipe, TrainingConfig, changed
from tokmask_peft.spans import NO_SPANS
from tokmask_peft.tasks import get_task
from tokmask_peft.training.callbacks import (
    AdapterMoves,
    LogFile,
    Patience,
    ProgressDisplay,
    Resuming,
    StepClock,
    StopOnSignal,
)
from tokmask_peft.training.environment import (
    check_sharding,
    environment,
    peak_memory,
    processes,
    tokens_per_step,
    versions,
)
from tokmask_peft.training.head import choose_head, start_head
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.memory import Lengths, before_training
from tokmask_peft.training.metrics import Predictions
from tokmask_peft.training.scoring import check_best, language_warnings, score_best, warnings_of
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split, check_trackers, training_arguments


@dataclass(frozen=True)
class Prepared:
    """What a training needs, loaded and decided."""

    recipe: Recipe  # with what was decided for this machine
    corpus: Corpus
    splits: Mapping[str, Split]  # `train`, `validation` and, if there is one, `test`
    batches: TokenBudgetSampler | None  # if a budget of sub-tokens makes them
    backbone: Backbone  # as loaded
    model: Any  # the backbone with the adapter
    mask: MaskToken | None  # None if nothing is masked
    decisions: tuple[Decision, ...]
    device: torch.device
    console: Console
    situation: Situation  # what can be changed if memory runs out

    def memory_errors(self, phase: Phase = "training") -> AbstractContextManager[None]:
        """Turn running out of memory into an error that names the keys to change."""
        return memory_errors(replace(self.situation, phase=phase, recipe=self.recipe))


@boundary("the training")
def train(recipe: Recipe | str | Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train a token-masked adapter as a recipe says.

    Args:
        recipe: a recipe, the path of one, or the name of a shipped one.
        resume: continue an interrupted run from its newest checkpoint.
        quiet: print nothing.

    Returns:
        The run: its folder, its recipe, and what `result.json` holds.

    Raises:
        RecipeError, DataError, ModelError, RunError: with what to do.
        RunInterruptedError: on Ctrl-C; the run can be resumed.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    process, folder = processes(), RunFolder(recipe.run_dir)
    with locked(folder) if process.is_main_process else contextlib.nullcontext():
        check_run(recipe, resume)
        try:
            return _train(recipe, folder, process, resume, quiet)
        except KeyboardInterrupt as error:
            if not folder.recipe.is_file():
                raise
            raise RunInterruptedError(f"interrupted; continue with `tokmask train {folder.recipe} --resume`") from error


def _train(recipe: Recipe, folder: RunFolder, process: PartialState, resume: bool, quiet: bool) -> Run:
    console = make_console(quiet or not process.is_main_process)
    check_trackers(recipe.training.report_to)
    check_sharding()
    if recipe.training.auto_batch and process.num_processes > 1:
        remedy = "with several, set training.batch_size yourself"
        raise RunError(f"training.auto_batch works in one process: {remedy}", code="auto-batch-processes")
    process.wait_for_everyone()

    prepared = prepare(recipe, process.device, console)
    before = language_warnings(recipe.model.backbone, prepared.backbone.tokenizer, prepared.corpus.train)
    lines = [f"warning: {warning['message']}" for warning in before]
    print_lines(console, "Data", [*lines, *prepared.corpus.report.lines(), *_cut_lines(prepared)])

    first = prepared.recipe.training
    clock, parameters = StepClock(), _trained(prepared.model) if recipe.training.auto_batch else {}
    untrained = {name: value.detach().cpu().clone() for name, value in parameters.items()}
    with prepared.memory_errors():
        while True:
            try:
                trainer = _attempt(prepared, recipe, folder, clock, resume)
                break
            except (RuntimeError, MemoryError) as error:
                if not (recipe.training.auto_batch and out_of_memory(error)):
                    raise
                reason = in_short(error)  # not the error itself, which keeps the tensors of the step alive
            clear_device_cache(garbage_collection=True)
            prepared = _with_smaller_batches(prepared, first, reason)
            for name, value in _trained(prepared.model).items():
                value.grad = None
                value.data.copy_(untrained[name])
            resume = folder.last_checkpoint() is not None

        probed = Predictions.read(folder.probe) if folder.probe.is_file() else None
        result, predictions = score_best(trainer, prepared.recipe, prepared.corpus, prepared.splits, probed)
        decisions, speed = [asdict(one) for one in prepared.decisions], _speed(prepared, clock, trainer)
        warnings = [*before, *warnings_of(result, trainer.state.log_history)]
        result = replace(result, decisions=decisions, speed=speed, warnings=warnings)
        check_best(trainer, result, prepared.splits["validation"])  # before anything says that the run is finished
        weights = gathered_weights(prepared.model)
        if trainer.is_world_process_zero():
            with whole(folder.adapter) as adapter:
                save_adapter_folder(adapter, prepared, result, weights)
            parts = {name: found.to_dict() for name, found in predictions.items()}
            spans = {"spans": prepared.recipe.data.spans} if prepared.corpus.spans else {}
            write_json(folder.predictions, {"labels": prepared.corpus.all_labels, **spans, **parts}, indent=None)
            write_json(folder.result, result.to_dict())  # last: it says that the run is finished
            print_result(console, result, folder.adapter)
    return Run(folder, recipe, result)


def observe_training(
    recipe: Recipe,
    folder: Path,
    observers: Callable[[OrderedEvalTrainer, MaskToken | None], list[TrainerCallback]],
    *,
    quiet: bool = False,
) -> Recipe:
    """Train as a recipe says, and keep only `log.jsonl`, in `folder`; return the recipe with what was decided.

    For studies of the training itself: there is no evaluation, early stopping, tracker, checkpoint or adapter, and the
    weights move as in `train`. `observers` makes callbacks from the trainer and the mask token, None if nothing is
    masked.
    """
    process = processes()
    if process.num_processes > 1:
        problem = "this training is observed in one process: start it without torchrun or accelerate launch"
        raise RunError(problem, code="one-process")
    recipe = changed(recipe, {"training.patience": None, "training.report_to": ()})
    prepared = prepare(recipe, process.device, make_console(quiet))
    run, display = RunFolder(folder), ProgressDisplay(prepared.console)
    with prepared.memory_errors():
        trainer = make_trainer(prepared, run, [display])
        if prepared.recipe.training.head == "probe":
            start_head(trainer, prepared.splits, recipe.seed)
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        for observer in observers(trainer, prepared.mask):
            trainer.add_callback(observer)
        try:
            with contextlib.closing(display):
                trainer.train()
        finally:
            with contextlib.suppress(OSError):  # the Trainer creates the folder, and nothing is in it
                run.checkpoints.rmdir()
    return prepared.recipe


def prepare(recipe: Recipe, device: torch.device, console: Console) -> Prepared:
    """Load data and backbone, choose the mask token, add the adapter, and see whether memory suffices."""
    data, training = recipe.data, recipe.training
    corpus = load_corpus(data.expanded(), recipe.seed)
    recipe = changed(recipe, {"data.spans": corpus.spans.scheme if corpus.spans else NO_SPANS})

    set_seed(recipe.seed)  # before the head is drawn
    gpu = device.type != "cpu"
    with memory_errors(Situation("loading", recipe, gpu=gpu)):
        backbone = load_backbone(recipe.model, data.task, corpus.labels, device, pairs=data.pair is not None)
    loaded: Any = backbone.model
    check_length(recipe, loaded.config.to_dict())
    batching = choose_batching(training.batching, loaded, recipe, device, backbone.dtype)
    if batching.choice == "padding_free":
        enable_padding_free(backbone.model)

    mask, mask_decision = _choose_mask(recipe, backbone)
    trained_row = mask.id if mask is not None and recipe.masking.trainable_mask else None
    with memory_errors(Situation("loading", recipe, gpu=gpu)):
        model, adapter_decisions = add_adapter(backbone, recipe.adapter, data.task, trained_row)

    head = choose_head(training.head, model, len(corpus.labels))
    carrier = choose_label_on(data.label_on, loaded)
    average_words(loaded, carrier.choice)
    made = {"training.batching": batching.choice, "training.head": head.choice, "data.label_on": carrier.choice}
    recipe = changed(recipe, made)
    parts = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    reading = backbone.tokenizer, data.task, corpus.all_labels, data.max_length, carrier.choice, corpus.spans
    splits = {name: Split(examples, *reading) for name, examples in parts.items() if examples}
    trained, *evaluated = splits.values()
    lengths = Lengths(trained.lengths, tuple([len(window.ids) for window in split.windows] for split in evaluated))
    process, batches = processes(), None
    if (budget := training.tokens_per_batch) is not None:
        here, how = (process.process_index, process.num_processes), recipe.training.batching
        batches = TokenBudgetSampler(trained.lengths, budget // training.views, how, recipe.seed, *here)
    counted = None if batches is None else len(batches)
    numbers = training.decided(len(trained.lengths), counted, process.num_processes)
    recipe = changed(recipe, {f"training.{key}": value for key, value in numbers.items()})
    recipe, memory_decision, warning = before_training(recipe, backbone, batching.choice, lengths, device)
    if recipe.model.gradient_checkpointing is True:
        enable_checkpointing(model)
    if warning is not None:
        console.print(f"{warning}\n", markup=False)
    why = f"is auto, and there are {len(trained.lengths):,} training texts"
    decisions = (
        *corpus.report.decisions,
        *backbone.decisions,
        *(
            Decision(key.replace("_", " "), f"{value:g}", f"training.{key} {why}")
            for key, value in numbers.items()
            if value is not None and not (key == "epochs" and training.max_steps)
        ),
        *([carrier] if carrier.choice != "first" and get_task(data.task).words_given else []),
        batching,
        memory_decision,
        mask_decision,
        *adapter_decisions,
        *([head] if training.head == "probe" else []),
    )
    print_decisions(console, decisions)
    movable, checkpointable = placement_problem(backbone.model) is None, loaded.supports_gradient_checkpointing
    situation = Situation("training", movable=movable, checkpointable=checkpointable, gpu=gpu)
    return Prepared(recipe, corpus, splits, batches, backbone, model, mask, decisions, device, console, situation)


def _choose_mask(recipe: Recipe, backbone: Backbone) -> tuple[MaskToken | None, Decision]:
    """Choose the mask token, and fill its embedding row if that is trained."""
    masking = recipe.masking
    if masking.is_off and not masking.trainable_mask:
        return None, Decision("mask token", "none", "masking.p is 0: nothing is masked")
    embedding = find_embedding(backbone.model)
    rows = embedding_weight(embedding).shape[0]
    if outside := [token_id for token_id in masking.protect if token_id >= rows]:
        problem = f"masking.protect: {outside} are outside the embedding, which has rows 0 to {rows - 1}"
        raise RecipeError([problem], code="unknown-token", ids=outside)
    mask = mask_token_for(embedding, backbone.tokenizer, masking)
    if masking.trainable_mask:
        prepare_mask_row(embedding, mask, backbone.tokenizer, trained=True)
    return mask, Decision("mask token", "none" if mask.kind == "none" else f"id {mask.id} ({mask.kind})", mask.reason)


def make_trainer(prepared: Prepared, run: RunFolder, callbacks: list[TrainerCallback]) -> OrderedEvalTrainer:
    """Return the trainer, with `callbacks` in addition to those of every training."""
    recipe, training, task = prepared.recipe, prepared.recipe.training, get_task(prepared.recipe.data.task)
    tokenizer, validation = prepared.backbone.tokenizer, prepared.splits["validation"]
    patience = [Patience(training.patience)] if isinstance(training.patience, int) else []
    counts = count_labels(prepared.corpus.train)
    weights = class_weights(training.class_weights, {label: counts[label] for label in prepared.corpus.labels})
    gamma = training.focal_gamma if training.loss == "focal" else 0.0
    arguments = training_arguments(recipe, run.checkpoints, prepared.device, prepared.backbone.dtype)
    with prepared.memory_errors("loading"):  # an unquantized backbone stays on the host until here
        trainer = OrderedEvalTrainer(
            model=prepared.model,
            args=arguments,
            train_dataset=prepared.splits["train"].encoded.dataset,
            eval_dataset=validation.dataset,
            data_collator=padded_collator(task.name, tokenizer),
            train_collator=PackedCollator(task.name) if training.batching == "padding_free" else None,
            batches=prepared.batches,
            processing_class=tokenizer,
            compute_loss_func=ClassificationLoss(weights, gamma, training.label_smoothing),
            compute_metrics=validation.metrics,
            memory_errors=functools.partial(prepared.memory_errors, "evaluation"),
            views=training.views,
            views_masked=training.views_masked,
            consistency=training.consistency,
            task=task,
            callbacks=[*callbacks, LogFile(run.log, arguments.world_size), *patience],
        )
    if prepared.mask is not None:
        TokenMaskCallback(recipe.masking, prepared.mask, announce=False).add_to(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _attempt(prepared: Prepared, asked: Recipe, run: RunFolder, clock: StepClock, resume: bool) -> OrderedEvalTrainer:
    """Train to the end of the recipe; a signal or a lack of memory ends it earlier, with an exception."""
    stop, display = StopOnSignal(), ProgressDisplay(prepared.console)
    trainer = make_trainer(prepared, run, [clock, stop, display, AdapterMoves(), Resuming()])
    if trainer.is_world_process_zero():  # not before: a mistake found until here leaves no folder behind
        listed = ", ".join(f"{name} {version}" for name, version in versions().items())
        repeat = f"tokmask train {asked.run_dir / 'recipe.yaml'} name={asked.name}-again"
        head = f"# The resolved recipe of this run. Versions: {listed}.\n# Repeat it: {repeat}\n"
        weights = {f"backbone ({kind})": found for kind, found in prepared.backbone.weights.items()}
        start_run(run, head + to_yaml(asked), prepared.corpus.fingerprint() | weights)
    trainer.accelerator.wait_for_everyone()
    say = functools.partial(prepared.console.print, markup=False, soft_wrap=True)
    checkpoint = run.last_checkpoint(say) if resume else None
    if resume and checkpoint is None:
        say("There is no whole checkpoint: starting from the beginning.")
    step = f"the training in {run.root}" if checkpoint is None else f"the training from {checkpoint}"
    with boundary(step, RunError), stop, contextlib.closing(display):
        if checkpoint is not None and (checkpoint / WEIGHTS).is_file():  # FSDP may save shards instead
            check_fit(prepared.model, prepared.backbone.tokenizer, checkpoint)
        if checkpoint is None and prepared.recipe.training.head == "probe":
            line, probed = start_head(trainer, prepared.splits, prepared.recipe.seed)
            say(line)
            if trainer.is_world_process_zero():  # a resumed run takes the head from its checkpoint
                write_json(run.probe, probed.to_dict(), indent=None)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        where = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise RunInterruptedError(f"{where}; continue with `tokmask train {run.recipe} --resume`")
    return trainer


def save_adapter_folder(
    folder: Path, prepared: Prepared, result: Result, weights: dict[str, torch.Tensor] | None
) -> None:
    """Write an adapter folder: weights (from `gathered_weights`), tokenizer, `tokmask.json` and the model card."""
    recipe, backbone, task = prepared.recipe, prepared.backbone, get_task(prepared.recipe.data.task)
    mask = prepared.mask
    save_adapter(prepared.model, folder, recipe.model.backbone, weights)
    backbone.tokenizer.save_pretrained(str(folder))
    place = recipe.model.backbone_path or ""
    AdapterInfo(
        task=task.name,
        labels=tuple(result.labels),
        pair=recipe.data.pair,
        calibration=Calibration(**result.calibration),
        loading=Loading(
            max_length=recipe.data.max_length,
            package=place if place.startswith("package:") else None,
            revision=recipe.model.revision,
            quantization=backbone.quantization,
            precision=PRECISIONS[backbone.dtype],
            embedding=recipe.model.embedding,
            attention=recipe.model.attention,
            pooling="auto" if task.words_given else recipe.model.pooling,
            label_on=recipe.data.label_on,
            spans=recipe.data.spans,
            weights=backbone.weights,
            scaling=recipe.adapter.scaling,
        ),
        masking=recipe.masking.model_copy(update={"mask_token": mask.id} if mask and mask.kind != "none" else {}),
    ).write(folder)
    write_card(folder, recipe, result, spaced_words=task.words_given and words_need_a_space(backbone.tokenizer))


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _with_smaller_batches(prepared: Prepared, first: TrainingConfig, reason: str) -> Prepared:
    """Take fewer texts at a time, after memory ran out for `reason`; the Trainer's own way makes steps smaller, too."""
    training = prepared.recipe.training
    smaller = smaller_batch(training.micro_batch, training.gradient_accumulation)
    if smaller is None:
        what = f"with a single text of up to {prepared.recipe.data.max_length} sub-tokens"
        raise memory_error(replace(prepared.situation, recipe=prepared.recipe), what, reason, RunError)
    texts, times = smaller
    prepared.console.print(f"Out of memory: continuing with {texts} texts, {times} times a step.")
    why = f"{first.micro_batch} times {first.gradient_accumulation} ran out of memory"
    decisions = [decision for decision in prepared.decisions if decision.what != "micro-batch"]
    decisions.append(Decision("micro-batch", f"{texts} times {times}", why))
    size = {"training.batch_size": texts, "training.gradient_accumulation": times}
    return replace(prepared, recipe=changed(prepared.recipe, size), decisions=tuple(decisions))


def _cut_lines(prepared: Prepared) -> list[str]:
    """Report what does not fit into `data.max_length` sub-tokens."""
    data, found = prepared.recipe.data, []
    at = f"{data.max_length} sub-tokens"
    for name, split in prepared.splits.items():
        if name == "train" or data.pair:
            cut, what = split.encoded.truncation, "pair" if data.pair else "text"
            words = f"; {cut.words_cut} words are cut away" if cut.words_cut else ""
            found.append((name, cut.texts_cut, what, f"cut at {at}{words if name == 'train' else ', as in predict'}"))
        else:
            long = sum(count > 1 for count in Counter(window.text for window in split.windows).values())
            choice = "; cut where the checkpoint is chosen" if name == "validation" else ""
            found.append((name, long, "text", f"longer than {at} and scored in windows, as in predict{choice}"))
    return [
        f"{name}: {count} {what}{' is' if count == 1 else 's are'} {fate}" for name, count, what, fate in found if count
    ]


def _speed(prepared: Prepared, clock: StepClock, trainer: OrderedEvalTrainer) -> dict[str, Any]:
    """Return what `result.json` holds of time and memory, of all processes together."""
    lengths, batches = prepared.splits["train"].lengths, None if trainer.batches is None else len(trainer.batches)
    per_step = tokens_per_step(prepared.recipe.training, lengths, batches, trainer.args.world_size)
    return {
        "step_seconds": round(clock.seconds, 2),
        "steps": clock.steps,
        "tokens_per_second": round(clock.steps * per_step / clock.seconds, 1) if clock.seconds else None,
        "peak_memory": peak_memory(prepared.device, clock.loading),
        "environment": environment(prepared.device),
    }

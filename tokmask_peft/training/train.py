"""A whole run: the training, and the model card beside the adapter."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, set_seed

from tokmask_peft.artifacts import LOADING_FILE, Loading, RunFolder, check_run, start_run, write_json
from tokmask_peft.console import Decision, make_console, print_decisions, print_lines, print_result
from tokmask_peft.data.batches import PackedCollator, TokenBudgetSampler
from tokmask_peft.data.corpus import Corpus, load_corpus
from tokmask_peft.data.encoding import words_need_a_space
from tokmask_peft.errors import RecipeError, RunError, RunInterruptedError
from tokmask_peft.hub.card import write_card
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.embedding import embedding_weight, find_embedding
from tokmask_peft.masking.replacement import MaskToken, choose_mask_token, fill_spare_row, used_rows
from tokmask_peft.model.adapter import add_adapter, gathered_weights, save_adapter
from tokmask_peft.model.backbone import Backbone, load_backbone
from tokmask_peft.model.decisions import can_checkpoint, enable_checkpointing, in_short, out_of_memory
from tokmask_peft.model.memory.suggestions import changed, smaller_batch
from tokmask_peft.model.packed import choose_batching, enable_padding_free
from tokmask_peft.model.placement import placement_problem
from tokmask_peft.recipe.loading import to_yaml
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.callbacks import AdapterMoves, LogFile, Patience, ProgressDisplay, StepClock, StopOnSignal
from tokmask_peft.training.environment import check_sharding, environment, peak_memory, processes, versions
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.memory import (
    Lengths,
    before_training,
    explained_memory_errors,
    single_text_error,
    tokens_per_step,
)
from tokmask_peft.training.metrics import Predictions
from tokmask_peft.training.scoring import check_best, score_best
from tokmask_peft.training.trainer import (
    OrderedEvalTrainer,
    Split,
    argmax_logits,
    check_trackers,
    collator,
    scorer,
    training_arguments,
)


class CardWriter(Protocol):
    """Writes the model card of an adapter; the layers above training know how (`hub.card.write_card`)."""

    def __call__(self, folder: Path, recipe: Recipe, result: Mapping[str, Any], *, spaced_words: bool) -> None:
        """Write the card of the adapter in `folder`; `spaced_words` as for `hub.card.model_card`."""


def save_adapter_folder(
    folder: Path,
    model: Any,
    backbone: Backbone,
    recipe: Recipe,
    mask: MaskToken | None,
    result: Mapping[str, Any],
    write_card: CardWriter,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter, tokenizer, labels, calibration, how to load and how it was masked, and the card.

    Args:
        folder: is made.
        model: with the adapter.
        backbone: its backbone, as loaded.
        recipe: as trained.
        mask: the mask token; none where nothing was masked.
        result: what `result.json` will hold.
        write_card: writes the model card.
        weights: what is trained, where FSDP holds it in shards (`gathered_weights`).
    """
    save_adapter(model, folder, recipe.model.backbone, weights)
    backbone.tokenizer.save_pretrained(str(folder))
    write_json(folder / "labels.json", {"task": recipe.data.task, "labels": list(result["labels"])})
    write_json(folder / "calibration.json", result["calibration"])
    precision = "bf16" if backbone.dtype == torch.bfloat16 else "fp32"
    loading = Loading.of(recipe.model, recipe.data.max_length, backbone.quantization, precision)
    write_json(folder / LOADING_FILE, loading.to_dict())
    masking = recipe.masking if mask is None else recipe.masking.model_copy(update={"mask_token": mask.id})
    masking.save_pretrained(folder)
    spaced = recipe.data.task == "token" and words_need_a_space(backbone.tokenizer)
    write_card(folder, recipe, result, spaced_words=spaced)


T = TypeVar("T")


def with_smaller_batches(
    model: nn.Module,
    recipe: Recipe,
    attempt: Callable[[], T],
    retry: Callable[[int, int], T],
    alone: Callable[[str], RunError],
) -> T:
    """Train; where memory runs out, go on with a smaller micro-batch and the same optimizer step.

    The Trainer's own `auto_find_batch_size` makes the optimizer step smaller, too, and keeps half-trained weights.

    Args:
        model: its trained weights are set back before every retry.
        recipe: says what is tried first.
        attempt: trains as the recipe says.
        retry: trains with other texts per forward pass and forward passes per optimizer step.
        alone: makes the error for a single text that takes too much, from the allocator's words.

    Returns:
        What the attempt returned that had enough memory.

    Raises:
        RunError: memory runs out with a single text.
    """
    start = {name: value.detach().cpu().clone() for name, value in _trained(model)}
    training = recipe.training
    sizes = [(training.batch_size, training.gradient_accumulation)]
    while smaller := smaller_batch(*sizes[-1]):
        sizes.append(smaller)
    left, said = iter(sizes[1:]), ""

    def run(batch_size: int) -> T:
        nonlocal said
        try:
            return begin(batch_size)
        except (RuntimeError, MemoryError) as error:
            said = in_short(error)  # not the error itself, which would hold the tensors of the step
            if out_of_memory(error) and not should_reduce_batch_size(error):
                raise torch.OutOfMemoryError("CUDA out of memory.") from error  # in words that accelerate knows
            raise

    def begin(batch_size: int) -> T:
        if batch_size == training.batch_size:
            return attempt()
        with torch.no_grad():
            for name, value in _trained(model):
                value.grad = None
                value.copy_(start[name])
        return retry(batch_size, dict(sizes)[batch_size])

    def smaller_size() -> int:
        size = next(left, None)
        if size is None:
            raise alone(said)
        return size[0]

    found: T = find_executable_batch_size(run, sizes[0][0], reduce_batch_size_fn=smaller_size)()
    return found


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    folder: RunFolder
    result: dict[str, Any]


class Session:
    """The parts of one training session, so that they need not be handed from function to function."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        backbone: Backbone,
        model: Any,
        mask: MaskToken | None,
        run: RunFolder,
        console: Console,
        device: torch.device,
    ) -> None:
        self.recipe, self.corpus, self.backbone, self.model = recipe, corpus, backbone, model
        self.mask, self.run, self.console, self.device = mask, run, console, device
        self.movable = placement_problem(backbone.model) is None
        self.checkpointable = can_checkpoint(backbone.model)
        self.train = self._split(corpus.train)
        self.validation = self._split(corpus.validation)
        self.test = self._split(corpus.test) if corpus.test else None

    def decide_on_memory(self) -> Decision:
        """Decide on gradient checkpointing, and warn of what will not fit."""
        evaluated = (self.validation, self.test) if self.test is not None else (self.validation,)
        lengths = Lengths(
            self.train.encoded.dataset["length"], tuple(split.encoded.dataset["length"] for split in evaluated)
        )
        batching = self.recipe.training.batching
        self.recipe, decision, warning = before_training(self.recipe, self.backbone, batching, lengths, self.device)
        if self.recipe.model.gradient_checkpointing is True:
            enable_checkpointing(self.model)
        if warning is not None:
            self.console.print(f"{warning}\n", markup=False)
        return decision

    def _split(self, examples: Any) -> Split:
        data = self.recipe.data
        return Split.make(examples, self.backbone.tokenizer, data.task, self.corpus.labels, data.max_length)

    def run_to_end(
        self, decisions: tuple[Decision, ...], resume: bool, recipe_text: str, write_card: CardWriter
    ) -> Run:
        """Train, score the best checkpoint, and write the run folder.

        Raises:
            RunError: the run went wrong in a way that would pass unnoticed.
            RunInterruptedError: a signal stopped it; it can be resumed.
        """
        asked = self.recipe.training
        lines = list(self.corpus.report.lines())
        parts = {"train": self.train, "validation": self.validation}
        if self.test is not None:
            parts["test"] = self.test
        for name, split in parts.items():
            if (cut := split.encoded.truncation).texts_cut:
                lines.append(f"{name}: {cut.texts_cut} texts are cut at {self.recipe.data.max_length} sub-tokens")
                if cut.words_cut:
                    wrong = name != "train" and self.recipe.data.task == "token"
                    lines[-1] += f"; {cut.words_cut} words are cut away" + (" (errors)" if wrong else "")
        print_lines(self.console, "Data", lines)
        clock = StepClock()

        def attempt(go_on: bool = resume) -> OrderedEvalTrainer:
            stop, display = StopOnSignal(), ProgressDisplay(self.console)
            trainer = self.trainer([clock, stop, display, AdapterMoves()])
            if trainer.is_world_process_zero():  # not before: a mistake found until here leaves no folder behind
                start_run(self.run, recipe_text)
            trainer.accelerator.wait_for_everyone()
            try:
                with stop:
                    trainer.train(resume_from_checkpoint=self._checkpoint(go_on))
            finally:
                display.close()
            if stop.stopped:
                raise RunInterruptedError(
                    f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
                    f"continue with `tokmask train {self.run.recipe} --resume`"
                )
            return trainer

        def retry(batch_size: int, accumulation: int) -> OrderedEvalTrainer:
            size = {"training.batch_size": batch_size, "training.gradient_accumulation": accumulation}
            self.recipe = changed(self.recipe, size)
            told = f"Out of memory: going on with {batch_size} texts, {accumulation} times a step."
            self.console.print(told, markup=False)
            return attempt(self.run.last_checkpoint() is not None)

        alone = functools.partial(single_text_error, self.recipe, self.movable, self.checkpointable)
        retried = functools.partial(with_smaller_batches, self.model, self.recipe, attempt, retry, alone)
        trainer = retried() if asked.auto_batch else attempt()
        if self.recipe.training.batch_size != asked.batch_size:
            texts = f"{self.recipe.training.batch_size} times {self.recipe.training.gradient_accumulation}"
            reason = f"{asked.batch_size} times {asked.gradient_accumulation} ran out of memory"
            decisions = (*decisions, Decision("micro-batch", texts, reason))
        result, predictions = score_best(trainer, self.recipe, self.corpus, parts)
        result["decisions"] = [asdict(decision) for decision in decisions]
        result["speed"] = self._speed(clock, trainer)
        weights = gathered_weights(self.model)
        if trainer.is_world_process_zero():
            self._save(result, predictions, weights, write_card)
            print_result(self.console, result, self.run.adapter)
            check_best(result, trainer.state.best_metric)
        return Run(self.run, result)

    def memory_errors(self, evaluating: bool = False, loading: bool = False) -> AbstractContextManager[None]:
        """Explain, as `explained_memory_errors` does, running out of memory in this session's training."""
        return explained_memory_errors(self.recipe, self.movable, self.checkpointable, evaluating, loading)

    def _checkpoint(self, resume: bool) -> str | None:
        newest = self.run.last_checkpoint() if resume else None
        if resume and newest is None:
            self.console.print("No checkpoint yet: starting from the beginning.")
        return str(newest) if newest else None

    def trainer(self, callbacks: list[Any]) -> OrderedEvalTrainer:
        """Return the trainer, with callbacks on top of those of every training."""
        training, masking = self.recipe.training, self.recipe.masking
        if self.mask is not None:
            config = masking if masking.seed is not None else masking.model_copy(update={"seed": self.recipe.seed})
            callbacks.insert(0, TokenMaskCallback(config, self.mask, announce=False))
        callbacks.append(LogFile(self.run.log))
        if training.patience is not None:
            callbacks.append(Patience(training.patience))
        gamma = training.focal_gamma if training.loss == "focal" else 0.0
        weights = class_weights(training.class_weights, self._label_counts())
        arguments = training_arguments(
            self.recipe, self.run.checkpoints, self.device, self.backbone.dtype == torch.bfloat16
        )
        with self.memory_errors(loading=True):  # an unquantized backbone lies on the host until here
            trainer = OrderedEvalTrainer(
                batches=self._token_budget(arguments),
                model=self.model,
                args=arguments,
                train_dataset=self.train.encoded.dataset,
                eval_dataset=self.validation.dataset,
                data_collator=collator(self.backbone.tokenizer, self.recipe.data.task),
                processing_class=self.backbone.tokenizer,
                memory_errors=functools.partial(self.memory_errors, evaluating=True),
                train_collator=PackedCollator(self.recipe.data.task) if training.batching == "padding_free" else None,
                compute_loss_func=ClassificationLoss(weights, gamma, training.label_smoothing),
                compute_metrics=scorer(self.validation),
                preprocess_logits_for_metrics=argmax_logits,
                callbacks=callbacks,
            )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        return trainer

    def _token_budget(self, arguments: Any) -> TokenBudgetSampler | None:
        training, lengths = self.recipe.training, self.train.encoded.dataset["length"]
        if training.tokens_per_batch is None:
            return None
        here = arguments.process_index, arguments.world_size
        try:
            return TokenBudgetSampler(lengths, training.tokens_per_batch, training.batching, self.recipe.seed, *here)
        except ValueError as error:
            remedy = "set it higher, or data.max_length lower"
            raise RecipeError([f"training.tokens_per_batch: {error}; {remedy}"], source=self.recipe.name) from error

    def _label_counts(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for example in self.corpus.train:
            counts.update([example.label] if isinstance(example.label, str) else example.label or ())
        return {label: counts[label] for label in self.corpus.labels}

    def _speed(self, clock: StepClock, trainer: OrderedEvalTrainer) -> dict[str, Any]:
        budget = self._token_budget(trainer.args)
        batches = None if budget is None else len(budget)
        lengths = self.train.encoded.dataset["length"]
        per_step = tokens_per_step(self.recipe.training, lengths, batches, trainer.args.world_size)
        return {
            "step_seconds": round(clock.seconds, 2),
            "steps": clock.steps,
            # of all processes together
            "tokens_per_second": round(clock.steps * per_step / clock.seconds, 1) if clock.seconds else None,
            "peak_memory": peak_memory(self.device),
            "environment": environment(self.device),
        }

    def _save(
        self,
        result: dict[str, Any],
        predictions: dict[str, Predictions],
        weights: dict[str, torch.Tensor] | None,
        write_card: CardWriter,
    ) -> None:
        parts = self.model, self.backbone, self.recipe, self.mask
        save_adapter_folder(self.run.adapter, *parts, result, write_card, weights)
        found = {name: part.to_dict() for name, part in predictions.items()}
        write_json(self.run.predictions, {"labels": list(self.corpus.labels), **found}, indent=None)
        write_json(self.run.result, result)  # last: it says that the run is finished


def fit(recipe: Recipe, write_card: CardWriter, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train as `tokmask_peft.training.train.train` says, which also tells what is returned and raised.

    Args:
        recipe: what to train.
        write_card: writes the model card, before `result.json` says that the run is finished.
        resume: continue an interrupted run from its newest checkpoint.
        quiet: print nothing.
    """
    state = processes()
    console = make_console(quiet or not state.is_main_process)
    run = check_run(recipe, resume)
    check_trackers(recipe.training.report_to)
    check_sharding()
    if recipe.training.auto_batch and state.num_processes > 1:
        raise RunError("training.auto_batch works in one process: with several, set training.batch_size yourself")
    state.wait_for_everyone()
    session, decisions, text = _open(recipe, run, console, state.device)
    print_decisions(console, decisions)
    with session.memory_errors():
        return session.run_to_end(decisions, resume, text, write_card)


def train_only(
    recipe: Recipe,
    folder: Path,
    observers: Callable[[OrderedEvalTrainer, MaskToken | None], list[TrainerCallback]],
    *,
    quiet: bool = False,
) -> Recipe:
    """Train as a recipe says, and keep nothing: no evaluation, checkpoints, scores or adapter.

    For studies that look at the training itself. The weights move as in `fit`.

    Args:
        recipe: early stopping and trackers are switched off in it.
        folder: takes `log.jsonl`.
        observers: makes callbacks from the trainer and the mask token, which is none where nothing is masked.
        quiet: print nothing.

    Returns:
        The recipe with what was decided for this machine.

    Raises:
        RecipeError, DataError, ModelError, RunError: with what to do.
    """
    state = processes()
    if state.num_processes > 1:
        raise RunError("this training is observed in one process: start it without torchrun or accelerate launch")
    quiet_training = recipe.training.model_copy(update={"patience": None, "report_to": ()})
    recipe = recipe.model_copy(update={"training": quiet_training})
    console = make_console(quiet)
    session, decisions, _ = _open(recipe, RunFolder(folder), console, state.device)
    print_decisions(console, decisions)
    display = ProgressDisplay(console)
    with session.memory_errors():
        trainer = session.trainer([display])
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        for observer in observers(trainer, session.mask):
            trainer.add_callback(observer)
        try:
            trainer.train()
        finally:
            display.close()
            with contextlib.suppress(OSError):  # the Trainer makes the folder, and nothing is in it
                session.run.checkpoints.rmdir()
    return session.recipe


def _open(
    recipe: Recipe, run: RunFolder, console: Console, device: torch.device
) -> tuple[Session, tuple[Decision, ...], str]:
    """Load data and backbone and add the adapter; return the session, its decisions and the recipe's text."""
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    set_seed(recipe.seed)  # before the head is drawn
    with explained_memory_errors(recipe, movable=False, loading=True):
        backbone = load_backbone(recipe.model, recipe.data.task, corpus.labels, device)
    mask, mask_decisions = _choose_mask(recipe, backbone)
    batching = choose_batching(
        recipe.training.batching, backbone.model, neftune=recipe.training.neftune_alpha is not None
    )
    if batching.choice == "padding_free":
        enable_padding_free(backbone.model)
    trained_row = mask.id if mask is not None and recipe.masking.trainable_mask else None
    with explained_memory_errors(recipe, movable=False, loading=True):
        model, decisions = add_adapter(backbone, recipe.adapter, recipe.data.task, trained_row)
    text = _recipe_text(recipe)
    batched = recipe.training.model_copy(update={"batching": batching.choice})
    recipe = recipe.model_copy(update={"training": batched})
    session = Session(recipe, corpus, backbone, model, mask, run, console, device)
    decisions = (*backbone.decisions, batching, session.decide_on_memory(), *mask_decisions, *decisions)
    return session, decisions, text


def _recipe_text(recipe: Recipe) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = f"# The resolved recipe of this run. Versions: {listed}.\n"
    return (
        f"{head}# Repeat it: tokmask train {recipe.run_dir / 'recipe.yaml'} name={recipe.name}-again\n{to_yaml(recipe)}"
    )


def _choose_mask(recipe: Recipe, backbone: Backbone) -> tuple[MaskToken | None, tuple[Decision, ...]]:
    config = recipe.masking
    if config.is_off and not config.trainable_mask:
        return None, (Decision("mask token", "none", "masking.p is 0: nothing is masked"),)
    embedding = find_embedding(backbone.model)
    rows = embedding_weight(embedding).shape[0]
    outside = [token_id for token_id in config.protect if token_id >= rows]
    if outside:
        raise RecipeError([f"masking.protect: {outside} lie outside the embedding, which has rows 0 to {rows - 1}"])
    mask = choose_mask_token(backbone.tokenizer, rows, config.mask_token)
    if config.trainable_mask and mask.kind == "spare":
        fill_spare_row(embedding, mask, used_rows(backbone.tokenizer))
    return mask, (Decision("mask token", f"id {mask.id} ({mask.kind})", mask.reason),)


def train(recipe: Recipe | str | Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train a token-masked adapter as a recipe says.

    Args:
        recipe: a recipe, the path of one, or the name of a shipped one.
        resume: continue an interrupted run from its newest checkpoint.
        quiet: print nothing.

    Returns:
        The run: its folder, and what `result.json` holds.

    Raises:
        RecipeError, DataError, ModelError, RunError: with what to do.
        RunInterruptedError: on Ctrl-C; the run can be resumed.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    return fit(recipe, write_card, resume=resume, quiet=quiet)

"""From a recipe to a run: train, keep the best checkpoint, score it, and leave the evidence."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from tokmask_peft.card import write_card
from tokmask_peft.console import ProgressDisplay, make_console, print_decisions, print_lines, print_result
from tokmask_peft.data import Corpus, PackedCollator, load_corpus
from tokmask_peft.data.encode import words_need_a_space
from tokmask_peft.data.token_budget import TokenBudgetSampler
from tokmask_peft.errors import RecipeError, RunError, RunInterruptedError
from tokmask_peft.masking import MaskToken, TokenMaskCallback, choose_mask_token
from tokmask_peft.masking.embedding import embedding_weight, find_embedding
from tokmask_peft.masking.mask_token import fill_spare_row, used_rows
from tokmask_peft.model.adapter import add_adapter, save_adapter
from tokmask_peft.model.backbone import Backbone, load_backbone
from tokmask_peft.model.checkpointing import enable_checkpointing
from tokmask_peft.model.decisions import Decision
from tokmask_peft.model.loading import LOADING_FILE, Loading
from tokmask_peft.model.memory.remedies import changed, smaller_batch
from tokmask_peft.model.padding_free import choose_batching, enable_padding_free
from tokmask_peft.recipe import Recipe
from tokmask_peft.recipe_io import to_yaml
from tokmask_peft.training.baseline import baseline_scores
from tokmask_peft.training.calibration import calibrate
from tokmask_peft.training.callbacks import AdapterMoves, LogFile, StepClock, StopOnSignal
from tokmask_peft.training.environment import environment, peak_memory, processes, versions
from tokmask_peft.training.fits import before_training
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.metrics import Predictions, scores, scores_by_mixing
from tokmask_peft.training.out_of_memory import explained_memory_errors
from tokmask_peft.training.run_folder import RunFolder, check_run, start_run, write_json
from tokmask_peft.training.splits import Split
from tokmask_peft.training.trainer import (
    OrderedEvalTrainer,
    argmax_logits,
    check_trackers,
    collator,
    scorer,
    training_arguments,
)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    folder: RunFolder
    result: dict[str, Any]


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
    state = processes()
    console = make_console(quiet or not state.is_main_process)
    run = check_run(recipe, resume)
    check_trackers(recipe.training.report_to)
    if recipe.training.auto_batch and state.num_processes > 1:
        raise RunError("training.auto_batch works in one process: with several, set training.batch_size yourself")
    state.wait_for_everyone()
    session, decisions, text = _open(recipe, run, console, state.device)
    print_decisions(console, decisions)
    with explained_memory_errors(session.recipe):
        return session.run_to_end(decisions, resume, text)


def train_only(
    recipe: Recipe,
    folder: Path,
    observers: Callable[[OrderedEvalTrainer, MaskToken | None], list[TrainerCallback]],
    *,
    quiet: bool = False,
) -> Recipe:
    """Train as a recipe says, and keep nothing: no evaluation, checkpoints, scores or adapter.

    For studies that look at the training itself. The weights move as in `train`.

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
    with explained_memory_errors(session.recipe):
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
) -> tuple[_Session, tuple[Decision, ...], str]:
    """Load data and backbone and add the adapter; return the session, its decisions and the recipe's text."""
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    set_seed(recipe.seed)  # before the head is drawn
    backbone = load_backbone(recipe.model, recipe.data.task, corpus.labels, device)
    mask, mask_decisions = _choose_mask(recipe, backbone)
    batching = choose_batching(
        recipe.training.batching, backbone.model, neftune=recipe.training.neftune_alpha is not None
    )
    if batching.choice == "padding_free":
        enable_padding_free(backbone.model)
    trained_row = mask.id if mask is not None and recipe.masking.trainable_mask else None
    model, decisions = add_adapter(backbone, recipe.adapter, recipe.data.task, trained_row)
    text = _recipe_text(recipe)
    batched = recipe.training.model_copy(update={"batching": batching.choice})
    recipe = recipe.model_copy(update={"training": batched})
    session = _Session(recipe, corpus, backbone, model, mask, run, console, device)
    decisions = (*backbone.decisions, batching, session.decide_on_memory(), *mask_decisions, *decisions)
    return session, decisions, text


def _trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


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


class _Session:
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
        self.train = self._split(corpus.train)
        self.validation = self._split(corpus.validation)
        self.test = self._split(corpus.test) if corpus.test else None
        self.predictions: dict[str, Predictions] = {}

    def decide_on_memory(self) -> Decision:
        """Decide on gradient checkpointing, and warn of what will not fit."""
        lengths = self.train.encoded.dataset["length"]
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

    def run_to_end(self, decisions: tuple[Decision, ...], resume: bool, recipe_text: str) -> Run:
        asked = self.recipe.training
        lines = list(self.corpus.report.lines())
        for name, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if split is not None and (cut := split.encoded.truncation).texts_cut:
                lines.append(f"{name}: {cut.texts_cut} texts are cut at {self.recipe.data.max_length} sub-tokens")
                if cut.words_cut:
                    lines[-1] += f"; {cut.words_cut} words are cut away" + ("" if name == "train" else " (errors)")
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

        trainer = self._with_smaller_batches(attempt) if self.recipe.training.auto_batch else attempt()
        if self.recipe.training.batch_size != asked.batch_size:
            texts = f"{self.recipe.training.batch_size} times {self.recipe.training.gradient_accumulation}"
            reason = f"{asked.batch_size} times {asked.gradient_accumulation} ran out of memory"
            decisions = (*decisions, Decision("micro-batch", texts, reason))
        result = self._evaluate(trainer)
        result["decisions"] = [asdict(decision) for decision in decisions]
        result["speed"] = self._speed(clock, trainer)
        if trainer.is_world_process_zero():
            self._save(result)
            print_result(self.console, result, self.run.adapter)
            _check_best(result, trainer.state.best_metric)
        return Run(self.run, result)

    def _with_smaller_batches(self, attempt: Callable[..., OrderedEvalTrainer]) -> OrderedEvalTrainer:
        """Train; where memory runs out, go on with a smaller micro-batch and the same optimizer step.

        The Trainer's own `auto_find_batch_size` makes the optimizer step smaller, too, and keeps half-trained weights.
        """
        start = {name: value.detach().cpu().clone() for name, value in _trained(self.model)}
        training = self.recipe.training
        sizes = [(training.batch_size, training.gradient_accumulation)]
        while smaller := smaller_batch(*sizes[-1]):
            sizes.append(smaller)
        left = iter(sizes[1:])

        def run(batch_size: int) -> OrderedEvalTrainer:
            if batch_size != training.batch_size:
                with torch.no_grad():
                    for name, value in _trained(self.model):
                        value.grad = None
                        value.copy_(start[name])
                size = {"batch_size": batch_size, "gradient_accumulation": dict(sizes)[batch_size]}
                self.recipe = changed(self.recipe, {f"training.{key}": value for key, value in size.items()})
                told = f"Out of memory: going on with {batch_size} texts, {size['gradient_accumulation']} times a step."
                self.console.print(told, markup=False)
                return attempt(self.run.last_checkpoint() is not None)
            return attempt()

        def smaller_size() -> int:
            size = next(left, None)
            if size is None:
                raise RunError(f"out of memory with a single text of up to {self.recipe.data.max_length} sub-tokens")
            return size[0]

        search = find_executable_batch_size(run, sizes[0][0], reduce_batch_size_fn=smaller_size)
        found: OrderedEvalTrainer = search()
        return found

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
            callbacks.append(EarlyStoppingCallback(training.patience))
        gamma = training.focal_gamma if training.loss == "focal" else 0.0
        weights = class_weights(training.class_weights, self._label_counts())
        arguments = training_arguments(
            self.recipe, self.run.checkpoints, self.device, self.backbone.dtype == torch.bfloat16
        )
        trainer = OrderedEvalTrainer(
            batches=self._token_budget(arguments),
            model=self.model,
            args=arguments,
            train_dataset=self.train.encoded.dataset,
            eval_dataset=self.validation.dataset,
            data_collator=collator(self.backbone.tokenizer, self.recipe.data.task),
            processing_class=self.backbone.tokenizer,
            memory_errors=functools.partial(explained_memory_errors, self.recipe, evaluating=True),
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

    def _evaluate(self, trainer: OrderedEvalTrainer) -> dict[str, Any]:
        labels, recipe = self.corpus.labels, self.recipe
        found, *seen = trainer.predict_with_logits(self.validation)
        self.predictions = {"validation": found}
        logits: dict[str, Any] = {"validation": seen}
        result: dict[str, Any] = {
            "name": recipe.name,
            "task": recipe.data.task,
            "labels": list(labels),
            "seed": recipe.seed,
            "masking": recipe.masking.model_dump(mode="json"),
            "validation": scores(*found.flat(), labels),
            "best_step": trainer.state.best_global_step,
            "steps": trainer.state.global_step,
        }
        if self.test is not None:
            found, *logits["test"] = trainer.predict_with_logits(self.test)
            self.predictions["test"] = found
            result["test"] = scores(*found.flat(), labels)
            if recipe.data.task == "token" and recipe.data.language_labels:
                result["test"]["by_mixing"] = scores_by_mixing(found, labels, recipe.data.language_labels)
        result["calibration"] = calibrate(logits)
        if recipe.training.baseline and trainer.is_world_process_zero():
            scored_on = self.corpus.test or self.corpus.validation
            result["baseline"] = baseline_scores(self.corpus.train, scored_on, labels, recipe.data.task)
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        result["data"] = {
            **self.corpus.report.to_dict(),
            "truncation": {name: part.encoded.truncation.to_dict() for name, part in parts.items() if part},
        }
        return result

    def _speed(self, clock: StepClock, trainer: OrderedEvalTrainer) -> dict[str, Any]:
        lengths = self.train.encoded.dataset["length"]
        per_text = sum(lengths) / max(len(lengths), 1)
        training = self.recipe.training
        per_batch: float = training.batch_size
        if (batches := self._token_budget(trainer.args)) is not None:
            per_batch = len(lengths) / len(batches)
        texts = clock.steps * per_batch * training.gradient_accumulation
        return {
            "step_seconds": round(clock.seconds, 2),
            "steps": clock.steps,
            "tokens_per_second": round(texts * per_text / clock.seconds, 1) if clock.seconds else None,
            "peak_memory": peak_memory(self.device),
            "environment": environment(self.device),
        }

    def _save(self, result: dict[str, Any]) -> None:
        folder, recipe = self.run.adapter, self.recipe
        save_adapter(self.model, folder, recipe.model.backbone)
        self.backbone.tokenizer.save_pretrained(str(folder))
        write_json(folder / "labels.json", {"task": recipe.data.task, "labels": list(self.corpus.labels)})
        write_json(folder / "calibration.json", result["calibration"])
        precision = "bf16" if self.backbone.dtype == torch.bfloat16 else "fp32"
        loading = Loading.of(recipe.model, recipe.data.max_length, self.backbone.quantization, precision)
        write_json(folder / LOADING_FILE, loading.to_dict())
        masking = recipe.masking
        if self.mask is not None:
            masking = masking.model_copy(update={"mask_token": self.mask.id})
        masking.save_pretrained(folder)
        spaced = recipe.data.task == "token" and words_need_a_space(self.backbone.tokenizer)
        write_card(folder, recipe, result, spaced_words=spaced)
        found = {name: part.to_dict() for name, part in self.predictions.items()}
        write_json(self.run.predictions, {"labels": list(self.corpus.labels), **found}, indent=None)
        write_json(self.run.result, result)  # last: it says that the run is finished


def _check_best(result: dict[str, Any], best: float | None) -> None:
    """Fail when the saved adapter is not the one that was best in training."""
    found = result["validation"]["f1_macro"]
    if best is not None and abs(found - best) > 0.005:
        raise RunError(
            f"the best checkpoint scored {best:.4f} macro-F1 on validation, but the saved adapter scores {found:.4f}: "
            "the scores above do not belong to the best checkpoint. Please report this with result.json."
        )

"""One training session: its splits and Trainer, and the way to the end."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from tokmask_peft.console import ProgressDisplay, print_lines, print_result
from tokmask_peft.data import Corpus, PackedCollator
from tokmask_peft.data.token_budget import TokenBudgetSampler
from tokmask_peft.errors import RecipeError, RunInterruptedError
from tokmask_peft.masking import MaskToken, TokenMaskCallback
from tokmask_peft.model.adapter import gathered_weights
from tokmask_peft.model.backbone import Backbone
from tokmask_peft.model.checkpointing import can_checkpoint, enable_checkpointing
from tokmask_peft.model.decisions import Decision
from tokmask_peft.model.memory.remedies import changed
from tokmask_peft.model.placement import placement_problem
from tokmask_peft.recipe import Recipe
from tokmask_peft.training.adapter_folder import CardWriter, save_adapter_folder
from tokmask_peft.training.auto_batch import with_smaller_batches
from tokmask_peft.training.callbacks import AdapterMoves, LogFile, Patience, StepClock, StopOnSignal
from tokmask_peft.training.environment import environment, peak_memory
from tokmask_peft.training.fits import before_training
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.metrics import Predictions
from tokmask_peft.training.out_of_memory import explained_memory_errors, single_text_error
from tokmask_peft.training.run_folder import RunFolder, start_run, write_json
from tokmask_peft.training.scoring import check_best, score_best
from tokmask_peft.training.splits import Split
from tokmask_peft.training.trainer import (
    OrderedEvalTrainer,
    argmax_logits,
    collator,
    scorer,
    training_arguments,
)
from tokmask_peft.training.workload import Lengths, tokens_per_step


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

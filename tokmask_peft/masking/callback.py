"""Token masking in any `transformers.Trainer`, or a trainer built on it: `callbacks=[TokenMaskCallback()]`."""

import sys
import warnings
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments
from transformers.trainer_callback import ExportableState

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import unwrap
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import REPLACEMENTS, MaskToken
from tokmask_peft.masking.schedule import Answers

_TRL = ("SFTConfig", "RewardConfig", "PRMConfig", "CPOConfig", "ORPOConfig")
"""TRL's trainers, by their arguments, of which each loss comes from one forward: one pattern masks all it compares."""


class _Passes:
    """Finds training forwards that do not belong to the current step: it ended in an exception, and no event said so.

    In a micro-batch, forwards come before the backward pass, and an event comes after it. A forward after the backward
    pass began, or after a forward that raised, therefore comes from elsewhere, unless a trainer makes several backward
    passes a batch. It is masked only if no micro-batch has shown yet that this trainer makes one; either way, the first
    is reported. Under torch.compile nothing is found.
    """

    def __init__(self, model: nn.Module, masker: TokenMasker) -> None:
        self.masker, self.single, self.late, self.warned = masker, False, False, False
        self.running, self.over = False, False  # a forward began and did not return; its backward pass began
        before = model.register_forward_pre_hook(self._before, prepend=True)
        masker._handles += [before, model.register_forward_hook(self._after)]

    def begin(self, *, ended: bool = False) -> None:
        """Let a micro-batch begin; `ended`: another one of the same step came to its end."""
        if ended:
            self.single = not self.late and (self.single or self.over)
        self.masker.enabled, self.running, self.over = True, False, False

    def _counts(self, module: nn.Module) -> bool:
        return not torch.compiler.is_compiling() and self.masker._trains(module)

    def _before(self, module: nn.Module, args: Any) -> None:
        if not self._counts(module):
            return
        if self.over or self.running:
            self.late, self.masker.enabled = True, not self.single
            if not self.warned and not self.masker.config.is_off:
                what = "A training forward came after the backward pass of a step, or after a forward that raised"
                done = "It is not masked" if self.single else "It is masked"
                remedy = "If training has failed, call detach() of its TokenMaskCallback"
                warnings.warn(f"{what}. {done}. {remedy}.", stacklevel=2)
                self.warned = True
        self.running, self.over = True, False

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._counts(module):
            self.running = False
            parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
            for part in parts:
                if isinstance(part, Tensor) and part.requires_grad:
                    part.register_hook(self._in_backward)

    def _in_backward(self, gradient: Tensor) -> None:
        self.over = True


class TokenMaskCallback(TrainerCallback, ExportableState):
    """Attaches a masker when training begins, drives its schedule, and detaches it when training ends.

    Masking is on within optimizer steps only, and there in the forwards that `TokenMasker` calls training forwards:
    evaluation, generation and reference passes are not masked, whatever the model's mode. The positions depend on the
    optimizer step, and the schedule's state is saved in each checkpoint's `trainer_state.json`, so a resumed run masks
    as an uninterrupted one. The rate is logged as `masking_rate`, with the statistics of a schedule that reacts
    (`masking_accuracy`), and each checkpoint holds a `tokmask_config.json`.

    A Trainer calls no event when training raises. The hook that is left goes with the trainer, or the next training
    replaces it. Call `detach()` if you go on with a loop of your own while the trainer is still there: otherwise one
    training forward may still be masked, and the next one warns and is not. If the first batch failed, all of them are
    masked, with one warning.

    Args:
        config: how to mask; its seed defaults to that of the `TrainingArguments`.
        mask_token: a choice made earlier; default: `choose_mask_token`. Dicts are for the Trainer, which rebuilds
            callbacks with `restore_callback_states_from_checkpoint`.
        announce: print on stderr, when training starts, which mask token is used and why.
    """

    def __init__(
        self,
        config: TokenMaskConfig | dict[str, Any] | None = None,
        mask_token: MaskToken | dict[str, Any] | None = None,
        *,
        announce: bool = True,
    ) -> None:
        self.config = TokenMaskConfig.model_validate({} if config is None else config)
        self.mask_token = MaskToken(**mask_token) if isinstance(mask_token, dict) else mask_token
        self.announce = announce
        self.hides_labels = False  # set by a trainer that leaves masked words out of its loss
        self.masker: TokenMasker | None = None  # of the current training
        self.schedule = self.config.make_schedule()  # of the current training, or of the next
        self._passes: _Passes | None = None
        self._steps = 0
        self._seen: Tensor | None = None

    def add_to(self, trainer: Any) -> None:
        """Join a trainer ahead of its trackers; behind them, where it puts callbacks, they miss `masking_rate`."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves in a checkpoint's `trainer_state.json`."""
        token = None if self.mask_token is None else asdict(self.mask_token)
        args = {"config": self.config.model_dump(mode="json"), "mask_token": token, "announce": self.announce}
        return {"args": args, "attributes": {}, "schedule": self.schedule.state_dict()}

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Attach the masker, or raise a MaskTokenError; the schedule continues if training is resumed."""
        self.detach()  # accelerate's find_executable_batch_size begins again after running out of memory
        self.schedule, self._steps = self.config.make_schedule(), 0
        # A checkpoint made without this callback has no entry, and the Trainer would fail to save the next one.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if state.global_step > 0 and "schedule" in saved:
            self.schedule.load_state_dict(saved["schedule"])
        token = self._attach(args, state, kwargs).mask_token
        if self.announce and state.is_world_process_zero:
            choice = "no mask token" if token.kind == "none" else f"masked tokens become id {token.id}"
            sys.stderr.write(f"tokmask: {choice}: {token.reason}\n")

    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Switch masking on, with this step's rate and counter; MaskTokenError if another masker took its place."""
        masker = self.masker or self._attach(args, state, kwargs)  # None if the callback was added during training
        if not masker.attached:
            message = "another masker was attached during training: give the Trainer one TokenMaskCallback only"
            raise MaskTokenError(message, code="masker-replaced")
        masker.rate, masker.step = self.upcoming(args, state)
        self._seen = None
        if self._passes is not None:
            self._passes.begin()

    def on_substep_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note that a micro-batch came to its end, and that another one of this step follows."""
        if self._passes is not None:
            self._passes.begin(ended=True)

    def upcoming(self, args: Arguments, state: State) -> tuple[float, int]:
        """Return the rate of the coming optimizer step and the number of its first training forward."""
        rate = self.schedule.rate(state.global_step / max(state.max_steps, 1))
        return rate, state.global_step * args.gradient_accumulation_steps

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Switch masking off, and show the step's answers to the schedule.

        A MaskTokenError says that the first step looked up no ids where the masker is, so nothing was masked; or that
        the schedule reacts to answers, and this trainer reports none (`observe`), or scales classes, and it does not.
        """
        self._steps += 1
        if self.masker is None or self._passes is None:
            return
        self._passes.begin(ended=True)
        self.masker.enabled = False
        before = (state.global_step - 1) * args.gradient_accumulation_steps
        if self._steps == 1 and not self.config.is_off and self.masker.step == before:  # read once: it waits for a GPU
            why = "no training forward looked up ids in the input embedding"
            remedy = "Call the model with input_ids instead of inputs_embeds, use another backbone, or set p to 0"
            raise MaskTokenError(f"token masking masked nothing: {why}. {remedy}", code="masked-nothing")
        unscaled = self.schedule.class_scale() is not None and self.masker.scale is None
        if unscaled or (self.schedule.reacts and self._seen is None):
            name, needed = self.config.schedule, "classes" if unscaled else "answers"
            why = f"masking.schedule: {name} needs the {needed} of every step, and this trainer reports none"
            remedy = "train from a recipe, or take another schedule"
            raise MaskTokenError(f"{why}: {remedy}", code="no-answers", schedule=name)
        if self._seen is not None:
            self.schedule.observe_step(Answers(*self._seen.tolist()))

    def observe(self, answers: Tensor) -> None:
        """Take in the answers of a training forward, in the order of `Answers`, summed over processes, [6, classes]."""
        self._seen = answers if self._seen is None else self._seen + answers

    def on_log(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Show the logged values to the schedule; add the masking rate, and what it follows, to those of training."""
        logs = kwargs.get("logs")
        if self.masker is None or logs is None:
            return
        self.schedule.observe(dict(logs))
        if "loss" in logs:
            found = {f"masking_{name.replace(' ', '_')}": value for name, value in self.schedule.statistics().items()}
            for line in (logs, state.log_history[-1]):  # the latter is a copy of logs, made before this call
                line.update({"masking_rate": self.masker.rate} | found)

    def on_save(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Write the config, with the mask token's id, into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.masker is not None and state.is_world_process_zero and folder.is_dir():
            token, resolved = self.masker.mask_token, {"seed": self.masker.seed}
            resolved |= {} if token.kind == "none" else {"mask_token": token.id}
            self.config.model_copy(update=resolved).save_pretrained(folder)

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Detach the masker, and warn if it never saw a token."""
        if self.masker and self._steps:
            self.masker.warn_if_idle()
        self.detach()

    def detach(self) -> None:
        """Remove the masker from the model; needed only after a training that raised. May be called again."""
        if self.masker is not None:
            self.masker.detach()
            self.masker = self._passes = None

    def _attach(self, args: Arguments, state: State, kwargs: dict[str, Any]) -> TokenMasker:
        trl = next((kind for kind in type(args).__mro__ if kind.__module__.startswith("trl.")), None)
        if trl is not None and trl.__name__ not in _TRL and not self.config.is_off:
            problem = f"the trainer of {trl.__name__} compares two answers, and masking only one of them falsifies it"
            message = f"{problem}: leave the callback out, or use SFT or reward training"
            raise MaskTokenError(message, code="trl-trainer", config=trl.__name__)
        labels_words = type(unwrap(kwargs["model"])).__name__.endswith("ForTokenClassification")
        unscored = not self.config.score_masked or (REPLACEMENTS[self.config.replace].removes and labels_words)
        if unscored and not self.hides_labels and not self.config.is_off:
            problem = "this trainer scores masked words, which score_masked: false and replace: drop rule out"
            message = f"{problem}: train from a recipe, or take score_masked: true and replace: token"
            raise MaskTokenError(message, code="scores-masked")
        tokenizer = kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        if not hasattr(tokenizer, "all_special_ids"):
            message = "token masking needs the tokenizer: Trainer(processing_class=tokenizer, ...)"
            raise MaskTokenError(message, code="no-tokenizer")
        if args.n_gpu > 1:
            problem = f"token masking does not support one process on {args.n_gpu} GPUs (nn.DataParallel)"
            message = f"{problem}: use torchrun or accelerate launch, or CUDA_VISIBLE_DEVICES=0"
            raise MaskTokenError(message, code="data-parallel", gpus=args.n_gpu)
        self.masker = TokenMasker.attach(
            kwargs["model"], tokenizer, self.config, rank=args.process_index, mask_token=self.mask_token,
            seed=args.seed, resumed=state.global_step > 0, replaceable=True,
        )  # fmt: skip
        self.masker.enabled, self._passes = False, _Passes(kwargs["model"], self.masker)
        weakref.finalize(self, self.masker.detach).atexit = False  # with its trainer, after a training that raised
        return self.masker

"""Token masking in any `transformers.Trainer`, or a trainer built on it: `callbacks=[TokenMaskCallback()]`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.masking.schedule import rate_at


class TokenMaskCallback(TrainerCallback):
    """Attaches a masker when training begins, drives its schedule, and detaches it when training ends or raises.

    The positions depend on the optimizer step, so a run resumed from a checkpoint masks as the uninterrupted one. The
    masking rate joins the logged values as `masking_rate`, and each checkpoint holds a `tokmask_config.json`.

    Args:
        config: how to mask; its seed defaults to that of the `TrainingArguments`.
        mask_token: a choice made before; default: `choose_mask_token`.
        announce: say on stderr, when training starts, which mask token is used and why.

    Attributes:
        masker: the masker of the training that is under way, else None.
    """

    def __init__(
        self, config: TokenMaskConfig | None = None, mask_token: MaskToken | None = None, *, announce: bool = True
    ) -> None:
        self.config = TokenMaskConfig() if config is None else config
        self.mask_token = mask_token
        self.announce = announce
        self.masker: TokenMasker | None = None
        self._guarded: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make sure, before training, that a failing one takes the masker off."""
        self._guard()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the masker.

        Raises:
            MaskTokenError: no usable mask token, or a model or a trainer that cannot be masked.
        """
        self._detach()  # accelerate's find_executable_batch_size begins again after running out of memory
        self._guard()  # a callback that came by trainer.add_callback saw no on_init_end
        token = self._attach(args, state, kwargs).mask_token
        if self.announce and state.is_world_process_zero:
            sys.stderr.write(f"tokmask: masked tokens become id {token.id}: {token.reason}\n")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set rate and counter for the forwards of this optimizer step."""
        masker = self.masker or self._attach(args, state, kwargs)  # a trainer may catch what was raised, and go on
        masker.rate = rate_at(self.config, state.global_step / max(state.max_steps, 1))
        masker.set_step(state.global_step * args.gradient_accumulation_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the masking rate to the values logged in training."""
        if self.masker is not None and logs is not None and "loss" in logs:
            logs["masking_rate"] = self.masker.rate
            state.log_history[-1]["masking_rate"] = self.masker.rate  # a copy of logs, made before this call

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the config, with the mask token's id, into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.masker is not None and state.is_world_process_zero and folder.is_dir():
            resolved = {"mask_token": self.masker.mask_token.id, "seed": self.masker.seed}
            self.config.model_copy(update=resolved).save_pretrained(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the masker."""
        self._detach()

    def _attach(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> TokenMasker:
        processing = kwargs.get("processing_class")
        tokenizer = getattr(processing, "tokenizer", processing)  # a processor holds one
        if tokenizer is None or not hasattr(tokenizer, "all_special_ids"):
            raise MaskTokenError("token masking needs the tokenizer: Trainer(processing_class=tokenizer, ...)")
        if args.n_gpu > 1:
            raise MaskTokenError(
                f"this trainer would spread one process over {args.n_gpu} GPUs (nn.DataParallel), which token masking "
                "does not support: use torchrun or accelerate launch, or CUDA_VISIBLE_DEVICES=0"
            )
        self.masker = TokenMasker.attach(
            kwargs["model"],
            tokenizer,
            self.config,
            rank=args.process_index,
            mask_token=self.mask_token,
            seed=args.seed,
            resumed=state.global_step > 0,
        )
        return self.masker

    def _detach(self) -> None:
        if self.masker is not None:
            self.masker.detach()
            self.masker = None

    def _guard(self) -> None:
        """Wrap the trainer's methods so that the masker goes when they raise.

        A Trainer calls no event when training fails, and hands itself to no callback: it is found on the stack, as the
        caller of this event. `train` catches everything, but when the callback came by `add_callback` it is running
        already; the methods that it calls catch what happens then.

        Here too the callback moves to the front of the list, because reporting callbacks come before the user's and
        would miss the masking rate.
        """
        trainer = _calling_trainer(self)
        if trainer is None or trainer is self._guarded:
            return
        self._guarded = trainer
        handler = trainer.callback_handler
        for name in ("train", "training_step", "get_batch_samples", "evaluate"):
            setattr(trainer, name, self._detaching(getattr(trainer, name)))
        handler.call_event = self._detaching(handler.call_event)
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)

    def _detaching(self, method: Any) -> Any:
        """Wrap a method so that the masker goes when it raises."""

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except BaseException:  # KeyboardInterrupt too
                self._detach()
                raise

        return guarded


def _calling_trainer(callback: TrainerCallback) -> Any:
    """Return the trainer that is calling an event of `callback`, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        handler = getattr(candidate, "callback_handler", None)
        if any(other is callback for other in getattr(handler, "callbacks", ())):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    return None

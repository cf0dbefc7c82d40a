"""The masker: a forward pre-hook that swaps ids on their way into the embedding lookup."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import embedding_weight, find_embedding, is_trainable, unwrap, write_row
from tokmask_peft.masking.pattern import masked_positions, text_positions, word_start_table
from tokmask_peft.masking.replacement import MaskToken, choose_mask_token, fill_spare_row, maskable_table, used_rows
from tokmask_peft.masking.schedule import rate_at


class TokenMasker:
    """Masks input tokens of a model in training (arXiv 2505.11746), until `detach()`.

    The model's own `input_ids` stay as they are, so that padding, pooling, labels and attention see the real text.
    Nothing is masked in eval mode, inside `paused()`, and where the model is called with `inputs_embeds`.
    Make one with `attach`; as a context manager it detaches at the end, also when training raises.

    Attributes:
        config: how to mask.
        mask_token: what a masked token is replaced by.
        seed: seed of the pattern.
        rank: process number that the pattern depends on.
    """

    def __init__(
        self,
        embedding: nn.Module,
        config: TokenMaskConfig,
        mask_token: MaskToken,
        maskable: Tensor,
        word_starts: Tensor | None,
        *,
        pad_id: int | None,
        real_rows: int,
        seed: int,
        rank: int,
        keep_mask_row: bool,
    ) -> None:
        self.config, self.mask_token, self.seed, self.rank = config, mask_token, seed, rank
        self._embedding, self._pad_id, self._real_rows = embedding, pad_id, real_rows
        device = embedding_weight(embedding).device
        self._maskable = maskable.to(device)
        self._word_starts = None if word_starts is None else word_starts.to(device)
        # Tensors that are written in place: a compiled graph reads them anew, where a number would be baked in.
        self._rate_tensor = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._rate = 0.0
        self._paused = False
        self._rows: Tensor | None = None
        self._positions: Tensor | None = None
        self._keep_mask_row = keep_mask_row
        self._original_row: Tensor | None = None
        self._handle = embedding.register_forward_pre_hook(self._mask, with_kwargs=True)
        self._attached = True

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        tokenizer: Any,
        config: TokenMaskConfig | None = None,
        *,
        rank: int | None = None,
        mask_token: MaskToken | None = None,
        seed: int | None = None,
        resumed: bool = False,
    ) -> Self:
        """Start masking a model's input in training.

        Args:
            model: a transformers model, bare or wrapped by PEFT, torch.compile, DDP or accelerate.
            tokenizer: its tokenizer.
            config: how to mask; the rate starts where its schedule starts.
            rank: process number; default: that of torch.distributed, 0 without it.
            mask_token: a choice made before; default: `choose_mask_token`.
            seed: the run's seed, used where the config gives none; default 0.
            resumed: the weights come from a checkpoint, so a mask row that is trained must not be set again.

        Raises:
            MaskTokenError: no usable mask token, a masker is attached already, or the model cannot be masked.
        """
        config = TokenMaskConfig() if config is None else config
        embedding = find_embedding(model)
        if cls.of(embedding) is not None:
            raise MaskTokenError("this model has a masker already; detach() it first")
        rows = embedding_weight(embedding).shape[0]
        if outside := [token_id for token_id in config.protect if not 0 <= token_id < rows]:
            raise MaskTokenError(
                f"masking.protect: {outside} lie outside the embedding, which has rows 0 to {rows - 1}"
            )
        mask_token = mask_token or choose_mask_token(tokenizer, rows, config.mask_token)
        trainable = is_trainable(embedding, mask_token.id)
        if config.trainable_mask and not trainable:
            raise MaskTokenError(
                "masking.trainable_mask is on, but the mask token's row is frozen: give PEFT's config "
                f"trainable_token_indices=[{mask_token.id}], or set trainable_mask: false"
            )
        model_config = getattr(unwrap(model), "config", None)
        pad_id = tokenizer.pad_token_id
        if pad_id is None:
            pad_id = getattr(model_config, "pad_token_id", None)
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
        masker = cls(
            embedding,
            config,
            mask_token,
            maskable_table(tokenizer, rows, {*config.protect, pad_id, getattr(model_config, "pad_token_id", None)}),
            None if config.unit == "token" else word_start_table(tokenizer, rows),
            pad_id=pad_id,
            real_rows=min(used_rows(tokenizer), rows),
            seed=config.seed if config.seed is not None else (seed or 0),
            rank=rank,
            # A row of trainable_token_indices lives in the adapter, which made its own copy of it.
            keep_mask_row=trainable and (resumed or hasattr(embedding, "token_adapter")),
        )
        # A compiled model ignores, in silence, a hook that comes after its first call: dynamo does not guard on hooks.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        masker.rate = rate_at(config, 0.0)
        return masker

    @classmethod
    def of(cls, embedding: nn.Module) -> Self | None:
        """Return the masker that is attached to an input embedding, or None."""
        owners = (getattr(hook, "__self__", None) for hook in embedding._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    def _mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Swap the ids that the embedding is called with; [batch, seq] or [seq], int32 or int64."""
        if not module.training or self._paused:
            return None
        name = None if args else next(iter(kwargs))
        given: Tensor = args[0] if name is None else kwargs[name]
        if self._step.device != given.device:
            self._move(given.device)
        input_ids = given.reshape(-1, given.shape[-1])
        positions = text_positions(input_ids, self._pad_id) if self._positions is None else self._positions
        maskable = self._maskable[input_ids]
        masked = masked_positions(
            input_ids,
            self._rate_tensor,
            self.seed,
            self._step,
            self.rank,
            maskable,
            None if self._word_starts is None else self._word_starts[input_ids],
            self.config.unit,
            self.config.span_length,
            self._rows,
            positions,
        )
        self._step.add_(1)
        self._counts.add_(torch.stack([masked.sum(), maskable.sum()]))
        swapped = input_ids.masked_fill(masked, self.mask_token.id).reshape(given.shape)
        return ((swapped, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: swapped})

    def _move(self, device: torch.device) -> None:
        """Follow a model that was moved after `attach`."""
        self._rate_tensor, self._step = self._rate_tensor.to(device), self._step.to(device)
        self._counts, self._maskable = self._counts.to(device), self._maskable.to(device)
        self._word_starts = None if self._word_starts is None else self._word_starts.to(device)

    @property
    def rate(self) -> float:
        """The masking rate p, 0 <= p < 1."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise MaskTokenError(f"the masking rate must be at least 0 and below 1, not {value}")
        if value > 0.0 and self.mask_token.kind == "spare" and not self._keep_mask_row and self._original_row is None:
            self._original_row = fill_spare_row(self._embedding, self.mask_token, self._real_rows)
        self._rate = float(value)
        self._rate_tensor.fill_(self._rate)

    @property
    def step(self) -> int:
        """Number of the next training forward; reading it waits for the device."""
        return int(self._step.item())

    @step.setter
    def step(self, value: int) -> None:
        self.set_step(value)

    def set_step(self, value: int) -> None:
        """Set the number of the next training forward, without waiting for the device."""
        self._step.fill_(value)

    @property
    def observed_rate(self) -> float:
        """Share of the maskable tokens masked so far; reading it waits for the device."""
        masked, maskable = self._counts.tolist()
        return masked / max(maskable, 1)

    @property
    def attached(self) -> bool:
        """Whether the model is still being masked."""
        return self._attached

    @contextlib.contextmanager
    def paused(self) -> Iterator[Self]:
        """Mask nothing and count no steps inside."""
        before, self._paused = self._paused, True
        try:
            yield self
        finally:
            self._paused = before

    @contextlib.contextmanager
    def layout(self, rows: Tensor, positions: Tensor) -> Iterator[Self]:
        """Say which text and which position in it each token is, where a row packs several texts.

        Args:
            rows: index of the text in the batch, int [1, total].
            positions: position in the text, int [1, total].
        """
        before = self._rows, self._positions
        self._rows, self._positions = rows, positions
        try:
            yield self
        finally:
            self._rows, self._positions = before

    def detach(self) -> None:
        """Stop masking for good and give a spare row its old values back, unless it was trained. May be repeated."""
        if not self._attached:
            return
        self._attached = False
        self._handle.remove()
        if self._original_row is not None and not is_trainable(self._embedding, self.mask_token.id):
            write_row(self._embedding, self.mask_token.id, self._original_row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON (accelerate's `register_for_checkpointing` takes a masker)."""
        return {
            "step": self.step,
            "rate": self.rate,
            "seed": self.seed,
            "mask_token_id": self.mask_token.id,
            "config": self.config.model_dump(mode="json"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            MaskTokenError: seed, mask token or config differ, so the run would not mask as before.
        """
        mine = self.state_dict()
        differing = [
            f"{key} was {state.get(key)!r}, is {mine[key]!r}"
            for key in ("seed", "mask_token_id", "config")
            if state.get(key) != mine[key]
        ]
        if differing:
            raise MaskTokenError(f"cannot resume masking with other settings: {'; '.join(differing)}")
        self.set_step(state["step"])
        self.rate = state["rate"]

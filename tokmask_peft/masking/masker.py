"""The masker: a forward pre-hook that swaps ids on their way into the embedding lookup.

`Occlusion` is the same swap outside training, for explanations: at positions of the caller's choice.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking import embedding as rows_of
from tokmask_peft.masking import pattern
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.replacement import REPLACEMENTS, MaskToken, choose_mask_token

if TYPE_CHECKING:  # the masker needs no NumPy
    import numpy as np
    from numpy.typing import NDArray


class TokenMasker:
    """Masks input tokens of a model in training (arXiv 2505.11746), until `detach()`.

    The model's own `input_ids` stay as they are, so that padding, pooling, labels and attention see the real text.
    A forward is a training forward, which is masked, if the model is in train mode and gradients are enabled:
    evaluation is not masked, nor are generation and reference passes under `torch.no_grad()`, whatever the mode (TRL
    generates in train mode). Not masked either: everything inside `paused()`, and calls with `inputs_embeds`.
    Make a masker with `attach`; as a context manager it detaches at the end, also when training raises.

    Attributes:
        mask_token: with the reason for its choice.
        enabled: if False, nothing is masked and no steps are counted; the callback sets it outside optimizer steps.
        attached: whether the model is still being masked.
        replaceable: whether a later `attach` may take this masker's place.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TokenMaskConfig, token: MaskToken) -> None:
        self.config, self.mask_token, self.seed, self.rank = config, token, 0, 0
        self.enabled, self.attached, self.replaceable = True, False, False
        self._embedding, self._rate = rows_of.find_embedding(model), 0.0
        self._transposed = rows_of.is_sequence_first(model)
        weight = rows_of.embedding_weight(self._embedding)
        rows, device = weight.shape[0], weight.device
        # Tensors that are written in place: a compiled graph reads them anew, whereas a number would be baked in.
        self._rate_tensor = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._layout: tuple[Tensor, Tensor] | None = None
        self._original_row: Tensor | None = None
        self._handle: Any = None
        about = getattr(rows_of.unwrap(model), "config", None)
        model_pad_id, self._transposed = getattr(about, "pad_token_id", None), rows_of.is_sequence_first(model)
        self._pad_id = model_pad_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        maskable = pattern.maskable_table(tokenizer, rows, {*config.protect, self._pad_id, model_pad_id})
        self._replacement = REPLACEMENTS[config.replace](token, maskable, tokenizer)
        self._maskable = maskable.to(device)
        by_token = config.unit == "token"
        self._word_starts = None if by_token else pattern.word_start_table(tokenizer, rows).to(device)

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
        replaceable: bool = False,
    ) -> Self:
        """Start masking a model's input in training.

        The row of a spare mask token is set to the mean embedding, unless the config never masks.

        Args:
            model: a transformers model, bare or wrapped by PEFT, torch.compile, DDP or accelerate.
            tokenizer: that of the model.
            config: how to mask; the rate starts where its schedule starts.
            rank: process number; default: that of torch.distributed, or 0 without it.
            mask_token: a choice made earlier; default: `choose_mask_token`.
            seed: the run's seed, used if the config has none; default 0.
            resumed: the weights come from a checkpoint, so a mask row that is trained must not be set again.
            replaceable: let a later `attach` take this masker's place instead of refusing.

        Raises:
            MaskTokenError: no usable mask token, another masker is attached, or the model cannot be masked.
        """
        config = TokenMaskConfig() if config is None else config
        embedding = rows_of.find_embedding(model)
        if (other := TokenMasker.of(embedding)) is not None and not other.replaceable:
            raise MaskTokenError("this model has a masker already; detach() it first", code="masker-attached")
        rows = rows_of.embedding_weight(embedding).shape[0]
        if outside := [token_id for token_id in config.protect if token_id >= rows]:
            message = f"masking.protect: the embedding has rows 0 to {rows - 1}, not {outside}; remove these ids"
            raise MaskTokenError(message, code="protect-outside", ids=outside, rows=rows)
        mask_token = mask_token or choose_mask_token(tokenizer, rows, config.mask_token)
        trainable = rows_of.is_trainable(embedding, mask_token.id)
        if config.trainable_mask and not trainable:
            remedy = f"give PEFT's config trainable_token_indices=[{mask_token.id}], or set trainable_mask: false"
            message = f"masking.trainable_mask is on, but the mask token's row is frozen: {remedy}"
            raise MaskTokenError(message, code="mask-row-frozen", token_id=mask_token.id)
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
        masker = cls(model, tokenizer, config, mask_token)
        masker.seed, masker.rank = config.seed if config.seed is not None else (seed or 0), rank
        if other is not None:
            other.detach()
        if not config.is_off and not (trainable and resumed):
            masker._original_row = rows_of.prepare_mask_row(embedding, mask_token, tokenizer)
        masker.rate = config.make_schedule().rate(0.0)
        masker._handle = embedding.register_forward_pre_hook(masker._mask, with_kwargs=True)
        masker.attached, masker.replaceable = True, replaceable
        # A compiled model silently ignores a hook that is added after its first call: dynamo does not guard on hooks.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        return masker

    @classmethod
    def of(cls, embedding: nn.Module) -> Self | None:
        """Return the masker that is attached to an input embedding, or None."""
        owners = (getattr(hook, "__self__", None) for hook in embedding._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None)

    def _mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        training = module.training and self.enabled and torch.is_grad_enabled()
        return _swap(args, kwargs, self._masked, self._transposed) if training else None

    def _masked(self, given: Tensor) -> Tensor:
        """Return the ids to look up, for those that the embedding is called with: [batch, seq] or [seq]."""
        if self._step.device != given.device:  # the model was moved after `attach`
            vars(self).update({k: part.to(given.device) for k, part in vars(self).items() if isinstance(part, Tensor)})
        ids = given.reshape(-1, given.shape[-1])
        rows, positions = self._layout or (None, pattern.text_positions(ids, self._pad_id))
        maskable = self._maskable[ids]
        starts = None if self._word_starts is None else self._word_starts[ids]
        counters = self.seed, self._step, self.rank
        unit = self.config.unit, self.config.span_length
        masked = pattern.masked_positions(ids, self._rate_tensor, *counters, maskable, starts, *unit, rows, positions)
        draw = functools.partial(pattern.replacement_bits, ids, *counters, rows, positions)
        swapped = self._replacement(ids, masked, draw).reshape(given.shape)
        self._step.add_(1)
        self._counts.add_(torch.stack([masked.sum(), maskable.sum()]))
        return swapped

    @property
    def rate(self) -> float:
        """The masking rate p, 0 <= p < 1."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise MaskTokenError(f"the masking rate must be at least 0 and below 1, not {value}", code="rate-outside")
        token, off = self.mask_token, self.config.is_off
        if value > 0.0 and off and token.kind == "spare" and not rows_of.is_in_adapter(self._embedding, token.id):
            why = f"masked tokens would become row {token.id}, which was not prepared because the config never masks"
            message = f"{why}: attach with p above 0, then set any rate"
            raise MaskTokenError(message, code="mask-row-not-prepared", token_id=token.id)
        self._rate = float(value)
        self._rate_tensor.fill_(self._rate)

    @property
    def step(self) -> int:
        """Number of the next training forward. Reading it waits for the device, setting it does not."""
        return int(self._step.item())

    @step.setter
    def step(self, value: int) -> None:
        self._step.fill_(value)

    @property
    def observed_rate(self) -> float:
        """Share of the maskable tokens masked so far, NaN if none was seen; reading it waits for the device."""
        masked, maskable = self._counts.tolist()
        return masked / maskable if maskable else float("nan")

    def paused(self) -> AbstractContextManager[Self]:
        """Mask nothing and count no steps inside."""
        return self._inside(enabled=False)

    def layout(self, rows: Tensor, positions: Tensor) -> AbstractContextManager[Self]:
        """Set which text each token of a packed row belongs to, and its position in that text; each int [1, total]."""
        return self._inside(_layout=(rows, positions))

    @contextlib.contextmanager
    def _inside(self, **changed: Any) -> Iterator[Self]:
        before = {name: getattr(self, name) for name in changed}
        vars(self).update(changed)
        try:
            yield self
        finally:
            vars(self).update(before)

    def detach(self) -> None:
        """Stop masking for good and restore a spare row's values, unless it was trained. May be called again."""
        if not self.attached:
            return
        self.attached = False
        self._handle.remove()
        if self._original_row is not None and not rows_of.is_trainable(self._embedding, self.mask_token.id):
            rows_of.write_row(self._embedding, self.mask_token.id, self._original_row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.warn_if_idle()
        self.detach()

    def warn_if_idle(self) -> None:
        """Warn if this masker, whose config asks for masking, has not seen a token yet."""
        if not self.config.is_off and math.isnan(self.observed_rate):
            why = "no training forward looked up maskable ids in the input embedding"
            ask = "Is the model in eval mode (from_pretrained returns it so: call model.train()), or called with"
            warnings.warn(f"Token masking masked nothing: {why}. {ask} inputs_embeds?", stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON (accelerate's `register_for_checkpointing` takes a masker)."""
        settings = {"seed": self.seed, "mask_token_id": self.mask_token.id}
        return {"step": self.step, "rate": self.rate, **settings, "config": self.config.model_dump(mode="json")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            MaskTokenError: seed, mask token or config differ, so the run would not mask as before.
        """
        mine = self.state_dict()
        defaults = TokenMaskConfig().model_dump(mode="json")  # for keys that are newer than the saved state
        saved = {**state, "config": {**defaults, **state["config"]}}
        if differing := [key for key in ("seed", "mask_token_id", "config") if saved[key] != mine[key]]:
            pairs = "; ".join(f"{key} was {saved[key]!r}, is {mine[key]!r}" for key in differing)
            message = f"masking cannot be resumed with other settings: {pairs}"
            raise MaskTokenError(message, code="resume-differs", differing=differing)
        self.step, self.rate = state["step"], state["rate"]


class Occlusion:
    """Hides sub-tokens of a model's input as training does, at positions of the caller's choice.

    A spare row is set to the mean embedding, as in training, and keeps it: no token uses the row. `config` is how the
    model, with or without PEFT, was masked in training; None if that is not known.

    Attributes:
        mask_token: what hidden sub-tokens become, with the reason.
        trained: whether the model saw masked tokens in training; None if that is not known.
        maskable: for every id whether it may be hidden, bool [rows]. Special and protected tokens may not, as in
            training; the unknown token may, unlike in training, because a word that became one is still a word.

    Raises:
        MaskTokenError: there is no usable mask token, or the model cannot be masked.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TokenMaskConfig | None = None) -> None:
        self.trained = None if config is None else not config.is_off
        config = config or TokenMaskConfig()
        self._embedding, self._transposed = rows_of.find_embedding(model), rows_of.is_sequence_first(model)
        rows = rows_of.embedding_weight(self._embedding).shape[0]
        self.mask_token = choose_mask_token(tokenizer, rows, config.mask_token)
        name = tokenizer.convert_ids_to_tokens(self.mask_token.id)
        self._token = f"{name or 'an embedding row that no token uses'} (id {self.mask_token.id})"
        if not config.trainable_mask:
            rows_of.prepare_mask_row(self._embedding, self.mask_token, tokenizer)
        protected = {*config.protect, tokenizer.pad_token_id}
        table = pattern.maskable_table(tokenizer, rows, protected)
        if (unknown := tokenizer.unk_token_id) is not None:
            table[unknown] = unknown not in {*protected, self.mask_token.id}
        self.maskable: NDArray[np.bool_] = table.numpy()

    @property
    def note(self) -> str:
        """What a reader of the explanations must know about the mask token, in a sentence or two."""
        if self.trained:
            return f"words are masked as in training, by {self._token}"
        how = "was trained without masking (p = 0): it has never seen a masked word, so its influences are"
        if self.trained is None:
            how = "does not record how it was masked in training; if it was not masked, its influences are"
        return f"the model {how} less reliable. Words are masked by {self._token}: {self.mask_token.reason}"

    @contextlib.contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Hide `positions`, bool of the shape of the ids, in the forwards that this thread makes inside."""
        thread = threading.get_ident()

        def hide(given: Tensor) -> Tensor:
            padded = F.pad(positions, (0, given.shape[1] - positions.shape[1]))  # a packed row may be lengthened
            return given.masked_fill(padded.to(given.device), self.mask_token.id)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mine = threading.get_ident() == thread  # a server may predict in one thread and explain in another
            return _swap(args, kwargs, hide, self._transposed) if mine else None

        handle = self._embedding.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _swap(args: tuple[Any, ...], kwargs: dict[str, Any], swapped: Callable[[Tensor], Tensor], transposed: bool) -> Any:
    """Return the arguments of an embedding with other ids, its first argument, which may have a name."""
    name = None if args else next(iter(kwargs))
    given = args[0] if name is None else kwargs[name]
    ids = swapped(given.t()).t() if transposed else swapped(given)
    return ((ids, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: ids})

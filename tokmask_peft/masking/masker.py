"""The masker: a forward pre-hook that swaps ids on their way into the embedding lookup."""

import contextlib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking import embedding as rows_of
from tokmask_peft.masking import pattern
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.replacement import NO_MASK_TOKEN, REPLACEMENTS, MaskToken

_COUNT_BY_MASK = ("opt", "biogpt", "bloom")  # `model_type`s whose positions count the attention mask
_NOT_ATTENTION = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba"}  # in a config's `layer_types`
_DECODER = 1 << 63  # turns the seed into that of the decoder, whose masked positions are drawn apart


class TokenMasker:
    """Masks input tokens of a model in training (arXiv 2505.11746), until `detach()`.

    The model's own `input_ids` stay as they are, so that padding, pooling, labels and attention see the real text.
    In an encoder-decoder model the encoder's input is masked, and the decoder's with `decoder_p`. Classification heads
    let the decoder read the same text: there it is masked in the same places.
    A forward is a training forward, which is masked, if the model is in train mode and gradients are enabled:
    evaluation is not masked, nor are generation and reference passes under `torch.no_grad()`, whatever the mode (TRL
    generates in train mode). Not masked either: everything inside `paused()`, and calls with `inputs_embeds`.
    Make a masker with `attach`; as a context manager it detaches at the end, also when training raises.

    Attributes:
        mask_token: with the reason for its choice.
        enabled: if False, nothing is masked and no steps are counted; the callback sets it outside optimizer steps.
        attached: whether the model is still being masked.
        replaceable: whether a later `attach` may take this masker's place.
        clean_texts: how many texts, the first of the batch, are not masked.
        scale: what the rate is multiplied with in each text of the batch, [texts]; None for 1.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TokenMaskConfig, token: MaskToken) -> None:
        self.config, self.mask_token, self.seed, self.rank = config, token, 0, 0
        self.enabled, self.attached, self.replaceable, self.clean_texts = True, False, False, 0
        self._embedding, self._rate = rows_of.find_embedding(model), 0.0
        self._transposed = rows_of.is_sequence_first(model)
        weight = rows_of.embedding_weight(self._embedding)
        rows, device = weight.shape[0], weight.device
        # Tensors that are written in place: a compiled graph reads them anew, whereas a number would be baked in.
        self.scale: Tensor | None = None
        self._rate_tensor = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._layout: tuple[Tensor, Tensor] | None = None
        self._original_row: Tensor | None = None
        self._refused: MaskTokenError | None = None  # why this config, which never masks, cannot be given a rate
        self._handles: list[Any] = []
        self._decoder = rows_of.find_decoder_embedding(model)
        self._rereads = self._decoder is not None and rows_of.rereads(model)
        self._read: tuple[Tensor, Tensor] | None = None  # ids that the encoder looked up last, and which are masked
        self._call: Mapping[str, Any] = {}  # what the model was called with
        model_pad_id = getattr(getattr(rows_of.unwrap(model), "config", None), "pad_token_id", None)
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

        The row of a spare mask token is set to a typical one, unless the config never masks.

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
            MaskTokenError: no usable mask token, another masker is attached, or the model cannot be masked. A missing
                mask token, or a model whose tokens cannot be dropped, is no error at p = 0, until a rate is set.
        """
        config = TokenMaskConfig() if config is None else config
        embedding = rows_of.find_embedding(model)
        if (other := TokenMasker.of(embedding)) is not None and not other.replaceable:
            raise MaskTokenError("this model has a masker already; detach() it first", code="masker-attached")
        rows = rows_of.embedding_weight(embedding).shape[0]
        if outside := [token_id for token_id in config.protect if token_id >= rows]:
            message = f"masking.protect: the embedding has rows 0 to {rows - 1}, not {outside}; remove these ids"
            raise MaskTokenError(message, code="protect-outside", ids=outside, rows=rows)
        trained, refused = config.trainable_mask, None
        try:
            _check_possible(model, config)
            mask_token = mask_token or rows_of.mask_token_for(embedding, tokenizer, config)
        except MaskTokenError as error:
            if trained or not config.is_off:
                raise
            mask_token, refused = mask_token or NO_MASK_TOKEN, error
        trainable = rows_of.is_trainable(embedding, mask_token.id)
        if trained and not trainable:
            remedy = f"give PEFT's config trainable_token_indices=[{mask_token.id}], or set trainable_mask: false"
            message = f"masking.trainable_mask is on, but the mask token's row is frozen: {remedy}"
            raise MaskTokenError(message, code="mask-row-frozen", token_id=mask_token.id)
        if rank is None:
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if distributed else 0
        masker = cls(model, tokenizer, config, mask_token)
        masker._refused = refused
        masker.seed, masker.rank = config.seed if config.seed is not None else (seed or 0), rank
        if other is not None:
            other.detach()
        if not config.is_off and not (trainable and resumed):
            masker._original_row = rows_of.prepare_mask_row(embedding, mask_token, tokenizer)
        masker.rate = config.make_schedule().rate(0.0)
        masker._handles = [embedding.register_forward_pre_hook(masker._mask, with_kwargs=True)]
        if masker._decoder is not None and (masker._rereads or config.decoder_p > 0):
            masker._handles.append(masker._decoder.register_forward_pre_hook(masker._mask_decoder, with_kwargs=True))
        if config.where != "all":
            masker._handles.append(model.register_forward_pre_hook(masker._note, with_kwargs=True))
        if masker._replacement.removes:
            whole: Any = rows_of.unwrap(model)
            inner = getattr(whole, "base_model", whole)  # transformers calls it as a module, and PEFT not the outer one
            # before the hook of model.pooling, which must not see what is hidden
            hide = inner.register_forward_pre_hook(masker._hide, with_kwargs=True, prepend=True)
            masker._handles.append(hide)
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
        here = self._trains(module) and not self._replacement.removes
        return rows_of.swap(args, kwargs, self._masked, self._transposed) if here else None

    def _mask_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        swapped = self._masked_again if self._rereads else self._masked_in_decoder
        return rows_of.swap(args, kwargs, swapped, False) if self._trains(self._embedding) else None

    def _masked_again(self, given: Tensor) -> Tensor:
        """Return the ids for a decoder that reads the encoder's text once more, one place later."""
        if self._read is None:
            return given
        ids, masked = self._read
        return F.pad(ids, (1, -1)).where(F.pad(masked, (1, -1)), given)

    def _masked_in_decoder(self, ids: Tensor) -> Tensor:
        positions, seed = pattern.text_positions(ids, self._pad_id), self.seed ^ _DECODER
        masked = self.pattern(ids, None, positions, rate=self.config.decoder_p, seed=seed, shifted=True)
        draw = functools.partial(pattern.replacement_bits, ids, seed, self._step, self.rank, None, positions)
        self._counts.add_(torch.stack([masked.sum(), self._maskable[ids].sum()]))
        return self._replacement(ids, masked, draw)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = kwargs

    def _eligible(self, ids: Tensor, shifted: bool) -> Tensor | None:
        """Return which ids are of the part in `masking.where`, bool [batch, seq]; `shifted`: they are a decoder's."""
        part, labels = self.config.where, self._call.get("labels")
        unknown = labels is None or ((shifted or self._decoder is None) and labels.shape != ids.shape)
        if part == "all" or (unknown and self._rate == 0.0 and self.config.is_off):
            return None
        if labels is None or unknown:
            needed = f"masking.where: {part} needs labels for every token, in the same forward as input_ids"
            remedy = "leave label smoothing and other losses of the trainer off, or take where: all"
            raise MaskTokenError(f"{needed}; {remedy}", code="no-labels", where=part)
        if self._decoder is not None and not shifted:
            return torch.full_like(ids, part == "prompt", dtype=torch.bool)
        places = self._call.get("position_ids")
        starts = None if places is None or self._call.get("attention_mask") is not None else places == 0
        return pattern.in_part(part, labels, starts, shifted)

    def _trains(self, module: nn.Module) -> bool:
        return module.training and self.enabled and torch.is_grad_enabled()

    def _masked(self, given: Tensor) -> Tensor:
        """Return the ids to look up, for those that the embedding is called with: [batch, seq] or [seq]."""
        ids = given.reshape(-1, given.shape[-1])
        rows, positions = self._layout or (None, pattern.text_positions(ids, self._pad_id))
        masked = self.pattern(ids, rows, positions)
        draw = functools.partial(pattern.replacement_bits, ids, self.seed, self._step, self.rank, rows, positions)
        swapped = self._replacement(ids, masked, draw)
        self._count(ids, masked)
        if self._rereads:
            self._read = swapped, masked
        return swapped.reshape(given.shape)

    def _hide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take masked tokens of a padded batch out of the attention mask that the encoder or decoder is called with."""
        if self._layout is not None or not self._trains(self._embedding):
            return None
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        ids, visible = given.get("input_ids"), given.get("attention_mask")
        # without a mask, positions tell transformers where the texts of a packed row begin; with one it mixes them
        packed = visible is None and given.get("position_ids") is not None
        if ids is None or packed or (visible is not None and visible.dim() != 2):
            if self.config.is_off and self._rate == 0.0:
                return None
            needed = "masking.replace: drop needs input_ids, and an attention mask of shape [batch, seq] or none"
            needed += "; with position_ids, as of texts packed into a row, it needs the mask" if packed else ""
            raise MaskTokenError(f"{needed}; use replace: token", code="cannot-drop")
        masked = self.pattern(ids, None, pattern.text_positions(ids, self._pad_id))
        self._count(ids, masked)
        return (), {**given, "attention_mask": (torch.ones_like(ids) if visible is None else visible) * ~masked}

    def removed(self, input_ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor | None:
        """Return which tokens of a packed row to leave out in this training forward, bool [1, total]; None for none."""
        if not (self._replacement.removes and self._trains(self._embedding)):
            return None
        masked = self.pattern(input_ids, rows, positions)
        self._count(input_ids, masked)
        return masked

    def pattern(
        self,
        ids: Tensor,
        rows: Tensor | None,
        positions: Tensor,
        step: int | None = None,
        rate: float | None = None,
        seed: int | None = None,
        shifted: bool = False,
    ) -> Tensor:
        """Return which tokens are masked, bool [batch, seq], in the next training forward or in another `step`.

        `ids` are [batch, seq], those of a decoder if `shifted`: the labels one place later. `rows`, `positions`, `rate`
        and `seed` are as for `masked_positions`.
        """
        if self._step.device != ids.device:  # the model was moved after `attach`
            vars(self).update({k: part.to(ids.device) for k, part in vars(self).items() if isinstance(part, Tensor)})
        removes, config = self._replacement.removes, self.config
        maskable = self._maskable[ids]
        if removes:  # the first token is a causal model's attention sink, and the last one is what it is pooled at
            at = positions.expand_as(ids)
            last = torch.ones_like(maskable)
            last[:, :-1] = at[:, 1:] != at[:, :-1] + 1
            if self._pad_id is not None:
                last[:, :-1] |= ids[:, 1:] == self._pad_id
            maskable = maskable & ~last & (at != 0)
        text = torch.arange(len(ids), device=ids.device).unsqueeze(1) if rows is None else rows
        if self.clean_texts:
            maskable = maskable & (text >= self.clean_texts)
        if (eligible := self._eligible(ids, shifted)) is not None:
            maskable = maskable & eligible
        p: Any = self._rate_tensor if rate is None else rate
        if self.scale is not None:
            p = p * self.scale[text.clamp(max=len(self.scale) - 1)]  # a packed row may end in texts of padding
        return pattern.masked_positions(
            ids, p, self.seed if seed is None else seed, self._step if step is None else step, self.rank, maskable,
            word_starts=None if self._word_starts is None else self._word_starts[ids],
            unit=config.unit, span_length=config.span_length, rows=rows, positions=positions,
            share=config.share, per_text=config.per_text, spare_one=removes,
        )  # fmt: skip

    def _count(self, ids: Tensor, masked: Tensor) -> None:
        self._step.add_(1)
        self._counts.add_(torch.stack([masked.sum(), self._maskable[ids].sum()]))

    def pattern_of(self, batch: Mapping[str, Any], step: int | None = None, rate: float | None = None) -> Tensor:
        """Return `pattern` of a batch: of its `input_ids` and, if it is a packed row, `cu_seqlens`."""
        return self.pattern(batch["input_ids"], *self._places(batch), step, rate)

    def in_masked_texts(self, batch: Mapping[str, Any], masked: Tensor) -> Tensor:
        """Return which items of a batch, in the shape of its `labels`, are in texts of which something is masked."""
        rows = self._places(batch)[0]
        if rows is None:
            texts = masked.any(dim=1)
            return texts if batch["labels"].dim() == 1 else texts.unsqueeze(1).expand_as(masked)
        texts = torch.zeros(len(batch["cu_seqlens"]) - 1, dtype=torch.bool, device=masked.device)
        texts[rows[masked]] = True
        return texts if batch["labels"].dim() == 1 else texts[rows]

    def _places(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Return the text of each token, None for one text a row, and its position in the text."""
        ids, bounds = batch["input_ids"], batch.get("cu_seqlens")
        if bounds is None:
            return None, pattern.text_positions(ids, self._pad_id)
        columns = torch.arange(ids.shape[1], device=ids.device)
        rows = torch.searchsorted(bounds[1:].to(columns.dtype), columns, right=True)
        return rows[None], (columns - bounds[rows])[None]

    @property
    def hides_labels(self) -> bool:
        """Whether the labels of masked sub-tokens must not be scored: they are removed, or `score_masked` is off."""
        return self._replacement.removes or not self.config.score_masked

    @property
    def rate(self) -> float:
        """The masking rate p, 0 <= p < 1."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise MaskTokenError(f"the masking rate must be at least 0 and below 1, not {value}", code="rate-outside")
        if value > 0.0 and self._refused is not None:
            raise self._refused
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
        for handle in self._handles:
            handle.remove()
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
        """Continue where `state` was taken; MaskTokenError if seed, mask token or config differ."""
        current = self.state_dict()
        defaults = TokenMaskConfig().model_dump(mode="json")  # for keys that are newer than the saved state
        saved = {**state, "config": {**defaults, **state["config"]}}
        if differing := [key for key in ("seed", "mask_token_id", "config") if saved[key] != current[key]]:
            pairs = "; ".join(f"{key} was {saved[key]!r}, is {current[key]!r}" for key in differing)
            message = f"masking cannot be resumed with other settings: {pairs}"
            raise MaskTokenError(message, code="resume-differs", differing=differing)
        self.step, self.rate = state["step"], state["rate"]


def _check_possible(model: nn.Module, config: TokenMaskConfig) -> None:
    """Raise a MaskTokenError if a model cannot be masked as the config says."""
    inner: Any = rows_of.unwrap(model)
    name, about = type(inner).__name__, getattr(inner, "config", None)
    decoder = rows_of.find_decoder_embedding(model)
    if decoder is None or rows_of.rereads(model):
        if config.decoder_p > 0:
            why = "masking.decoder_p is for the decoder of a model that generates from an encoder's states"
            raise MaskTokenError(f"{why}, which {name} is not", code="no-decoder")
    elif config.where == "completion" and config.decoder_p == 0:
        why = "masking.where is completion, which is what the decoder reads, and decoder_p is 0"
        raise MaskTokenError(f"token masking would mask nothing: {why}; set decoder_p", code="masked-nothing")
    if not REPLACEMENTS[config.replace].removes:
        return
    remedy = "use replace: token"
    if decoder is not None:
        why = "the decoder reads the text, too"
    elif getattr(about, "model_type", "") in _COUNT_BY_MASK or getattr(about, "alibi", False):
        why = "it counts positions by its attention mask, so the tokens that stay would move"
    elif _NOT_ATTENTION & {*(getattr(getattr(about, "get_text_config", lambda: about)(), "layer_types", None) or ())}:
        why = "some of its layers do not attend but go through the text, where a gap would stay"
    elif (
        "SequenceClassification" in name
        and not hasattr(inner, "text_pooling")
        and getattr(about, "classifier_pooling", "cls") not in ("cls", "bos")
    ):
        why, remedy = "its head pools all tokens, dropped ones too", f"set model.pooling to mean, or {remedy}"
    else:
        return
    raise MaskTokenError(f"masking.replace: drop is not possible in {name}: {why}; {remedy}", code="cannot-drop")

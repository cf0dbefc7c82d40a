"""Mask words of the caller's choice outside training: the masker's swap, at given positions, for explanations."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import embedding_weight, find_embedding, prepare_mask_row
from tokmask_peft.masking.pattern import maskable_table
from tokmask_peft.masking.replacement import choose_mask_token

if TYPE_CHECKING:  # the masker needs no NumPy
    import numpy as np
    from numpy.typing import NDArray


class Occlusion:
    """Hides sub-tokens of a model's input as training does: ids are swapped on their way into the embedding.

    Padding, pooling and attention see the text as it is. A spare row is set to the mean embedding, as in training, and
    keeps it: no token uses the row.

    Args:
        model: a classification model, with or without PEFT.
        tokenizer: its tokenizer.
        config: how the model was masked in training; None if that is not known.

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
        config = TokenMaskConfig() if config is None else config
        self._embedding = find_embedding(model)
        rows = embedding_weight(self._embedding).shape[0]
        self.mask_token = choose_mask_token(tokenizer, rows, config.mask_token)
        name = tokenizer.convert_ids_to_tokens(self.mask_token.id)
        self._token = f"{name or 'an embedding row that no token uses'} (id {self.mask_token.id})"
        if not config.trainable_mask:
            prepare_mask_row(self._embedding, self.mask_token, tokenizer)
        table = maskable_table(tokenizer, rows, {*config.protect, tokenizer.pad_token_id})
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown not in {*config.protect, tokenizer.pad_token_id, self.mask_token.id}:
            table[unknown] = True
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
        """Hide `positions` in the forwards that this thread makes inside.

        Args:
            positions: bool, of the shape of the ids.
        """
        thread = threading.get_ident()

        def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != thread:  # a server may predict in one thread and explain in another
                return None
            name = None if args else next(iter(kwargs))
            given: Tensor = args[0] if name is None else kwargs[name]
            at = F.pad(positions, (0, given.shape[1] - positions.shape[1]))  # a packed row may have been lengthened
            hidden = given.masked_fill(at.to(given.device), self.mask_token.id)
            return ((hidden, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: hidden})

        handle = self._embedding.register_forward_pre_hook(swap, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

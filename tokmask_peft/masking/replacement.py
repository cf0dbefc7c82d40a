"""Choose the token that stands for a masked one, and say why; say which tokens are never masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.embedding import embedding_weight, read_rows, write_row

Wanted = Literal["auto", "mask", "spare", "unk"] | int

_REMEDY = "name an id of your own (masking.mask_token: ID), ideally one that your texts never use"


@dataclass(frozen=True)
class MaskToken:
    """The token that replaces masked ones.

    Attributes:
        id: row of the embedding matrix.
        kind: where it comes from: the tokenizer's mask token, a spare row, the unknown token, or an explicit id.
        reason: one sentence for the decision table.
    """

    id: int
    kind: Literal["mask", "spare", "unk", "id"]
    reason: str


def used_rows(tokenizer: Any) -> int:
    """Return how many rows, from 0, the tokenizer can address (a vocabulary may have gaps)."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def choose_mask_token(tokenizer: Any, embedding_rows: int, wanted: Wanted = "auto") -> MaskToken:
    """Choose the mask token.

    `auto` takes the tokenizer's own mask token; else the last row of the embedding matrix, if no token uses it (the
    last, so that tokens added later do not meet it); else the unknown token.

    Args:
        tokenizer: a transformers tokenizer.
        embedding_rows: rows of the model's embedding matrix.
        wanted: the choice of the recipe.

    Raises:
        MaskTokenError: the choice is impossible, or `auto` finds none. Id 0 is never taken for want of a better one.
    """
    if isinstance(wanted, int):
        return _explicit(tokenizer, embedding_rows, wanted)
    sources = ["mask", "spare", "unk"] if wanted == "auto" else [wanted]
    problems = []
    for source in sources:
        found = {"mask": _own, "spare": _spare, "unk": _unknown}[source](tokenizer, embedding_rows)
        if isinstance(found, MaskToken):
            return found
        problems.append(found)
    raise MaskTokenError(f"no mask token: {'; '.join(problems)}; {_REMEDY}")


def _own(tokenizer: Any, rows: int) -> MaskToken | str:
    token_id = tokenizer.mask_token_id
    if token_id is None:
        return "the tokenizer has no mask token"
    if token_id >= rows:
        return f"the tokenizer's mask token has id {token_id}, but the embedding has {rows} rows"
    return MaskToken(token_id, "mask", f"the tokenizer's own mask token, {tokenizer.mask_token!r}")


def _spare(tokenizer: Any, rows: int) -> MaskToken | str:
    used = used_rows(tokenizer)
    if used >= rows:
        return f"the embedding's {rows} rows are all in use by the tokenizer ({used} ids)"
    reason = f"the tokenizer has no use for rows {used} to {rows - 1} of the embedding; the last is set to the mean row"
    return MaskToken(rows - 1, "spare", reason)


def _unknown(tokenizer: Any, rows: int) -> MaskToken | str:
    token_id = tokenizer.unk_token_id
    if token_id is None:
        return "the tokenizer has no unknown token"
    for role in ("pad", "eos"):
        if token_id == getattr(tokenizer, f"{role}_token_id"):
            return f"the tokenizer's unknown token {tokenizer.unk_token!r} is also its {role} token"
    if token_id >= rows:
        return f"the tokenizer's unknown token has id {token_id}, but the embedding has {rows} rows"
    return MaskToken(
        token_id, "unk", f"the tokenizer's unknown token, {tokenizer.unk_token!r}: no mask token, no spare row"
    )


def _explicit(tokenizer: Any, rows: int, token_id: int) -> MaskToken:
    if not 0 <= token_id < rows:
        raise MaskTokenError(f"mask_token {token_id} is outside the embedding, which has rows 0 to {rows - 1}")
    if token_id >= used_rows(tokenizer):
        return MaskToken(token_id, "spare", f"row {token_id} as asked, which no token uses; set to the mean row")
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token_id in (tokenizer.mask_token_id, tokenizer.unk_token_id) and token_id != tokenizer.pad_token_id:
        return MaskToken(token_id, "id", f"{token!r} as asked")
    if token_id in tokenizer.all_special_ids:
        raise MaskTokenError(
            f"mask_token {token_id} is the special token {token!r}: the model would take a masked token for padding or "
            "for the end of the text; take an ordinary token, a spare row, or leave mask_token at auto"
        )
    return MaskToken(token_id, "id", f"{token!r} as asked, an ordinary token of the tokenizer")


def maskable_table(tokenizer: Any, rows: int, protected: set[int | None]) -> Tensor:
    """Say for every id whether it may be masked; bool [rows].

    The unknown token counts as special, as it does for the tokenizer: masking it would hide next to nothing.
    """
    specials = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    table = torch.ones(rows, dtype=torch.bool)
    for token_id in {*tokenizer.all_special_ids, *specials, *protected}:
        if token_id is not None and 0 <= token_id < rows:
            table[token_id] = False
    return table


@torch.no_grad()
def fill_spare_row(embedding: nn.Module, mask_token: MaskToken, real_rows: int) -> Tensor:
    """Set the mask token's row to the mean of the rows that tokens use (spare rows hold whatever they were born with).

    Call it before PEFT wraps the embedding for `trainable_token_indices`, which copies the row when it is made.

    Args:
        embedding: the input embedding, bare or wrapped by PEFT.
        mask_token: whose row is written, in place.
        real_rows: the rows from 0 to average (`used_rows(tokenizer)`).

    Returns:
        The row as it was, [hidden].

    Raises:
        MaskTokenError: the matrix is not here as a whole (sharded by ZeRO-3 or FSDP).
    """
    weight = embedding_weight(embedding)
    if weight.dim() != 2 or weight.shape[0] <= mask_token.id:
        raise MaskTokenError(
            f"the embedding matrix has shape {list(weight.shape)} here, so row {mask_token.id} cannot be written: "
            "attach before the model is sharded, or choose mask_token: unk"
        )
    original = read_rows(embedding, mask_token.id, mask_token.id + 1)[0].clone()
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for first in range(0, real_rows, 8192):  # in chunks: an fp32 copy of the whole matrix may not fit
        total += read_rows(embedding, first, min(first + 8192, real_rows)).sum(dim=0, dtype=torch.float32)
    write_row(embedding, mask_token.id, total / real_rows)
    return original

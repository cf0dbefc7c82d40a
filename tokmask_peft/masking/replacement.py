"""What takes the place of a masked token. Your own way to replace is a subclass of `Replacement` in `REPLACEMENTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokmask_peft.errors import MaskTokenError

if TYPE_CHECKING:  # the section `masking` of a recipe is read without torch
    from torch import Tensor


@dataclass(frozen=True)
class MaskToken:
    """The token that replaces masked ones."""

    id: int  # row of the embedding matrix
    kind: Literal["mask", "spare", "unk", "id"]  # where it comes from; id: named by the caller
    reason: str  # one sentence for the decision table


def used_rows(tokenizer: Any) -> int:
    """Return how many embedding rows, from 0, the tokenizer can address (a vocabulary may have gaps)."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def choose_mask_token(
    tokenizer: Any, embedding_rows: int, wanted: Literal["auto", "mask", "spare", "unk"] | int = "auto"
) -> MaskToken:
    """Choose the mask token.

    `auto` takes the tokenizer's own mask token; without one, the last row of the embedding matrix if no token uses it
    (the last, so that tokens added later do not collide with it); failing that, the unknown token.

    Raises:
        MaskTokenError: the choice is impossible, or `auto` finds none. Id 0 is never taken as a last resort.
    """
    if isinstance(wanted, int):
        return _explicit(tokenizer, embedding_rows, wanted)
    problems = []
    for kind in ("mask", "spare", "unk") if wanted == "auto" else (wanted,):
        found = _find(tokenizer, embedding_rows, kind)
        if isinstance(found, MaskToken):
            return found
        problems.append(found)
    remedy = "set masking.mask_token to a token id, ideally of a token that your texts never use"
    raise MaskTokenError(f"no mask token: {'; '.join(problems)}; {remedy}", code="no-mask-token", problems=problems)


def _find(tokenizer: Any, rows: int, kind: Literal["mask", "spare", "unk"]) -> MaskToken | str:
    """Return the mask token of one kind, or why it cannot be taken."""
    if kind == "spare":
        used = used_rows(tokenizer)
        if used >= rows:
            return f"the tokenizer uses all {rows} rows of the embedding ({used} ids)"
        unused = f"the tokenizer does not use rows {used} to {rows - 1} of the embedding"
        return MaskToken(rows - 1, kind, f"{unused}; the last is set to the mean row")
    name = {"mask": "mask token", "unk": "unknown token"}[kind]
    token, token_id = getattr(tokenizer, f"{kind}_token", None), getattr(tokenizer, f"{kind}_token_id")
    if token_id is None:
        return f"the tokenizer has no {name}"
    for role in ("pad", "eos") if kind == "unk" else ():
        if token_id == getattr(tokenizer, f"{role}_token_id"):
            return f"the tokenizer's {name} {token!r} is also its {role} token"
    if token_id >= rows:
        return f"the tokenizer's {name} has id {token_id}, but the embedding has {rows} rows"
    if kind == "mask":
        return MaskToken(token_id, kind, f"the tokenizer's own mask token, {token!r}")
    return MaskToken(token_id, kind, f"the tokenizer's unknown token, {token!r}: it has no mask token and no spare row")


def _explicit(tokenizer: Any, rows: int, token_id: int) -> MaskToken:
    if not 0 <= token_id < rows:
        message = f"mask_token {token_id}: the embedding has rows 0 to {rows - 1}; take one of these, or auto"
        raise MaskTokenError(message, code="mask-token-outside", token_id=token_id, rows=rows)
    if token_id >= used_rows(tokenizer):
        return MaskToken(token_id, "spare", f"row {token_id}, as configured; no token uses it; set to the mean row")
    token, usual = tokenizer.convert_ids_to_tokens(token_id), {tokenizer.mask_token_id, tokenizer.unk_token_id}
    if token_id not in tokenizer.all_special_ids:
        return MaskToken(token_id, "id", f"{token!r}, as configured, an ordinary token of the tokenizer")
    if token_id in usual - {tokenizer.pad_token_id}:
        return MaskToken(token_id, "id", f"{token!r}, as configured")
    why = f"mask_token {token_id} is the special token {token!r}, which may mean padding or the end of the text"
    message = f"{why}; take an ordinary token, a spare row, or leave mask_token at auto"
    raise MaskTokenError(message, code="mask-token-special", token_id=token_id, rows=rows)


class Replacement:
    """Replaces the masked tokens of a batch; made once for each masker, called in every training forward.

    It runs inside `torch.compile`, so it must not branch on the values of tensors.

    Args:
        mask_token: as chosen.
        maskable: for every id whether it may be masked, bool [rows].
        tokenizer: that of the model.
    """

    def __init__(self, mask_token: MaskToken, maskable: Tensor, tokenizer: Any) -> None:
        self.mask_token = mask_token

    def __call__(self, input_ids: Tensor, masked: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """Return the ids that the embedding looks up; `input_ids` themselves must stay as they are.

        Args:
            input_ids: [batch, seq].
            masked: which tokens are masked, bool [batch, seq].
            draw: returns 24 random bits per token, int64 [batch, seq]. They do not depend on which tokens are masked,
                and a resumed training draws the same.
        """
        raise NotImplementedError


class TokenReplacement(Replacement):
    """Masked tokens become the mask token."""

    def __call__(self, input_ids: Tensor, masked: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """Return the ids with the mask token at the masked places."""
        return input_ids.masked_fill(masked, self.mask_token.id)


REPLACEMENTS: dict[str, type[Replacement]] = {"token": TokenReplacement}
"""By the name in `masking.replace`. Add one of your own before the recipe is read: `REPLACEMENTS["mine"] = Mine`."""

"""What takes the place of a masked token. Your own way to replace is a subclass of `Replacement` in `REPLACEMENTS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tokmask_peft.errors import MaskTokenError

if TYPE_CHECKING:  # the section `masking` of a recipe is read without torch
    from torch import Tensor


@dataclass(frozen=True)
class MaskToken:
    """The token that replaces masked ones."""

    id: int  # row of the embedding matrix
    kind: Literal["mask", "spare", "unk", "id", "none"]  # where it comes from; id: named by the caller
    reason: str  # one sentence for the decision table


NO_MASK_TOKEN = MaskToken(-1, "none", "the tokenizer has none, and this masking needs no mask token")
_SENTINELS = ("<extra_id_0>", "▁<extra_id_0>")  # what T5, without a mask token, saw for masked text in pretraining


def used_rows(tokenizer: Any) -> int:
    """Return how many embedding rows, from 0, the tokenizer can address (a vocabulary may have gaps)."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def choose_mask_token(
    tokenizer: Any,
    embedding_rows: int,
    wanted: Literal["auto", "mask", "spare", "unk"] | int = "auto",
    why_untrained: Callable[[int], str | None] = lambda token_id: None,
) -> MaskToken:
    """Choose the mask token as `wanted`, the value of `masking.mask_token`, says.

    `auto` takes the tokenizer's own mask token if its row was trained; otherwise its unknown token, likewise; otherwise
    the last row of the embedding matrix if no token uses it (the last, so that tokens added later do not collide with
    it). If none of these is left, it takes the tokenizer's token whose row was not trained. `why_untrained` says why a
    row was probably never trained, or None (`masking.embedding`). MaskTokenError if the choice is impossible, or `auto`
    finds none: id 0 is never taken as a last resort.
    """
    if isinstance(wanted, int):
        return _explicit(tokenizer, embedding_rows, wanted)
    problems: list[str] = []
    untrained: list[tuple[MaskToken, str]] = []
    for source in ("mask", "unk", "spare") if wanted == "auto" else (wanted,):
        found = _find(tokenizer, embedding_rows, source)
        if isinstance(found, str):
            problems.append(found)
            continue
        why = None if source == "spare" or wanted != "auto" else why_untrained(found.id)
        if why is None:
            reason = "; ".join([found.reason, *(f"not {other.reason}: {why}" for other, why in untrained)])
            return replace(found, reason=reason)
        untrained.append((found, why))
    if untrained:
        found, why = untrained[0]
        better = "masking.trainable_mask: true trains a new row, and masking.replace: drop needs none"
        return replace(found, reason=f"{found.reason}; {why}; {better}")
    remedy = "set masking.mask_token to a token id, ideally of a token that your texts never use"
    raise MaskTokenError(f"no mask token: {'; '.join(problems)}; {remedy}", code="no-mask-token", problems=problems)


def _find(tokenizer: Any, rows: int, kind: Literal["mask", "spare", "unk"]) -> MaskToken | str:
    """Return the mask token of one kind, or why it cannot be taken."""
    if kind == "spare":
        used = used_rows(tokenizer)
        if used >= rows:
            return f"the tokenizer uses all {rows} rows of the embedding ({used} ids)"
        unused = f"the tokenizer does not use rows {used} to {rows - 1} of the embedding"
        return MaskToken(rows - 1, kind, f"{unused}; the last becomes a typical one")
    name = {"mask": "mask token", "unk": "unknown token"}[kind]
    token, token_id = (getattr(tokenizer, f"{kind}_token{end}", None) for end in ("", "_id"))
    if token_id is None and kind == "mask":
        vocabulary = tokenizer.get_vocab()
        for sentinel in _SENTINELS:
            if vocabulary.get(sentinel, rows) < rows:
                return MaskToken(vocabulary[sentinel], kind, f"{sentinel!r}, which was masked text in pretraining")
    if token_id is None:
        return f"the tokenizer has no {name}"
    for role in ("pad", "eos") if kind == "unk" else ():
        if token_id == getattr(tokenizer, f"{role}_token_id"):
            return f"the tokenizer's {name} {token!r} is also its {role} token"
    if token_id >= rows:
        return f"the tokenizer's {name} has id {token_id}, but the embedding has {rows} rows"
    if kind == "mask":
        return MaskToken(token_id, kind, f"the tokenizer's own mask token, {token!r}")
    return MaskToken(token_id, kind, f"the tokenizer's unknown token, {token!r}")


def _explicit(tokenizer: Any, rows: int, token_id: int) -> MaskToken:
    if not 0 <= token_id < rows:
        message = f"mask_token {token_id}: the embedding has rows 0 to {rows - 1}; take one of these, or auto"
        raise MaskTokenError(message, code="mask-token-outside", token_id=token_id, rows=rows)
    if token_id >= used_rows(tokenizer):
        reason = f"row {token_id}, as configured; no token uses it, and it becomes a typical one"
        return MaskToken(token_id, "spare", reason)
    token, usual = tokenizer.convert_ids_to_tokens(token_id), {tokenizer.mask_token_id, tokenizer.unk_token_id}
    if token_id not in tokenizer.all_special_ids:
        return MaskToken(token_id, "id", f"{token!r}, as configured, an ordinary token of the tokenizer")
    if token in _SENTINELS or token_id in usual - {tokenizer.pad_token_id}:
        return MaskToken(token_id, "id", f"{token!r}, as configured")
    why = f"mask_token {token_id} is the special token {token!r}, which may mean padding or the end of the text"
    message = f"{why}; take an ordinary token, a spare row, or leave mask_token at auto"
    raise MaskTokenError(message, code="mask-token-special", token_id=token_id, rows=rows)


class Replacement:
    """Replaces the masked tokens of a batch; made once for each masker, called in every training forward.

    It runs inside `torch.compile`, so it must not branch on the values of tensors. If it `removes` masked tokens, it is
    not called: no other token sees them, and a packed row is computed without them. `mask_token` is `NO_MASK_TOKEN` if
    there is none, and this class does not need one; `maskable` says for every id whether it may be masked, bool [rows].
    """

    removes: ClassVar[bool] = False
    needs_mask_token: ClassVar[bool] = True

    def __init__(self, mask_token: MaskToken, maskable: Tensor, tokenizer: Any) -> None:
        self.mask_token = mask_token

    def __call__(self, input_ids: Tensor, masked: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """Return the ids that the embedding looks up, [batch, seq]; `input_ids` themselves must stay as they are.

        `masked` is bool [batch, seq]; `draw` returns 24 random bits per token, int64 [batch, seq], which do not depend
        on which tokens are masked, and are the same in a resumed training.
        """
        raise NotImplementedError


class TokenReplacement(Replacement):
    """Masked tokens become the mask token."""

    def __call__(self, input_ids: Tensor, masked: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        return input_ids.masked_fill(masked, self.mask_token.id)


class RandomReplacement(Replacement):
    """Masked tokens become other tokens of the vocabulary, each as likely as any (Takase and Kiyono 2021)."""

    needs_mask_token = False

    def __init__(self, mask_token: MaskToken, maskable: Tensor, tokenizer: Any) -> None:
        super().__init__(mask_token, maskable, tokenizer)
        self.pool = maskable[: used_rows(tokenizer)].nonzero().flatten()

    def __call__(self, input_ids: Tensor, masked: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        self.pool = self.pool.to(input_ids.device)
        return self.pool[draw() % len(self.pool)].where(masked, input_ids)


class Removal(Replacement):
    """Masked tokens leave the text, and the others keep their positions (as in Cutoff, Shen et al. 2020)."""

    removes, needs_mask_token = True, False


REPLACEMENTS: dict[str, type[Replacement]] = {"token": TokenReplacement, "random": RandomReplacement, "drop": Removal}
"""By the name in `masking.replace`. Add one of your own before the recipe is read: `REPLACEMENTS["mine"] = Mine`."""

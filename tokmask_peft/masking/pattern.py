"""Which tokens are masked: a pure function of counters, so that no random state is read or written.

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the finaliser of
MurmurHash3 (Appleby 2011) absorbs seed, rank, step, text and position in turn. The 32-bit words are stored in int64, so
that no product overflows: signed overflow is undefined in C++, and the code that torch.compile generates for CPUs then
runs past the end of its loops. The result is the same on CPU and GPU, needs no synchronisation, and can be traced.

What counts as a word depends on the marks that the tokenizer leaves on its sub-tokens. WordPiece (mBERT) splits at
punctuation, so "don't" is three words. Byte-level BPE and SentencePiece mark spaces only: a punctuation mark or a digit
without a space before it continues the word, and a text in a script without spaces is one word.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmask_peft.errors import MaskTokenError

Unit = Literal["token", "word", "span", "continuation"]
Word = TypeVar("Word", int, Tensor)
_WORD = 2**32 - 1
# Constants above 2**31 are written as their negative twins modulo 2**32: |word * constant| stays below 2**63.
_GOLDEN = 0x9E3779B9 - 2**32  # the golden ratio's fraction
_MURMUR = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
_MASK_KEYS = (0x243F6A88, 0x85A308D3)  # the digits of pi
_REPLACEMENT_KEYS = (0x13198A2E, 0x03707344)  # its next digits
_CHOSEN, _RATE = 2**31 - 1, 2**31 - 2  # draws of a text: whether it is masked, and at what rate


def _mix(word: Word) -> Word:
    """Scramble 32-bit words: MurmurHash3's finaliser, a bijection."""
    word = ((word ^ (word >> 16)) * _MURMUR[0]) & _WORD
    word = ((word ^ (word >> 13)) * _MURMUR[1]) & _WORD
    return word ^ (word >> 16)


def _absorb(state: Word, word: Word) -> Word:
    """Add a word to a state; a bijection of either."""
    return _mix((state + (word & _WORD) * _GOLDEN) & _WORD)


def _key(start: int, seed: int, rank: int) -> int:
    """Return 32 bits that depend on the seed (64 bits of it) and the rank."""
    return _absorb(_absorb(_absorb(start, seed), seed >> 32), rank)


def _streams(
    keys: tuple[int, int], seed: int, step: Tensor | int, rank: int, rows: Tensor | None, shape_of: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the stream of each text, broadcastable to `shape_of`, [batch, seq], and the key of the step."""
    device = shape_of.device
    rows = torch.arange(shape_of.shape[0], device=device).unsqueeze(1) if rows is None else rows
    step = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.int64, device=device)
    state = _absorb(torch.full_like(step, _key(keys[0], seed, rank)), step)
    return _absorb(state, rows.to(torch.int64)), _mix(state ^ _key(keys[1], seed, rank))


def _draw(stream: Tensor, step_key: Tensor, index: Tensor) -> Tensor:
    """Return 24 random bits, element `index` of each text's stream; the step enters again, to part equal streams."""
    return _mix(_absorb(stream, index) ^ step_key) >> 8


def text_positions(input_ids: Tensor, pad_id: int | None) -> Tensor:
    """Return positions from each text's first token, int64 [1 or batch, seq], negative on left padding."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    if pad_id is None:
        return positions
    leading = (input_ids == pad_id).to(torch.int64).cumprod(dim=1).sum(dim=1, keepdim=True)
    return positions - leading


def _word_indices(maskable: Tensor, word_starts: Tensor, positions: Tensor) -> Tensor:
    """Number the words of each text, [batch, seq]; a token that may not be masked ends a word, and has no number."""
    after_fixed = torch.ones_like(maskable)
    after_fixed[:, 1:] = ~maskable[:, :-1]
    text_start = (positions == 0).expand_as(maskable)
    counted = ((word_starts | after_fixed | text_start) & maskable).to(torch.int64)
    count = counted.cumsum(dim=1)
    # In a packed row the count continues across texts: subtract what came before this text.
    columns = torch.arange(maskable.shape[1], device=maskable.device).expand_as(count)
    first_column = torch.where(text_start, columns, 0).cummax(dim=1).values
    return count - (count - counted).gather(1, first_column) - 1


def masked_positions(
    input_ids: Tensor,
    rate: Tensor | float,
    seed: int,
    step: Tensor | int,
    rank: int,
    maskable: Tensor,
    word_starts: Tensor | None = None,
    unit: Unit = "token",
    span_length: int = 1,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    share: float = 1.0,
    per_text: Literal["fixed", "uniform"] = "fixed",
    spare_one: bool = False,
) -> Tensor:
    """Return which tokens are masked, bool [batch, seq].

    Each unit draws u in [0, 1), uniform with 24 bits, and is masked if u < rate: a higher rate only adds. So does a
    higher share of the texts, each of which draws whether it is masked at all.

    `input_ids`, [batch, seq], give only shape and device. `rate`, in [0, 1), `rows`, the index of each token's text in
    the batch (default: the row), and `positions`, its position there (default: the column), can be broadcast to that;
    `step` counts training forwards, as a number or a 0-dim int64 tensor. `maskable` is false for special tokens,
    padding and protected tokens; `word_starts` is needed for words and spans, both bool [batch, seq]. A `unit` is
    masked as a whole; `continuation` is a sub-token that does not begin a word. In spans, of `span_length` words, a
    random shift per text moves the borders from step to step. With `per_text`, a text may draw its rate, from 0 to
    twice the rate; with `spare_one`, the unit with the highest u is never masked where all would be.
    """
    stream, step_key = _streams(_MASK_KEYS, seed, step, rank, rows, input_ids)
    index = text_positions(input_ids, None) if positions is None else positions.to(torch.int64)
    if unit != "token":
        if word_starts is None:
            raise ValueError(f"unit {unit!r} needs word_starts")
        if unit == "continuation":
            maskable = maskable & ~word_starts
        else:
            index = _word_indices(maskable, word_starts, index)
        if unit == "span":
            shift = _draw(stream, step_key, torch.zeros_like(stream)) % span_length
            index = (index + shift).div(span_length, rounding_mode="floor")
    u = _draw(stream, step_key, index + 1).to(torch.float32) * 2.0**-24
    if per_text == "uniform":
        rate = rate * 2.0 * _of_text(stream, step_key, _RATE)
    if share < 1.0:
        maskable = maskable & (_of_text(stream, step_key, _CHOSEN) < share)
    masked = (u < rate) & maskable
    if spare_one:
        texts = torch.arange(len(u), device=u.device).unsqueeze(1) if rows is None else rows.to(torch.int64)
        texts, drawn = texts.expand_as(u).reshape(-1), u.expand_as(maskable).where(maskable, -1.0).reshape(-1)
        highest = drawn.new_full((len(drawn),), -1.0).scatter_reduce(0, texts, drawn, "amax")
        masked = masked & (drawn < highest[texts]).view_as(masked)
    return masked


def _of_text(stream: Tensor, step_key: Tensor, index: int) -> Tensor:
    """Return a number in [0, 1) for each text, broadcastable to [batch, seq]; `index` is one that no token has."""
    return _draw(stream, step_key, torch.full_like(stream, index)).to(torch.float32) * 2.0**-24


def replacement_bits(
    input_ids: Tensor, seed: int, step: Tensor | int, rank: int, rows: Tensor | None, positions: Tensor
) -> Tensor:
    """Return 24 random bits per token, int64 [batch, seq], independent of the masks; arguments: `masked_positions`."""
    stream, step_key = _streams(_REPLACEMENT_KEYS, seed, step, rank, rows, input_ids)
    return _draw(stream, step_key, positions.to(torch.int64)).expand(input_ids.shape)


def in_part(
    part: Literal["prompt", "completion"], labels: Tensor, starts: Tensor | None = None, shifted: bool = False
) -> Tensor:
    """Return which tokens belong to the prompt or to the completion, bool [batch, seq].

    `labels`, [batch, seq], are -100 for the prompt; if `shifted`, the tokens are a decoder's input, which has each
    label one place later. `starts`, bool [batch, seq], are where the texts of a packed row begin: collators set the
    label there to -100, whatever the token is, so it goes with the one after it.
    """
    scored = labels != -100
    if shifted:
        scored = F.pad(scored, (1, -1))
    if starts is not None:
        scored = scored.where(~starts, F.pad(scored, (-1, 1)))
    return scored if part == "completion" else ~scored


def maskable_table(tokenizer: Any, rows: int, protected: set[int | None]) -> Tensor:
    """Return which ids may be masked, bool [rows]: no special ones, so not the unknown token, which hides enough."""
    specials = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    table = torch.ones(rows, dtype=torch.bool)
    fixed = {*tokenizer.all_special_ids, *specials, *protected} - {None}
    table[[token_id for token_id in fixed if 0 <= token_id < rows]] = False
    return table


def word_start_table(tokenizer: Any, rows: int) -> Tensor:
    """Return which ids start a word, or are not in words, bool [rows]; MaskTokenError if the tokenizer marks none."""
    starts = _start_test(tokenizer)
    if isinstance(starts, str):
        name = type(tokenizer).__name__
        needed = f"masking.unit word and span need a tokenizer that marks where words begin; {name} {starts}"
        raise MaskTokenError(f"{needed}; use unit: token", code="no-word-marks", tokenizer=name)
    table = torch.ones(rows, dtype=torch.bool)
    added = tokenizer.added_tokens_decoder
    for token, token_id in tokenizer.get_vocab().items():
        if token_id < rows and token_id not in added:
            table[token_id] = starts(token)
    return table


def _start_test(tokenizer: Any) -> Callable[[str], bool] | str:
    """Return a test of whether a token's text starts a word, or why there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "has no Rust backend"
    if prefix := getattr(backend.model, "continuing_subword_prefix", None):
        return lambda token: not token.startswith(prefix)
    if getattr(backend.model, "end_of_word_suffix", None):
        return "marks where words end, not where they begin"
    stages = (backend.pre_tokenizer, backend.normalizer, backend.decoder)
    saved = " ".join(stage.__getstate__().decode() for stage in stages if stage is not None)
    if mark := re.search(r'"type":"Metaspace","replacement":"(.)"', saved):
        return lambda token: token.startswith(mark[1])
    # Llama and Gemma write the mark in the normalizer or read it in the decoder instead.
    if any("▁" in part for part in re.findall(r'"type":"Replace","pattern":[^}]*},"content":"[^"]*', saved)):
        return lambda token: token.startswith("▁")
    if '"type":"ByteLevel"' in saved:
        return lambda token: token.startswith(("Ġ", "Ċ", "ĉ", "č"))  # space, newline, tab, carriage return
    return "marks no word borders"

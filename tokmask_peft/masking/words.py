"""Where words begin, read off the marks that a tokenizer leaves on its sub-tokens.

What counts as a word is the tokenizer's own idea. WordPiece (mBERT) cuts at punctuation, so "don't" is three words.
Byte-level BPE and SentencePiece mark spaces only: a punctuation mark or a digit without a space before it continues the
word, and a text in a script without spaces is one word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokmask_peft.errors import MaskTokenError

_BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")  # how byte-level BPE writes space, newline, tab, carriage return


def word_start_table(tokenizer: Any, rows: int) -> Tensor:
    """Say for every id whether it starts a word.

    Args:
        tokenizer: a transformers tokenizer with a Rust backend.
        rows: rows of the embedding matrix.

    Returns:
        bool [rows]; true for added tokens and for rows that no token uses.

    Raises:
        MaskTokenError: the tokenizer leaves no marks that this function knows.
    """
    starts = _start_test(tokenizer)
    table = torch.ones(rows, dtype=torch.bool)
    added = tokenizer.added_tokens_decoder
    for token, token_id in tokenizer.get_vocab().items():
        if token_id < rows and token_id not in added:
            table[token_id] = starts(token)
    return table


def _start_test(tokenizer: Any) -> Callable[[str], bool]:
    """Return a test of whether a token's text starts a word."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown_kind(tokenizer, "has no Rust backend")
    prefix = getattr(backend.model, "continuing_subword_prefix", None)
    if prefix:
        return lambda token: not token.startswith(prefix)
    if getattr(backend.model, "end_of_word_suffix", None):
        raise _unknown_kind(tokenizer, "marks where words end, not where they begin")
    parts = [part for stage in (backend.pre_tokenizer, backend.normalizer, backend.decoder) for part in _parts(stage)]
    for part in parts:
        if part.get("type") == "Metaspace":
            mark = part["replacement"]
            return lambda token: token.startswith(mark)
    # Llama and Gemma write the mark in the normalizer or read it in the decoder instead.
    if any(part.get("type") == "Replace" and "▁" in json.dumps(part, ensure_ascii=False) for part in parts):
        return lambda token: token.startswith("▁")
    if any(part.get("type") == "ByteLevel" for part in parts):
        return lambda token: token.startswith(_BYTE_LEVEL_SPACES)
    raise _unknown_kind(tokenizer, "marks no word borders")


def _parts(stage: Any) -> list[dict[str, Any]]:
    """List the parts of a normalizer, pre-tokenizer or decoder, as the JSON that they are saved as."""
    if stage is None:
        return []
    pending = [json.loads(stage.__getstate__())]
    found = []
    while pending:
        part = pending.pop(0)
        found.append(part)
        for key in ("normalizers", "pretokenizers", "decoders"):
            pending.extend(part.get(key, []))
    return found


def _unknown_kind(tokenizer: Any, why: str) -> MaskTokenError:
    return MaskTokenError(
        f"masking.unit word and span need a tokenizer that marks where words begin; {type(tokenizer).__name__} {why}; "
        "use unit: token"
    )

"""Texts as windows of sub-tokens: a long text becomes several, and every word belongs to exactly one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.data.encode import spaced, words_need_a_space
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import Task

_PLACEHOLDER = "?"


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text, framed by the special tokens of the tokenizer.

    Attributes:
        text: index of the text.
        ids: token ids, special tokens included.
        size: sub-tokens of the text in it.
        words: token tasks: the words that take their label from this window; else empty.
        positions: for each of them the position of its first sub-token in `ids`.
    """

    text: int
    ids: list[int]
    size: int
    words: NDArray[np.int64]
    positions: NDArray[np.int64]


class Windower:
    """Cuts texts into windows, each as `encode` would give it for training.

    A text that fits is one window. A longer one is cut into even parts in sequence tasks. In token tasks neighbouring
    windows share a quarter of their sub-tokens, and a word takes its label from the window in whose inside it lies
    deeper, so that it has context on both sides.

    Args:
        tokenizer: a fast tokenizer.
        task: `sequence` or `token`.
        max_length: sub-tokens per window, special tokens included.

    Raises:
        DataError: the tokenizer is not a fast one, or `max_length` leaves no room.
    """

    def __init__(self, tokenizer: Any, task: Task, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"{type(tokenizer).__name__} is no fast tokenizer (one with a tokenizer.json)")
        self._tokenizer, self._task = tokenizer, task
        self._before, self._after = _frame(tokenizer)
        self._room = max_length - len(self._before) - len(self._after)
        if self._room < 2:
            raise DataError(f"windows of {max_length} sub-tokens leave no room beside the special tokens")
        self._lead = words_need_a_space(tokenizer) if task == "token" else False

    def cut(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> list[Window]:
        """Return the windows of strings (sequence tasks) or of lists of words (token tasks), in order."""
        if not texts:
            return []
        if self._task == "token":
            return [
                window
                for index, (ids, firsts) in enumerate(self._words([list(words) for words in texts]))
                for window in self._of_words(index, ids, firsts)
            ]
        encodings = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [window for index, ids in enumerate(encodings["input_ids"]) for window in self._of_text(index, ids)]

    def _of_text(self, index: int, ids: list[int]) -> list[Window]:
        if not ids:
            ids = self._stand_in()
        count = -(-len(ids) // self._room)
        borders = [part * len(ids) // count for part in range(count + 1)]
        none = np.zeros(0, dtype=np.int64)
        return [self._window(index, ids[start:stop], none, none) for start, stop in itertools.pairwise(borders)]

    def _of_words(self, index: int, ids: list[int], firsts: NDArray[np.int64]) -> list[Window]:
        overlap = self._room // 4
        last = max(len(ids) - self._room, 0)
        starts = [*range(0, last, self._room - overlap), last]
        # a word before the middle of what two windows share is the earlier one's
        borders = [(earlier + self._room + later) // 2 for earlier, later in itertools.pairwise(starts)]
        owner = np.searchsorted(np.asarray(borders, dtype=np.int64), firsts, side="right")
        found = []
        for number, start in enumerate(starts):
            words = np.flatnonzero(owner == number)
            if len(words):
                part = ids[start : start + self._room]
                found.append(self._window(index, part, words, firsts[words] - start + len(self._before)))
        return found

    def _window(self, text: int, part: list[int], words: NDArray[np.int64], positions: NDArray[np.int64]) -> Window:
        return Window(text, [*self._before, *part, *self._after], len(part), words, positions)

    def _words(self, texts: list[list[str]]) -> list[tuple[list[int], NDArray[np.int64]]]:
        """Return the ids of each text, and the position of every word's first sub-token among them."""
        encoded = self._encode_words(texts)
        # a word that the tokenizer drops is encoded as the unknown token, as in training
        lacking = [number for number, (_, firsts) in enumerate(encoded) if (firsts < 0).any()]
        stand_in = self._tokenizer.unk_token or _PLACEHOLDER
        filled = [
            [stand_in if first < 0 else word for word, first in zip(texts[number], encoded[number][1], strict=True)]
            for number in lacking
        ]
        for number, again in zip(lacking, self._encode_words(filled), strict=True):
            if (again[1] < 0).any():
                raise DataError(f"a word gets no token, nor does {stand_in!r} in its place: {texts[number]}")
            encoded[number] = again
        return encoded

    def _encode_words(self, texts: list[list[str]]) -> list[tuple[list[int], NDArray[np.int64]]]:
        """As `_words`, with -1 for a word without a sub-token."""
        if not texts:
            return []
        encodings = self._tokenizer(
            [spaced(words) for words in texts] if self._lead else texts,
            is_split_into_words=True,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        ).encodings
        found = []
        for words, encoding in zip(texts, encodings, strict=True):
            firsts = np.full(len(words), -1, dtype=np.int64)
            for position, word in reversed(list(enumerate(encoding.word_ids))):
                if word is not None:
                    firsts[word] = position
            found.append((encoding.ids, firsts))
        return found

    def _stand_in(self) -> list[int]:
        """Return the ids for a text of which the tokenizer drops every character."""
        return list(self._tokenizer(self._tokenizer.unk_token or _PLACEHOLDER, add_special_tokens=False)["input_ids"])


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that stand before and after every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(full)) if full[at : at + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]

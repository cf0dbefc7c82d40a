"""Texts as windows of sub-tokens: a long text becomes several, and every word belongs to exactly one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.data.encode import spaced, words_need_a_space
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import Task

_PLACEHOLDER = "?"
_NONE: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
_Encoded = tuple[list[int], list[int | None], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text, framed by the special tokens of the tokenizer.

    Attributes:
        text: index of the text.
        ids: token ids, special tokens included.
        size: sub-tokens of the text in it.
        words: token tasks: the words that take their label from this window; else empty.
        positions: for each of them the position of its first sub-token in `ids`.
        owners: where asked for, the word of each id, -1 for none: int64 [ids].
    """

    text: int
    ids: list[int]
    size: int
    words: NDArray[np.int64]
    positions: NDArray[np.int64]
    owners: NDArray[np.int64] | None = None


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

    def cut(self, texts: Sequence[str] | Sequence[Sequence[str]], owners: bool = False) -> list[Window]:
        """Return the windows of strings (sequence tasks) or of lists of words (token tasks), in order.

        Args:
            texts: at least a word each.
            owners: say of each id which word it belongs to; in strings, words are what stands between white space.
        """
        if not texts:
            return []
        if self._task == "token":
            return [
                window
                for index, (ids, word_ids, firsts) in enumerate(self._words([list(words) for words in texts]))
                for window in self._of_words(index, ids, firsts, _word_array(word_ids) if owners else None)
            ]
        strings = cast(Sequence[str], texts)
        encoded = self._tokenizer(list(strings), add_special_tokens=False, return_attention_mask=False, verbose=False)
        found: list[Window] = []
        for index, ids in enumerate(encoded["input_ids"]):
            of = words_of(strings[index], encoded.encodings[index].offsets) if owners else None
            found.extend(self._of_text(index, ids, of))
        return found

    def _of_text(self, index: int, ids: list[int], owners: NDArray[np.int64] | None) -> Iterator[Window]:
        if not ids:
            ids = self._stand_in()
            owners = None if owners is None else np.zeros(len(ids), dtype=np.int64)
        count = -(-len(ids) // self._room)
        borders = [part * len(ids) // count for part in range(count + 1)]
        for start, stop in itertools.pairwise(borders):
            yield self._window(index, ids, start, stop, _NONE, _NONE, owners)

    def _of_words(
        self, index: int, ids: list[int], firsts: NDArray[np.int64], owners: NDArray[np.int64] | None
    ) -> Iterator[Window]:
        overlap = self._room // 4
        last = max(len(ids) - self._room, 0)
        starts = [*range(0, last, self._room - overlap), last]
        # a word before the middle of what two windows share is the earlier one's
        borders = [(earlier + self._room + later) // 2 for earlier, later in itertools.pairwise(starts)]
        window_of = np.searchsorted(np.asarray(borders, dtype=np.int64), firsts, side="right")
        for number, start in enumerate(starts):
            words = np.flatnonzero(window_of == number)
            if len(words):
                positions = firsts[words] - start + len(self._before)
                yield self._window(index, ids, start, start + self._room, words, positions, owners)

    def _window(
        self,
        text: int,
        ids: list[int],
        start: int,
        stop: int,
        words: NDArray[np.int64],
        positions: NDArray[np.int64],
        owners: NDArray[np.int64] | None,
    ) -> Window:
        part = ids[start:stop]
        if owners is not None:
            frame = len(self._before), len(self._after)
            owners = np.pad(owners[start:stop], frame, constant_values=-1)
        return Window(text, [*self._before, *part, *self._after], len(part), words, positions, owners)

    def _words(self, texts: list[list[str]]) -> list[_Encoded]:
        """Return of each text its ids, the word of each, and the position of every word's first sub-token."""
        encoded = self._encode_words(texts)
        # a word that the tokenizer drops is encoded as the unknown token, as in training
        lacking = [number for number, (_, _, firsts) in enumerate(encoded) if (firsts < 0).any()]
        stand_in = self._tokenizer.unk_token or _PLACEHOLDER
        filled = [
            [stand_in if first < 0 else word for word, first in zip(texts[number], encoded[number][2], strict=True)]
            for number in lacking
        ]
        for number, again in zip(lacking, self._encode_words(filled), strict=True):
            if (again[2] < 0).any():
                raise DataError(f"a word gets no token, nor does {stand_in!r} in its place: {texts[number]}")
            encoded[number] = again
        return encoded

    def _encode_words(self, texts: list[list[str]]) -> list[_Encoded]:
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
            word_ids = encoding.word_ids
            for position, word in reversed(list(enumerate(word_ids))):
                if word is not None:
                    firsts[word] = position
            found.append((encoding.ids, word_ids, firsts))
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


def words_of(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Say of each sub-token which word of a running text it belongs to, by its last character that is no space.

    Args:
        text: words stand between white space, as in `str.split`.
        offsets: first character of each sub-token and the one after its last.

    Returns:
        Index of the word, -1 for a sub-token of white space alone; int64 [sub-tokens].
    """
    word_at = np.full(len(text), -1, dtype=np.int64)
    for number, word in enumerate(re.finditer(r"\S+", text)):
        word_at[word.start() : word.end()] = number
    return np.array([word_at[start:stop].max(initial=-1) for start, stop in offsets], dtype=np.int64)


def _word_array(word_ids: Sequence[int | None]) -> NDArray[np.int64]:
    return np.array([-1 if word is None else word for word in word_ids], dtype=np.int64)

"""Texts as windows of sub-tokens: a long text becomes several, and every word belongs to exactly one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.errors import DataError
from tokmask_peft.recipe.schema import Task
from tokmask_peft.tasks import Example

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
BATCH = 1000
_PLACEHOLDER = "?"


@dataclass(frozen=True, slots=True)
class Truncation:
    """What did not fit.

    Attributes:
        texts: texts encoded.
        words: words in them (sequence tasks: parts between white space).
        sub_tokens: sub-tokens kept, special tokens included.
        texts_cut: texts longer than `max_length`.
        words_cut: words that lie beyond the cut as a whole.
        words_replaced: words that the tokenizer drops (zero-width or control characters), encoded as the unknown token.
        words_without_tokens: words that have no position although they lie before the cut.
    """

    texts: int = 0
    words: int = 0
    sub_tokens: int = 0
    texts_cut: int = 0
    words_cut: int = 0
    words_replaced: int = 0
    words_without_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return a JSON-able form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples ready for the model.

    Attributes:
        dataset: columns `input_ids`, `length` and, for labelled examples, `labels`.
        kept: token tasks: per text the indices of the words that have a position, in order; else none.
        truncation: what was cut.
    """

    dataset: Dataset
    kept: list[list[int]] | None
    truncation: Truncation


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    labels: Sequence[str],
    max_length: int,
) -> Encoded:
    """Tokenize examples.

    In token tasks the first sub-token of a word carries its label; all other positions are -100. A word that the
    tokenizer drops (zero-width or control characters) is encoded as the unknown token, so that it keeps its label.

    Args:
        examples: texts; labels may be none for all of them (prediction).
        tokenizer: a fast tokenizer.
        task: `sequence` or `token`.
        labels: label names in the order of the classifier's outputs.
        max_length: sub-tokens per text, special tokens included; what is longer is cut at the end.

    Raises:
        DataError: the tokenizer is not a fast one, a label is unknown, or labels are there for some texts only.
    """
    from datasets import Dataset

    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} cannot tell which word a sub-token belongs to: a fast tokenizer is needed "
            "(one with a tokenizer.json)"
        )
    labelled = _labelled(examples)
    index = {label: number for number, label in enumerate(labels)}
    columns: dict[str, list[Any]] = {"input_ids": [], "length": []} | ({"labels": []} if labelled else {})
    kept: list[list[int]] = []
    total = Truncation()
    lead = words_need_a_space(tokenizer) if task == "token" else False
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        if task == "sequence":
            rows, part = _encode_texts(batch, tokenizer, max_length)
            firsts: list[list[tuple[int, int]]] = []
        else:
            rows, firsts, part = _encode_words(batch, tokenizer, max_length, lead)
            kept.extend([word for _, word in pairs] for pairs in firsts)
        columns["input_ids"].extend(rows)
        columns["length"].extend(len(row) for row in rows)
        if labelled and task == "sequence":
            columns["labels"].extend(_index(index, tag, e.where) for e in batch for tag in e.tags)
        elif labelled:
            columns["labels"].extend(
                _spread(example, pairs, len(row), index)
                for example, pairs, row in zip(batch, firsts, rows, strict=True)
            )
        total = Truncation(**{key: value + getattr(part, key) for key, value in total.to_dict().items()})
    return Encoded(Dataset.from_dict(columns), kept if task == "token" else None, total)


def _labelled(examples: Sequence[Example]) -> bool:
    """Whether the examples carry labels.

    Raises:
        DataError: some do and some do not.
    """
    without = [example.where for example in examples if example.label is None]
    if without and len(without) < len(examples):
        raise DataError(f"{len(without)} of {len(examples)} texts have no label, first at {without[0]}")
    return not without


def _index(index: dict[str, int], label: str, where: str) -> int:
    """Number of a label."""
    if label not in index:
        raise DataError(f"{where}: label '{label}' is not one of {', '.join(index)}")
    return index[label]


def _spread(example: Example, firsts: list[tuple[int, int]], length: int, index: dict[str, int]) -> list[int]:
    """Put each word's label at its first sub-token."""
    row = [IGNORED] * length
    for position, word in firsts:
        row[position] = _index(index, example.tags[word], example.where)
    return row


def _encode_texts(
    batch: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> tuple[list[list[int]], Truncation]:
    """Tokenize running text."""
    texts = [example.string for example in batch]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
    cut = words_cut = 0
    for text, encoding in zip(texts, encoded.encodings, strict=True):
        if encoding.overflowing:
            cut += 1
            end = max((stop for _, stop in encoding.offsets), default=0)
            words_cut += _whole_words_after(text, end)
    rows = encoded["input_ids"]
    counts = Truncation(len(texts), sum(len(text.split()) for text in texts), sum(map(len, rows)), cut, words_cut)
    return rows, counts


def _whole_words_after(text: str, end: int) -> int:
    """Count the words of `text` that begin at or after the character `end`."""
    rest = text[end:].split()
    inside_a_word = 0 < end < len(text) and not text[end - 1].isspace() and not text[end].isspace()
    return len(rest) - (1 if inside_a_word and rest else 0)


def words_need_a_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether words must bring their own leading space to look as they do in running text.

    Byte-level BPE without a prefix space (Qwen, GPT) reads a word given on its own as the start of a text: `gusta`
    becomes `g usta` and not the one piece it is inside a text.
    """
    words = ["we", "saw", "the", "house"]
    running = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    alone = tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    if alone == running:
        return False
    given = tokenizer(spaced(words), is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return bool(given == running)


def spaced(words: Sequence[str]) -> list[str]:
    """Give every word but the first a leading space."""
    return [word if position == 0 else f" {word}" for position, word in enumerate(words)]


def _encode_words(
    batch: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int, lead: bool
) -> tuple[list[list[int]], list[list[tuple[int, int]]], Truncation]:
    """Tokenize word by word; returns ids, `(position, word)` of every first sub-token, and the counts."""
    texts = [list(example.words) for example in batch]
    replaced = _replace_dropped(texts, tokenizer, lead)
    encoded = tokenizer(
        [spaced(words) for words in texts] if lead else texts,
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    rows, firsts = encoded["input_ids"], []
    cut = words_cut = without = 0
    for words, encoding in zip(texts, encoded.encodings, strict=True):
        pairs: list[tuple[int, int]] = []
        previous = None
        for position, word in enumerate(encoding.word_ids):
            if word is not None and word != previous:
                pairs.append((position, word))
                previous = word
        beyond = {word for part in encoding.overflowing for word in part.word_ids if word is not None}
        held = {word for _, word in pairs}
        cut += bool(encoding.overflowing)
        words_cut += len(beyond - held)
        without += len(words) - len(beyond | held)
        firsts.append(pairs)
    counts = Truncation(len(texts), sum(map(len, texts)), sum(map(len, rows)), cut, words_cut, replaced, without)
    return rows, firsts, counts


def _replace_dropped(texts: list[list[str]], tokenizer: PreTrainedTokenizerFast, lead: bool) -> int:
    """Replace, in place, the words that get no sub-token; returns how many."""
    stand_in = tokenizer.unk_token or _PLACEHOLDER
    distinct = sorted({word for words in texts for word in words})
    given = [[f" {word}"] if lead else [word] for word in distinct]
    encodings = tokenizer(given, is_split_into_words=True, add_special_tokens=False).encodings
    dropped = {word for word, encoding in zip(distinct, encodings, strict=True) if not encoding.ids}
    count = 0
    for words in texts:
        for position, word in enumerate(words):
            if word in dropped:
                words[position] = stand_in
                count += 1
    return count


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

"""Texts as sub-tokens: cut at the end for training and scoring, or read in windows for prediction.

Both modes tokenize by the same code, so that a text that fits has the same ids in both.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example, Pair
from tokmask_peft.tasks import get_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

BATCH = 1000  # texts tokenized at a time
PIECE = 50_000  # characters or words of a longer text that are tokenized at a time
COUNTED = 500  # texts whose sub-tokens show whether a tokenizer knows their language
MOST_PIECES, MOST_UNKNOWN = 1.5, 0.1  # sub-tokens a word, and share of unknown ones, above which it does not
ONE_LANGUAGE = range(10_000, 60_000)
"""Sub-tokens in a vocabulary of one language; those of many languages are larger, and those of tests smaller."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=[^\W\d_])")
_Ints = NDArray[np.int64]
_NONE: _Ints = np.zeros(0, dtype=np.int64)
_Tokens = tuple[Any, _Ints, int]
"""Encoding of a text whose words are given, where each word's label goes, and words replaced by the unknown token."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """What did not fit."""

    texts: int = 0  # texts encoded
    words: int = 0  # words in them, as given or between white space
    sub_tokens: int = 0  # sub-tokens kept, special tokens included
    texts_cut: int = 0  # texts longer than `max_length`
    words_cut: int = 0  # words of which nothing is kept
    words_replaced: int = 0  # words that the tokenizer drops, encoded as the unknown token
    words_without_tokens: int = 0  # words before the cut that have no sub-token all the same


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples ready for the model."""

    dataset: Dataset  # columns `input_ids`, `length`; `labels` if there are, `token_type_ids` of pairs; maybe `words`
    kept: list[list[int]] | None  # if words are given, per text the indices of those that have a position, in order
    truncation: Truncation


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text, framed by the special tokens of the tokenizer."""

    text: int  # index of the text
    ids: list[int]  # special tokens included
    size: int  # sub-tokens of the text in it
    words: NDArray[np.int64]  # if words are given, those that take their label from this window; otherwise empty
    positions: NDArray[np.int64]  # of the sub-token of each of these words that carries its label, in `ids`
    owners: NDArray[np.int64] | None = None  # if asked for, the word of each id, -1 for none: [ids]
    types: list[int] | None = None  # of a pair, if the tokenizer gives them: 0 and 1 for its two texts: [ids]
    numbers: list[int] | None = None  # if all sub-tokens carry a word's label: see `_numbered`


class Encoder:
    """Turns texts into token ids.

    If the task gives words, each is tokenized as it would be in running text. A word that the tokenizer drops
    (zero-width or control characters) is encoded as the unknown token, so that it keeps its label.

    A pair of texts is encoded as `tokenizer(first, second)` does it. A longer one is cut sub-token by sub-token at the
    end of whichever text is longer, in prediction too: there are no windows of a pair.

    Args:
        tokenizer: a fast tokenizer.
        task: name of the task.
        max_length: sub-tokens per text or window, special tokens included.
        label_on: which sub-token of a word carries its label, `first` or `last`; of a word that is cut, the last kept.
            With `mean`, the label is on the first, and `words` say of which sub-tokens to take the mean.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, task: str, max_length: int, label_on: str = "first") -> None:
        self._tokenizer, self._task, self._max_length = tokenizer, get_task(task), max_length
        self._lead = self._task.words_given and words_need_a_space(tokenizer)
        self._unknown, self._last = tokenizer.unk_token or "?", label_on == "last"
        self._mean = label_on == "mean" and self._task.words_given

    def cut(self, examples: Sequence[Example], labels: Sequence[str]) -> Encoded:
        """Encode examples one row each; what is longer than `max_length` is cut at the end.

        `labels` are in the order of the classifier's outputs; DataError if one is unknown, or only some texts have any.
        """
        from datasets import Dataset

        without = [example.where for example in examples if example.label is None]
        if without and len(without) < len(examples):
            problem = f"{len(without)} of {len(examples)} texts have no label, first at {without[0]}"
            raise DataError(problem, code="some-labels", places=tuple(without))
        ids = {label: number for number, label in enumerate(labels)}
        columns: dict[str, list[Any]] = {"input_ids": [], "length": []} | ({} if without else {"labels": []})
        columns |= {"token_type_ids": []} if self._has_types([example.text for example in examples]) else {}
        columns |= {"words": []} if self._mean else {}
        kept: list[list[int]] = []
        counts = np.zeros(len(fields(Truncation)), dtype=np.int64)
        batches = (examples[start : start + BATCH] for start in range(0, len(examples), BATCH))
        for example, encoding, starts, lost in itertools.chain.from_iterable(map(self._cut, batches)):
            size = len(encoding.ids)
            columns["input_ids"].append(encoding.ids)
            columns["length"].append(size)
            if "token_type_ids" in columns:
                columns["token_type_ids"].append(encoding.type_ids)
            if self._mean:
                columns["words"].append(_numbered(encoding.word_ids))
            if not without:
                columns["labels"].append(self._task.encode_label(example, starts, size, ids))
            kept.append([word for word, _ in starts])
            counts += [1, len(example.words), size, bool(encoding.overflowing), *lost]
        truncation = Truncation(*counts.tolist())
        return Encoded(Dataset.from_dict(columns), kept if self._task.words_given else None, truncation)

    def _cut(self, batch: Sequence[Example]) -> Iterator[tuple[Example, Any, list[tuple[int, int]], list[int]]]:
        """Yield each text, its encoding, `(word, position)` of each label, and words cut, replaced, without tokens."""
        if self._task.words_given:
            found = self._words([example.words for example in batch], cut=True)
            for example, (encoding, starts, replaced) in zip(batch, found, strict=True):
                size = len(encoding.ids)
                kept = [(word, at) for word, at in enumerate(starts.tolist()) if 0 <= at < size]
                yield example, encoding, kept, [int((starts == size).sum()), replaced, int((starts < 0).sum())]
            return
        for example, encoding in zip(batch, self._tokenize([one.text for one in batch], cut=True), strict=True):
            lost = 0
            for number, text in enumerate(example.parts if encoding.overflowing else ()):
                places = zip(encoding.offsets, encoding.sequence_ids, strict=True)
                lost += _whole_words_after(text, max((stop for (_, stop), part in places if part == number), default=0))
            yield example, encoding, [], [lost, 0, 0]

    def windows(
        self, texts: Sequence[str] | Sequence[Sequence[str]] | Sequence[Pair], owners: bool = False, strict: bool = True
    ) -> Iterator[Window]:
        """Encode texts, in their order, in as many windows as they need, each framed by special tokens as in `cut`.

        A text that fits is one window. If words are given, neighbouring windows of a longer text share a quarter of
        their sub-tokens, and a word takes its label from the window in which it is farther from the edge, so that it
        has context on both sides. Otherwise a longer text is cut into even parts. A pair is always one window, see
        `Encoder`.

        Args:
            texts: strings, all pairs, or lists of words if the task gives words; at least one word each.
            owners: also return which word each id belongs to; in strings, words are separated by white space.
            strict: refuse a word that gets no sub-token; otherwise it takes its label from no window.

        Raises:
            DataError: `max_length` leaves no room, or a word gets no sub-token.
        """
        if _are_pairs(texts):
            yield from self._pairs(texts, owners)
            return
        if self._room < 2:
            problem = f"windows of {self._max_length} sub-tokens leave no room next to the special tokens"
            raise DataError(problem, code="no-room", max_length=self._max_length)
        cut = self._even_parts if not self._task.words_given else self._overlapping
        start, texts, owners = 0, cast("Sequence[Sequence[str]]", texts), owners or self._mean
        for stop in range(1, len(texts) + 1):
            long = stop < len(texts) and len(texts[stop]) > PIECE
            if stop - start >= BATCH or stop == len(texts) or long or len(texts[start]) > PIECE:
                for index, tokens in enumerate(self._whole(texts[start:stop], owners, strict), start):
                    yield from cut(index, *tokens)
                start = stop

    def _pairs(self, pairs: Sequence[Any], owners: bool) -> Iterator[Window]:
        """Encode pairs; in `owners`, words are numbered as in `Pair.split`."""
        typed = self._has_types(pairs)
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            for index, (pair, encoding) in enumerate(zip(batch, self._tokenize(batch, cut=True), strict=True), start):
                of, parts = np.full(len(encoding.ids), -1, dtype=np.int64), encoding.sequence_ids
                before = 0
                for number, text in enumerate(pair if owners else ()):
                    at = [place for place, part in enumerate(parts) if part == number]
                    words = words_of(text, [encoding.offsets[place] for place in at])
                    of[at] = np.where(words < 0, -1, words + before)
                    before += len(text.split()) + 1
                size, types = sum(part is not None for part in parts), encoding.type_ids if typed else None
                yield Window(index, encoding.ids, size, _NONE, _NONE, of if owners else None, types)

    def _has_types(self, texts: Sequence[Any]) -> bool:
        """Return whether the model gets token types: of pairs, if the tokenizer gives them."""
        return _are_pairs(texts) and "token_type_ids" in self._tokenizer.model_input_names

    def _whole(self, texts: Sequence[Any], owners: bool, strict: bool) -> Iterator[tuple[_Ints, _Ints, _Ints | None]]:
        """Yield the ids of each text, the first of each word if words are given, and the word of each id if asked for.

        A text longer than `PIECE` comes alone, and is tokenized a piece at a time, since encodings take much memory.
        """
        given = self._task.words_given
        pieces = self._pieces(texts[0]) if len(texts) == 1 else iter([(texts, False)])
        found: list[tuple[_Ints, _Ints, _Ints | None]] = []
        size = words = 0
        for number, (batch, within) in enumerate(pieces):
            later, words = number > 0, words - within
            encoded = self._words(batch, later=later) if given else [(one, _NONE, 0) for one in self._tokenize(batch)]
            for text, (encoding, starts, _) in zip(batch, encoded, strict=True):
                if strict and (starts < 0).any():
                    word = text[int(np.argmin(starts))]
                    problem = f"a word gets no token, nor does {self._unknown!r} in its place: {word!r}"
                    raise DataError(problem, code="word-without-tokens", word=word)
                of = None
                if owners and given:
                    of = np.array([-1 if word is None else word + words for word in encoding.word_ids], dtype=np.int64)
                elif owners:
                    of = words_of(text, encoding.offsets)
                    of[of >= 0] += words
                found.append((np.array(encoding.ids, dtype=np.int64), np.where(starts < 0, -1, starts + size), of))
                if len(texts) == 1:
                    size += len(found[-1][0])
                    words += len(text if given else text.split())
        if len(found) > len(texts):
            ids, firsts, of_ids = zip(*found, strict=True)
            found = [(np.concatenate(ids), np.concatenate(firsts), np.concatenate(of_ids) if owners else None)]
        yield from found

    def _pieces(self, text: Any) -> Iterator[tuple[list[Any], bool]]:
        """Cut a long text into pieces; yield each, and whether it begins within a word.

        A string is cut between words, where its tokens stay the same, if the tokenizer's ids show that it may be. If
        there is no such place in `PIECE` characters (Chinese, base64), it is cut there: the next tokens may differ.
        """
        start, within = 0, False
        if self._task.words_given:
            for start in range(0, len(text), PIECE):
                yield [text[start : start + PIECE]], False
            return
        while len(text) > start + PIECE:
            stop, gap = start + 2 * PIECE, self._gap
            found = None if gap is None else _BETWEEN_WORDS.search(text, start + PIECE, stop)
            if found is None and len(text) <= stop:
                break
            if found is not None:
                stop = found.start()
            yield [text[start:stop]], within
            within = found is None and not (text[stop - 1].isspace() or text[stop].isspace())
            start = stop + (gap or 0 if found else 0)
        yield [text[start:]], within

    @cached_property
    def _gap(self) -> int | None:
        """Characters between two pieces of a text that are left out: a space or nothing; none if it is not cut."""
        whole = "we saw the house, y la fiesta"
        parts = (whole, whole[:6], whole[6:], whole[7:])
        ids = [self._tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        return next((gap for gap in (0, 1) if ids[1] + ids[2 + gap] == ids[0]), None)

    def _even_parts(self, index: int, ids: _Ints, _: _Ints, owners: _Ints | None) -> Iterator[Window]:
        if not len(ids):  # the tokenizer drops every character
            ids = np.array(self._tokenizer(self._unknown, add_special_tokens=False)["input_ids"], dtype=np.int64)
            owners = None if owners is None else np.zeros(len(ids), dtype=np.int64)
        count = -(-len(ids) // self._room)
        borders = [part * len(ids) // count for part in range(count + 1)]
        for start, stop in itertools.pairwise(borders):
            yield self._window(index, ids, slice(start, stop), owners)

    def _overlapping(self, index: int, ids: _Ints, firsts: _Ints, owners: _Ints | None) -> Iterator[Window]:
        last = max(len(ids) - self._room, 0)
        starts = [*range(0, last, self._room - self._room // 4), last]
        # a word before the middle of what two windows share belongs to the earlier one
        borders = [(earlier + self._room + later) // 2 for earlier, later in itertools.pairwise(starts)]
        words = np.flatnonzero(firsts >= 0)
        parts = np.split(words, np.searchsorted(firsts[words], np.asarray(borders, dtype=np.int64)))
        for start, part in zip(starts, parts, strict=True):
            if len(part):
                window = self._window(index, ids, slice(start, start + self._room), owners)
                yield replace(window, words=part, positions=firsts[part] - start + len(self._frame[0]))

    def _window(self, text: int, ids: _Ints, part: slice, owners: _Ints | None) -> Window:
        before, after = self._frame
        if owners is not None:
            owners = np.pad(owners[part], (len(before), len(after)), constant_values=-1)
        numbers = _numbered(owners) if self._mean and owners is not None else None
        whole = [*before, *ids[part].tolist(), *after]
        return Window(text, whole, len(ids[part]), _NONE, _NONE, owners, numbers=numbers)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after every text."""
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a")["input_ids"]
        start = next(at for at in range(len(full)) if full[at : at + len(plain)] == plain)
        return full[:start], full[start + len(plain) :]

    @property
    def _room(self) -> int:
        return self._max_length - len(self._frame[0]) - len(self._frame[1])

    def _words(self, texts: Sequence[Sequence[str]], cut: bool = False, later: bool = False) -> list[_Tokens]:
        """Tokenize lists of words; a word without a sub-token is replaced by the unknown token."""
        encodings = self._tokenize(texts, cut, later)
        starts = [_label_positions(one, len(words), self._last) for words, one in zip(texts, encodings, strict=True)]
        replaced = [int((positions < 0).sum()) for positions in starts]
        lacking = np.flatnonzero(replaced).tolist()
        filled = [
            [self._unknown if at < 0 else word for word, at in zip(texts[number], starts[number], strict=True)]
            for number in lacking
        ]
        for number, encoding in zip(lacking, self._tokenize(filled, cut, later), strict=True):
            encodings[number], starts[number] = encoding, _label_positions(encoding, len(texts[number]), self._last)
        return list(zip(encodings, starts, replaced, strict=True))

    def _tokenize(self, texts: Sequence[Any], cut: bool = False, later: bool = False) -> list[Any]:
        """Return an encoding of each text: cut, with special tokens; or whole, without. `later` ones are continued."""
        if not texts:
            return []
        given = self._task.words_given
        texts = [spaced(words, later) if self._lead else list(words) for words in texts] if given else texts
        needed = 2 + self._tokenizer.num_special_tokens_to_add(pair=True)
        if cut and _are_pairs(texts) and self._max_length < needed:
            problem = f"a pair needs {needed} sub-tokens or more, and max_length is {self._max_length}"
            raise DataError(problem, code="no-room", max_length=self._max_length)
        how = {"truncation": True, "max_length": self._max_length} if cut else {"add_special_tokens": False}
        how |= {"is_split_into_words": given, "return_attention_mask": False, "verbose": False}
        return self._tokenizer(*batch_of(texts), **how).encodings


def batch_of(texts: Sequence[Any]) -> list[list[Any]]:
    """Return texts as a tokenizer takes a batch of them: in one list, or pairs in two."""
    return [list(part) for part in zip(*texts, strict=True)] if _are_pairs(texts) else [list(texts)]


def _are_pairs(texts: Sequence[Any]) -> TypeGuard[Sequence[Pair]]:
    return bool(texts) and isinstance(texts[0], Pair)


def _numbered(owners: Iterable[int | None]) -> list[int]:
    """Number the words of a text: 0, 1, … for each run of sub-tokens of one owner. Special tokens are a word, too."""
    return [number for number, (_, run) in enumerate(itertools.groupby(owners)) for _ in run]


def _label_positions(encoding: Any, words: int, last: bool) -> NDArray[np.int64]:
    """Return the position of each word's first or last sub-token, -1 if it has none, that of the cut if it is away."""
    starts = np.full(words, -1, dtype=np.int64)
    for part in encoding.overflowing:
        starts[[word for word in part.word_ids if word is not None]] = len(encoding.ids)
    for position, word in sorted(enumerate(encoding.word_ids), reverse=not last):
        if word is not None:
            starts[word] = position
    return starts


def _whole_words_after(text: str, end: int) -> int:
    """Count the words of `text` that begin at or after the character `end`."""
    rest = text[end:].split()
    inside_a_word = 0 < end < len(text) and not text[end - 1].isspace() and not text[end].isspace()
    return len(rest) - inside_a_word


def words_need_a_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether words need a leading space of their own to be tokenized as in running text.

    Byte-level BPE without a prefix space (Qwen, GPT) reads a word on its own as the start of a text: `g usta`, not
    `gusta`.
    """
    words = ["we", "saw", "the", "house"]
    running = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    apart = tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    if apart == running:
        return False
    given = tokenizer(spaced(words), is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return bool(given == running)


def foreign_words(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> str | None:
    """Return what shows that a tokenizer was made for another language than that of texts, or none.

    Words are runs of letters without names of users, hashtags and links. An English word takes 1.2 sub-tokens of an
    English vocabulary, one of Spanish-English posts 1.4 to 1.6, and one of Swahili, Turkish or Marathi 2.0 to 2.4.
    Vocabularies of many languages need as many for some of them, and are good for them all the same.
    """
    found = (word for text in itertools.islice(texts, COUNTED) for word in text.split())
    plain = (word for word in found if word[0] not in "@#" and "://" not in word)
    letters = ("".join(one if unicodedata.category(one)[0] in "LM" else " " for one in word) for word in plain)
    words = " ".join(letters).split()
    ids = tokenizer(" ".join(words), add_special_tokens=False, verbose=False).input_ids
    unknown = ids.count(tokenizer.unk_token_id) / max(len(ids), 1)
    if unknown > MOST_UNKNOWN:
        return f"does not know {unknown:.0%} of what it cuts the words of these texts into"
    pieces = len(ids) / max(len(words), 1)
    if pieces > MOST_PIECES and len(tokenizer) in ONE_LANGUAGE:
        return f"cuts a word of these texts into {pieces:.1f} pieces on average (an English one into 1.2)"
    return None


def spaced(words: Sequence[str], first_too: bool = False) -> list[str]:
    """Give every word except the first a leading space."""
    return [word if position == 0 and not first_too else f" {word}" for position, word in enumerate(words)]


def words_of(text: str, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return the word of a running text that each sub-token, by its `offsets`, belongs to, int64 [sub-tokens].

    Words are numbered as in `str.split`; the last character that is not white space decides, -1 if there is none.
    """
    word_at = np.full(len(text), -1, dtype=np.int64)
    for number, word in enumerate(re.finditer(r"\S+", text)):
        word_at[word.start() : word.end()] = number
    return np.array([word_at[start:stop].max(initial=-1) for start, stop in offsets], dtype=np.int64)

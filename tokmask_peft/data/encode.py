"""Tokenize examples for the model, and account for every word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tokmask_peft.data.example import Example
from tokmask_peft.errors import DataError
from tokmask_peft.recipe import Task

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

"""The texts of the confound study: read by the package, cut down, and encoded as a protocol asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from confounds_protocol import Protocol, Setting
from numpy.typing import NDArray

from tokmask_peft.data.corpus import Corpus, load_corpus
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.data.split import subset
from tokmask_peft.recipe.schema import Recipe, Task
from tokmask_peft.tasks import NO_PREDICTION, Example

RECIPES = {"trec": "trec/minilm", "lid": "lid_spaeng/minilm"}


def whole_corpus(setting: Setting, seed: int) -> Corpus:
    """Read a corpus as its recipe has it; `seed` sets validation aside."""
    return load_corpus(Recipe.load(RECIPES[setting.corpus]).data.expanded(), seed)


def read_corpus(setting: Setting, seed: int) -> Corpus:
    """Read a corpus, with validation texts drawn by `seed` and the same test texts for all seeds."""
    corpus = whole_corpus(setting, seed)
    test = corpus.test if setting.test is None else subset(corpus.test, setting.test, 0)
    return replace(corpus, validation=subset(corpus.validation, setting.validation, seed), test=test)


def labelled(corpus: Corpus, setting: Setting, seed: int) -> list[Example]:
    """Draw the training texts whose labels a run may use."""
    return subset(corpus.train, setting.train, seed)


def without_hashtags(examples: Sequence[Example]) -> tuple[list[Example], list[list[int]]]:
    """Drop every word that holds a "#", as the authors' reader drops the lines of a CoNLL file.

    Returns:
        The texts, possibly without any word left, and for each the indices of the words that stay.
    """
    kept = [[index for index, word in enumerate(example.words) if "#" not in word] for example in examples]
    shorter = [
        replace(
            example,
            text=tuple(example.words[index] for index in indices),
            label=tuple(example.tags[index] for index in indices),
        )
        for example, indices in zip(examples, kept, strict=True)
    ]
    return shorter, kept


@dataclass(frozen=True, slots=True)
class Texts:
    """Encoded texts, and the way back to their words.

    Attributes:
        task: sequence or token.
        rows: `input_ids` and `labels` of each text that holds anything.
        of_text: for each row the index of its text.
        slots: for each row the places in its text's gold labels that its predictions fill.
        gold: label ids of every text, one or one per word, whether encoded or not.
    """

    task: Task
    rows: list[dict[str, Any]]
    of_text: list[int]
    slots: list[list[int]]
    gold: list[list[int]]

    @property
    def scored_share(self) -> float:
        """Share of the labels that the model sees at all."""
        return sum(map(len, self.slots)) / sum(map(len, self.gold))

    def predictions(self, found: Sequence[NDArray[np.int64]]) -> list[list[int]]:
        """Return predicted ids per text, `NO_PREDICTION` where a word was dropped or cut.

        Args:
            found: for each row the predictions at its labelled positions.
        """
        texts = [[NO_PREDICTION] * len(gold) for gold in self.gold]
        for text, slots, predicted in zip(self.of_text, self.slots, found, strict=True):
            for slot, label in zip(slots, predicted, strict=True):
                texts[text][slot] = int(label)
        return texts


def encode_texts(
    examples: Sequence[Example], tokenizer: Any, task: Task, labels: tuple[str, ...], protocol: Protocol
) -> Texts:
    """Encode texts, with hashtags and length as the protocol has them."""
    index = {label: number for number, label in enumerate(labels)}
    gold = [[index[tag] for tag in example.tags] for example in examples]
    used, kept = list(examples), [list(range(len(example.tags))) for example in examples]
    if task == "token" and not protocol.hashtags_kept:
        used, kept = without_hashtags(examples)
    of_text = [number for number, example in enumerate(used) if example.words]
    encoded = Encoder(tokenizer, task, protocol.max_length).cut([used[number] for number in of_text], labels)
    slots = [kept[number] for number in of_text]
    if encoded.kept is not None:
        slots = [[words[word] for word in inside] for words, inside in zip(slots, encoded.kept, strict=True)]
    return Texts(task, [dict(row) for row in encoded.dataset], of_text, slots, gold)

"""The study of confounds: its switches, runs and texts. The authors' protocol, changed one thing at a time, and all.

The authors' code: github.com/Sean652039/Token-Masking at fad3fc1 (arXiv 2505.11746).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokmask_peft.data.corpus import Corpus, load_corpus
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.data.split import subset
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import NO_PREDICTION, Example

RATES = (0.0, 0.3, 0.1)
"""Masking rates in the order in which they are run: a study that is cut short has whole pairs at the first two."""
RECIPES = {"trec": "trec/minilm", "lid": "lid_spaeng/minilm"}
Select = Literal["test", "validation"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a run trains; the defaults are the authors'.

    Attributes:
        dropout_kept: whether dropout is on after the first epoch; theirs calls `model.train()` only once.
        warm_up: of the learning rate, in lengths of the run; theirs is `steps // 0.1`, ten lengths.
        peak: rate at the end of warm-up as a share of the nominal one. A warm-up of a tenth of the run up to a tenth
            of the rate has the same sum of rates as theirs, so that only the shape differs.
        masked_by: what replaces a masked token: `mask`, `id0`, `unk`, or a row that no text uses, set to the mean
            embedding and kept there (`spare`) or trained like all others (`trained`).
        pads_masked: whether padding is masked, in the ids that the model itself sees and pools by (causal models).
        hashtags_kept: whether words that contain a "#" are kept.
        max_length: sub-tokens per text, special tokens included.
    """

    dropout_kept: bool = False
    warm_up: float = 10.0
    peak: float = 1.0
    masked_by: str = "mask"
    pads_masked: bool = False
    hashtags_kept: bool = True
    max_length: int = 40


@dataclass(frozen=True, slots=True)
class Setting:
    """What the runs of a group share: backbone (`qwen2` is pretrained by the study), corpus, sizes and learning rate.

    Training and validation texts are drawn by seed; `test` is the same for all, and None takes all texts. `epochs` is
    the length of the learning rate's schedule and the most epochs; a run stops after `patience` epochs in which the
    loss has not fallen by `min_delta`.
    """

    backbone: Literal["minilm", "qwen2"]
    corpus: Literal["trec", "lid"]
    train: int
    validation: int
    test: int | None
    epochs: int
    learning_rate: float
    batch_size: int = 32
    patience: int = 2
    min_delta: float = 0.001


@dataclass(frozen=True, slots=True)
class Arm:
    """One protocol under several masking rates; `lifted` is the change in words, the arm `authors` has none.

    `select` chooses the checkpoint that is reported. `runs_of` is the arm whose runs it reads, if only `select`
    differs; `zero_of` the arm whose runs at p = 0 are its own too, because the change affects masked tokens alone.
    """

    group: str
    name: str
    lifted: str
    protocol: Protocol
    select: Select = "test"
    runs_of: str | None = None
    zero_of: str | None = None

    def source(self, p: float) -> str:
        """Return the arm whose runs contain the scores at rate `p`."""
        return self.runs_of or (self.zero_of if p == 0 else None) or self.name


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run: enough to train it, and its name."""

    group: str
    arm: str
    p: float
    seed: int
    protocol: Protocol
    setting: Setting = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its record."""
        return f"{self.group}-{self.arm}-p{self.p:g}-s{self.seed}"


SETTINGS = {
    "encoder": Setting("minilm", "trec", 256, 100, 300, epochs=4, learning_rate=2.5e-3, batch_size=16),
    "words": Setting("minilm", "lid", 200, 80, 200, epochs=4, learning_rate=2.5e-3, batch_size=16),
    "causal": Setting("qwen2", "trec", 1000, 200, None, epochs=6, learning_rate=1e-2),
}


def _arms() -> Iterator[Arm]:
    short: dict[str, Any] = {"warm_up": 0.1, "peak": 0.1}
    tokens = {
        "id0": "[MASK] to id 0, the padding token",
        "unk": "[MASK] to the unknown token",
        "spare": "[MASK] to an unused row, the mean embedding, held fixed",
        "trained": "[MASK] to the same row, trained",
    }
    theirs, group = Protocol(), "encoder"
    yield Arm(group, "authors", "nothing: the authors' protocol", theirs)
    yield Arm(group, "dropout", "dropout stays on after epoch 1", replace(theirs, dropout_kept=True))
    yield Arm(group, "warm-up", "warm-up a tenth of the run, same sum of rates", replace(theirs, **short))
    for token, words in tokens.items():
        yield Arm(group, token, words, replace(theirs, masked_by=token), zero_of="authors")
    yield Arm(group, "selection", "checkpoint chosen on validation", theirs, "validation", runs_of="authors")
    lifted = replace(theirs, dropout_kept=True, **short)
    yield Arm(group, "all", "dropout, warm-up and selection", lifted, "validation")

    theirs, group = Protocol(hashtags_kept=False, max_length=15), "words"
    yield Arm(group, "authors", "nothing: the authors' protocol", theirs)
    lifted = replace(theirs, hashtags_kept=True, max_length=128)
    yield Arm(group, "whole-texts", "hashtags kept, length 128", lifted)
    yield Arm(group, "selection", "checkpoint chosen on validation", theirs, "validation", runs_of="authors")

    theirs, group = Protocol(masked_by="id0", pads_masked=True, max_length=20), "causal"
    yield Arm(group, "authors", "nothing: the authors' protocol", theirs)
    yield Arm(group, "padding", "padding never masked", replace(theirs, pads_masked=False), zero_of="authors")
    yield Arm(group, "row", "id 0 to a spare row, trained", replace(theirs, masked_by="trained"), zero_of="authors")
    yield Arm(group, "selection", "checkpoint chosen on validation", theirs, "validation", runs_of="authors")
    lifted = replace(theirs, masked_by="trained", pads_masked=False, dropout_kept=True, **short)
    yield Arm(group, "all", "padding, mask token, warm-up and selection", lifted, "validation")


ARMS = tuple(_arms())


def runs(seeds: Sequence[int]) -> list[RunSpec]:
    """Return the runs that the arms need: every arm at p = 0 and the first rate, seed by seed, and then the others."""
    return [
        RunSpec(arm.group, arm.name, p, seed, arm.protocol, SETTINGS[arm.group])
        for rates in (RATES[:2], RATES[2:])
        for seed in seeds
        for arm in ARMS
        for p in rates
        if arm.source(p) == arm.name
    ]


def stop_epoch(losses: Sequence[float], setting: Setting) -> int | None:
    """Return after how many epochs early stopping ends the run, given the loss after each; None if it does not."""
    best, since = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, since = (loss, 0) if loss < best - setting.min_delta else (best, since + 1)
        if since >= setting.patience:
            return number
    return None


def chosen_epoch(epochs: Sequence[dict[str, Any]], by: Select, setting: Setting) -> int:
    """Return the index of the epoch with the best macro-F1 of a split, before early stopping by its loss."""
    allowed = stop_epoch([epoch[by]["loss"] for epoch in epochs], setting)
    return max(range(allowed or len(epochs)), key=lambda index: epochs[index][by]["f1_macro"])


def whole_corpus(setting: Setting, seed: int) -> Corpus:
    """Read a corpus as its recipe has it; `seed` sets validation aside."""
    return load_corpus(Recipe.load(RECIPES[setting.corpus]).data.expanded(), seed)


def read_corpus(setting: Setting, seed: int) -> Corpus:
    """Read a corpus with training and validation texts drawn by `seed` and the same test texts for all seeds."""
    corpus = whole_corpus(setting, seed)
    test = corpus.test if setting.test is None else subset(corpus.test, setting.test, 0)
    validation = subset(corpus.validation, setting.validation, seed)
    return replace(corpus, train=subset(corpus.train, setting.train, seed), validation=validation, test=test)


def without_hashtags(examples: Sequence[Example]) -> tuple[list[Example], list[list[int]]]:
    """Drop every word that contains a "#", as the authors' reader drops the lines of a CoNLL file.

    Returns:
        The texts, possibly without any word left, and for each the indices of the words that stay.
    """
    kept = [[index for index, word in enumerate(example.words) if "#" not in word] for example in examples]
    shorter = [
        replace(example, text=tuple(example.words[n] for n in part), label=tuple(example.tags[n] for n in part))
        for example, part in zip(examples, kept, strict=True)
    ]
    return shorter, kept


@dataclass(frozen=True, slots=True)
class Texts:
    """Encoded texts, and the way back to their words.

    Attributes:
        rows: `input_ids` and `labels` of each text that has any word.
        of_text: for each row the index of its text.
        slots: for each row the places in its text's gold labels that its predictions fill.
        gold: label ids of every text, one or one per word, whether encoded or not.
    """

    rows: list[dict[str, Any]]
    of_text: list[int]
    slots: list[list[int]]
    gold: list[list[int]]

    @property
    def scored_share(self) -> float:
        """The share of the labels that the model sees."""
        return sum(map(len, self.slots)) / sum(map(len, self.gold))

    def predictions(self, found: Sequence[NDArray[np.int64]]) -> list[list[int]]:
        """Return the predicted ids of each text from those of each row; `NO_PREDICTION` for a dropped or cut word."""
        texts = [[NO_PREDICTION] * len(gold) for gold in self.gold]
        for text, slots, predicted in zip(self.of_text, self.slots, found, strict=True):
            for slot, label in zip(slots, predicted, strict=True):
                texts[text][slot] = int(label)
        return texts


def encode_texts(
    examples: Sequence[Example], tokenizer: Any, task: Any, labels: tuple[str, ...], protocol: Protocol
) -> Texts:
    """Encode texts with hashtags and length as the protocol has them."""
    index = {label: number for number, label in enumerate(labels)}
    gold = [[index[tag] for tag in example.tags] for example in examples]
    used, kept = list(examples), [list(range(len(tags))) for tags in gold]
    if not protocol.hashtags_kept:
        used, kept = without_hashtags(examples)
    of_text = [number for number, example in enumerate(used) if example.words]
    found = Encoder(tokenizer, task, protocol.max_length).cut([used[number] for number in of_text], labels)
    slots = [kept[number] for number in of_text]
    if found.kept is not None:
        slots = [[words[word] for word in inside] for words, inside in zip(slots, found.kept, strict=True)]
    return Texts([dict(row) for row in found.dataset], of_text, slots, gold)

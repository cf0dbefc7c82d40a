"""The switches of the confound study, and its runs: the authors' protocol, each confound lifted on its own, and all.

The authors' code: github.com/Sean652039/Token-Masking at fad3fc1 (arXiv 2505.11746).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

RATES = (0.0, 0.3, 0.1)
"""Masking rates, in the order in which they are run: a study that is cut short has whole pairs at the first two."""
MaskedBy = Literal["mask", "id0", "unk", "spare", "trained"]
Select = Literal["test", "validation"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a run trains; the defaults are the authors'.

    Attributes:
        dropout_kept: whether dropout is on after the first epoch; theirs calls `model.train()` once and
            `model.eval()` after each epoch.
        warm_up: of the learning rate, in lengths of the run; theirs is `steps // 0.1`, ten lengths.
        peak: rate at the end of warm-up as a share of the nominal one. Theirs ends a run at a tenth of it; a warm-up
            of a tenth of the run up to that rate has the same sum of rates, so that the schedules differ in shape.
        masked_by: what stands for a masked token: the tokenizer's mask token, id 0, the unknown token, or a row that
            no text uses, set to the mean embedding and held there (`spare`) or trained as all others (`trained`).
        pads_masked: whether padding is masked, in the ids that the model itself sees and pools by (causal models).
        hashtags_kept: whether words that hold a "#" are kept.
        max_length: sub-tokens per text, special tokens included.
    """

    dropout_kept: bool = False
    warm_up: float = 10.0
    peak: float = 1.0
    masked_by: MaskedBy = "mask"
    pads_masked: bool = False
    hashtags_kept: bool = True
    max_length: int = 40


@dataclass(frozen=True, slots=True)
class Setting:
    """What the runs of one group share: corpus, sizes and learning rate.

    Attributes:
        backbone: `minilm`, or `qwen2`, a small model that the study pretrains.
        train: number of training texts, drawn anew for each seed.
        validation: number of validation texts, likewise.
        test: number of test texts, the same for all seeds; None takes all.
        epochs: length of the run for the learning rate's schedule, and the most epochs.
        learning_rate: the nominal one, at the end of warm-up.
        patience: epochs without a fall of the loss by `min_delta` after which a run stops.
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
    """One protocol under several masking rates.

    Attributes:
        name: of the arm; `authors` is what others are compared with.
        lifted: the confound that it lifts, in words.
        select: what chooses the checkpoint that is reported: theirs is the set that is reported.
        runs_of: the arm whose runs it reads, where only `select` differs.
        zero_of: the arm whose runs at p = 0 are its own too, because what it lifts acts on masked tokens alone.
        rates: the masking rates.
    """

    group: str
    name: str
    lifted: str
    protocol: Protocol
    select: Select = "test"
    runs_of: str | None = None
    zero_of: str | None = None
    rates: tuple[float, ...] = RATES

    def source(self, p: float) -> str:
        """Return the arm whose runs hold the scores at rate `p`."""
        if self.runs_of is not None:
            return self.runs_of
        return self.zero_of if p == 0 and self.zero_of is not None else self.name


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
        """Name the file of its record."""
        return f"{self.group}-{self.arm}-p{self.p:g}-s{self.seed}"


SETTINGS = {
    "encoder": Setting("minilm", "trec", 256, 100, 300, epochs=4, learning_rate=2.5e-3, batch_size=16),
    "words": Setting("minilm", "lid", 200, 80, 200, epochs=4, learning_rate=2.5e-3, batch_size=16),
    "causal": Setting("qwen2", "trec", 1000, 200, None, epochs=6, learning_rate=1e-2),
}


SHORT: dict[str, Any] = {"warm_up": 0.1, "peak": 0.1}


def _encoder() -> Iterator[Arm]:
    theirs = Protocol()
    tokens = {
        "id0": "[MASK] to id 0, the padding token",
        "unk": "[MASK] to the unknown token",
        "spare": "[MASK] to an unused row, the mean embedding, held fixed",
        "trained": "[MASK] to the same row, trained",
    }
    yield Arm("encoder", "authors", "nothing: the authors' protocol", theirs)
    yield Arm("encoder", "dropout", "dropout stays on after epoch 1", replace(theirs, dropout_kept=True))
    yield Arm("encoder", "warm-up", "warm-up a tenth of the run, same sum of rates", replace(theirs, **SHORT))
    for token, words in tokens.items():
        yield Arm("encoder", token, words, replace(theirs, masked_by=token), zero_of="authors")  # type: ignore[arg-type]
    yield Arm("encoder", "selection", "checkpoint chosen on validation", theirs, "validation", runs_of="authors")
    lifted = replace(theirs, dropout_kept=True, **SHORT)
    yield Arm("encoder", "all", "dropout, warm-up and selection", lifted, "validation")


def _words() -> Iterator[Arm]:
    theirs = Protocol(hashtags_kept=False, max_length=15)
    yield Arm("words", "authors", "nothing: the authors' protocol", theirs)
    lifted = replace(theirs, hashtags_kept=True, max_length=128)
    yield Arm("words", "whole-texts", "hashtags kept, length 128", lifted)
    yield Arm("words", "selection", "checkpoint chosen on validation", theirs, "validation", runs_of="authors")


def _causal() -> Iterator[Arm]:
    theirs = Protocol(masked_by="id0", pads_masked=True, max_length=20)
    yield Arm("causal", "authors", "nothing: the authors' protocol", theirs)
    yield Arm("causal", "padding", "padding never masked", replace(theirs, pads_masked=False), zero_of="authors")
    yield Arm("causal", "row", "id 0 to a spare row, trained", replace(theirs, masked_by="trained"), zero_of="authors")
    yield Arm("causal", "selection", "checkpoint chosen on validation", theirs, "validation", runs_of="authors")
    lifted = replace(theirs, masked_by="trained", pads_masked=False, dropout_kept=True, **SHORT)
    yield Arm("causal", "all", "padding, mask token, warm-up and selection", lifted, "validation")


ARMS = (*_encoder(), *_words(), *_causal())


def runs(seeds: Sequence[int]) -> list[RunSpec]:
    """Return the runs that the arms need: every arm at p = 0 and the first rate, seed by seed, and then the others."""
    return [
        RunSpec(arm.group, arm.name, p, seed, arm.protocol, SETTINGS[arm.group])
        for rates in (RATES[:2], RATES[2:])
        for seed in seeds
        for arm in ARMS
        for p in rates
        if p in arm.rates and arm.source(p) == arm.name
    ]


def stop_epoch(losses: Sequence[float], setting: Setting) -> int | None:
    """Return after how many epochs early stopping strikes, given the loss after each; None if it does not."""
    best, since = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, since = (loss, 0) if loss < best - setting.min_delta else (best, since + 1)
        if since >= setting.patience:
            return number
    return None


def chosen_epoch(epochs: Sequence[dict[str, Any]], by: Select, setting: Setting) -> int:
    """Return the index of the epoch that a protocol reports: best macro-F1 of `by` before early stopping by its loss.

    Args:
        epochs: records with `test` and `validation`, each with `loss` and `f1_macro`.
        by: the split that stops and selects.
        setting: gives the patience.
    """
    allowed = stop_epoch([epoch[by]["loss"] for epoch in epochs], setting)
    return max(range(allowed or len(epochs)), key=lambda index: epochs[index][by]["f1_macro"])

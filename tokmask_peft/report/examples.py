"""The answers of a run that are most confidently wrong, with what they rest on."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tokmask_peft.artifacts import Record, find_saved
from tokmask_peft.errors import MaskTokenError
from tokmask_peft.inference.classifier import Answer, Classifier
from tokmask_peft.inference.explain import explain
from tokmask_peft.inference.load import load
from tokmask_peft.tasks import Example, Prediction
from tokmask_peft.training.evaluate import split_examples

SHOWN = 10
MOST_TEXTS = 4000  # a CPU reads some hundred texts per second; beyond, a sample is looked at


@dataclass(frozen=True, slots=True)
class Mistake:
    """One wrong answer.

    Attributes:
        words: of the text.
        gold: the label of the data.
        predicted: the label of the adapter.
        probability: of the predicted label, calibrated.
        gold_probability: of the gold label.
        where: `file:line`, with the file's name only.
        word: token tasks: index of the word; else None.
        influences: per word, by how much masking it lowers the predicted label's log-odds; empty where unknown.
    """

    words: tuple[str, ...]
    gold: str
    predicted: str
    probability: float
    gold_probability: float
    where: str
    word: int | None = None
    influences: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Mistakes:
    """What a run gets wrong on a split.

    Attributes:
        split: its name.
        texts: texts that were looked at.
        of: texts in the split.
        items: answers looked at: texts, or words in token tasks.
        wrong: how many of them are wrong.
        shown: the most confident of them, at most one per text.
        unexplained: why they come without influences; empty where they have them.
    """

    split: str
    texts: int
    of: int
    items: int
    wrong: int
    shown: tuple[Mistake, ...]
    unexplained: str = ""


def find_mistakes(record: Record, backbone: str | None = None) -> Mistakes:
    """Predict the split that the run is scored on, and return its most confident mistakes.

    Args:
        record: the run.
        backbone: a Hub id, folder or `package:NAME/FOLDER` to load the backbone from, in place of the recipe's.

    Raises:
        DataError, ModelError, RecipeError: the data or the backbone is not there.
    """
    saved = find_saved(record.run.root, backbone)
    examples, _ = split_examples(record.recipe, record.split, None, record.run.adapter)
    chosen = examples
    if len(examples) > MOST_TEXTS:
        chosen = random.Random(0).sample(examples, MOST_TEXTS)  # noqa: S311 - a sample, no secret
    classifier = load(saved)
    answers = classifier.predict([example.text for example in chosen])
    wrong = [list(mistakes_of(example, answer)) for example, answer in zip(chosen, answers, strict=True)]
    shown, unexplained = _explained(classifier, most_confident(wrong))
    return Mistakes(
        split=record.split,
        texts=len(chosen),
        of=len(examples),
        items=sum(len(example.tags) for example in chosen),
        wrong=sum(map(len, wrong)),
        shown=shown,
        unexplained=unexplained,
    )


def mistakes_of(example: Example, answer: Answer) -> Iterator[Mistake]:
    """Yield what is wrong in an answer: at most one mistake in sequence tasks, else one per wrong word."""
    where = example.where.replace("\\", "/").rpartition("/")[2]
    if isinstance(answer, Prediction):
        (gold,) = example.tags
        if answer.label != gold:
            sure, right = answer.probabilities[answer.label], answer.probabilities.get(gold, 0.0)
            yield Mistake(example.words, gold, answer.label, sure, right, where)
        return
    for word, (gold, label) in enumerate(zip(example.tags, answer.labels, strict=True)):
        if label != gold:
            row = answer.probabilities[word]
            sure, right = row[label], row.get(gold, 0.0)
            yield Mistake(answer.words, gold, label, sure, right, where, word)


def most_confident(wrong: Iterable[list[Mistake]], count: int = SHOWN) -> list[Mistake]:
    """Return the mistakes of highest probability, one per text, the surest first."""
    of_texts = [max(mistakes, key=lambda mistake: mistake.probability) for mistakes in wrong if mistakes]
    return heapq.nlargest(count, of_texts, key=lambda mistake: mistake.probability)


def _explained(classifier: Classifier, mistakes: list[Mistake]) -> tuple[tuple[Mistake, ...], str]:
    """Add the influence of each word on the wrong label; without a mask token there is none, and a reason."""
    found = []
    for mistake in mistakes:
        text = list(mistake.words) if classifier.task == "token" else " ".join(mistake.words)
        try:
            (explanation,) = explain(classifier, [text], word=mistake.word)
        except MaskTokenError as error:
            return tuple(mistakes), str(error)
        found.append(replace(mistake, influences=explanation.influences))
    return tuple(found), ""

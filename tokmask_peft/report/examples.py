"""The most confident mistakes of a run, with the words that they depend on."""

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokmask_peft.artifacts import Run, find_saved
from tokmask_peft.errors import MaskTokenError
from tokmask_peft.examples import Example, Pair
from tokmask_peft.inference.classifier import Classifier, load
from tokmask_peft.inference.explain import MOST_WORDS, explain
from tokmask_peft.tasks import Task, get_task
from tokmask_peft.training.evaluate import split_examples

SHOWN = 10
MOST_TEXTS = 4000  # a CPU reads some hundred texts per second; of a larger split, a sample is scored


@dataclass(frozen=True, slots=True)
class Mistake:
    """One wrong answer."""

    words: tuple[str, ...]
    gold: str
    predicted: str
    probability: float  # of the predicted label, calibrated
    gold_probability: float
    where: str  # `file:line`, with the file's name only
    word: int | None = None  # index of the word that has the label; none if the text has it
    influences: tuple[float, ...] = ()  # by how much masking each word lowers the predicted label's log-odds, if known
    pair: Pair | None = None  # the text, if it is one


@dataclass(frozen=True, slots=True)
class Mistakes:
    """What a run gets wrong on a split."""

    split: str
    texts: int  # that were scored
    of: int  # texts in the split
    items: int  # labels in the scored texts: one for each text or word
    wrong: int  # how many of them the adapter gets wrong
    shown: tuple[Mistake, ...]  # the most confident of them, at most one per text
    unexplained: str = ""  # why they have no influences; empty if they have


def find_mistakes(run: Run, backbone: str | None = None, trust_remote_code: bool = False) -> Mistakes:
    """Predict the split that a finished run is scored on, and return its most confident mistakes."""
    task, split = get_task(run.recipe.data.task), run.result.scored_split
    saved = find_saved(run.folder.root, backbone, trust_remote_code=trust_remote_code)
    examples, _ = split_examples(run.recipe, split, None, run.folder.adapter)
    chosen = examples
    if len(examples) > MOST_TEXTS:
        chosen = random.Random(0).sample(examples, MOST_TEXTS)  # noqa: S311 - a sample, not a secret
    classifier = load(saved)
    texts: list[Any] = [example.text for example in chosen]
    answers = classifier.predict(texts)
    wrong = [list(mistakes_of(task, *pair)) for pair in zip(chosen, answers, strict=True)]
    known = {*classifier.labels}
    # that a label which training lacks is left out is always certain, and no word explains it
    explicable = [[one for one in mistakes if {one.gold, one.predicted} & known] for mistakes in wrong]
    shown, unexplained = explained(classifier, most_confident(explicable))
    return Mistakes(
        split=split,
        texts=len(chosen),
        of=len(examples),
        items=sum(len(example.tags) for example in chosen) if task.words_given else len(chosen),
        wrong=sum(map(len if task.words_given else bool, wrong)),
        shown=shown,
        unexplained=unexplained,
    )


def mistakes_of(task: Task, example: Example, answer: Any) -> Iterator[Mistake]:
    """Yield what is wrong in a classifier's answer to an example."""
    where = example.where.replace("\\", "/").rpartition("/")[2]
    pair = example.text if isinstance(example.text, Pair) else None
    words = tuple(pair.split()) if pair else example.words
    for gold, predicted, probability, gold_probability, word in task.mistakes(example.tags, answer):
        yield Mistake(words, gold, predicted, probability, gold_probability, where, word, pair=pair)


def most_confident(wrong: Iterable[list[Mistake]], count: int = SHOWN) -> list[Mistake]:
    """Return the mistakes of highest probability, one per text, the most confident first."""
    of_texts = [max(mistakes, key=lambda mistake: mistake.probability) for mistakes in wrong if mistakes]
    return heapq.nlargest(count, of_texts, key=lambda mistake: mistake.probability)


def explained(classifier: Classifier, mistakes: list[Mistake]) -> tuple[tuple[Mistake, ...], str]:
    """Add the influence of each word on the wrong label; without a mask token, return a reason instead."""
    words_given, found = get_task(classifier.task).words_given, []
    for mistake in mistakes:
        if len(mistake.words) > MOST_WORDS:
            found.append(mistake)
            continue
        text: Any = mistake.pair or (list(mistake.words) if words_given else " ".join(mistake.words))
        # if a label is missing in the answer, the words that speak against it are the ones to show
        about, sign = (mistake.predicted, 1) if mistake.predicted in classifier.labels else (mistake.gold, -1)
        label = about if mistake.word is None else None
        try:
            (explanation,) = explain(classifier, [text], word=mistake.word, label=label)
        except MaskTokenError as error:
            return tuple(mistakes), str(error)
        found.append(replace(mistake, influences=tuple(sign * value for value in explanation.influences)))
    return tuple(found), ""

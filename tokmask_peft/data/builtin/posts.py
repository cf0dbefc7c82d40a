"""The built-in corpus: made-up Spanish-English posts for trying things out, with language tags and a sentiment.

It is not a benchmark. It is hard in the ways that matter here: the sentiment hangs on negation, contrast, questions,
other people's opinions and sarcasm rather than on one word; emoji, hashtags and names go with the label in train more
than in test; every fifth word and some patterns are kept for the test split; 6% of the training sentiments are wrong.
Many words are spelled alike in both languages (`pan`, `red`, `no`, `come`), and English stems take Spanish endings.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import Literal

from tokmask_peft.data.builtin import templates as patterns
from tokmask_peft.data.builtin import words
from tokmask_peft.data.builtin.grammar import Language, Word, Writer
from tokmask_peft.data.builtin.noise import roughen
from tokmask_peft.data.cleaning import normalise
from tokmask_peft.data.files import canonical
from tokmask_peft.errors import DataError, nearest
from tokmask_peft.recipe.schema import Task
from tokmask_peft.tasks import Example

Split = Literal["train", "validation", "test"]
SIZES: dict[Split, int] = {"train": 3000, "validation": 500, "test": 1000}
SEED = 7
LABEL_NOISE = 0.06
UNSEEN: dict[Split, float] = {"train": 0.0, "validation": 0.0, "test": 0.35}
CUE_FIDELITY: dict[Split, float] = {"train": 0.75, "validation": 0.6, "test": 0.35}
OPINIONS = {"same": 50, "turned": 10, "flipped": 15, "stance": 25}
BODIES = {"opinion": 45, "contrast": 14, "concession": 7, "late concession": 7, "with a fact": 27}
SARCASM = 0.15
NAMES = {1: "positive", -1: "negative", 0: "neutral"}


def builtin_examples(task: Task, split: str, seed: int = SEED) -> list[Example]:
    """Return a split of the built-in corpus.

    Args:
        task: `sequence` gives the sentiment, `token` tags words: lang1 English, lang2 Spanish, ne, other.
        split: `train`, `validation` or `test`.
        seed: the same seed gives the same posts.

    Raises:
        DataError: there is no such split.
    """
    name = next((name for name in SIZES if name == canonical(split)), None)
    if name is None:
        raise DataError(f"the built-in corpus has no split '{split}': {', '.join(SIZES)}.{nearest(split, SIZES)}")
    examples = []
    for index, (written, sentiment) in enumerate(_corpus(seed)[name]):
        where = f"built-in {name}[{index}]"
        post, tags = tuple(word for word, _ in written), tuple(tag for _, tag in written)
        if task == "token":
            examples.append(Example(post, tags, where))
        else:
            examples.append(Example(" ".join(post), NAMES[sentiment], where))
    return examples


@lru_cache(maxsize=4)
def _corpus(seed: int) -> dict[Split, list[tuple[list[Word], int]]]:
    """Write all splits; a post appears once."""
    seen: set[str] = set()
    corpus: dict[Split, list[tuple[list[Word], int]]] = {}
    for split, size in SIZES.items():
        random = Random(f"{seed} {split}")  # noqa: S311 (made-up posts, not secrets)
        author = _Author(random, split)
        posts: list[tuple[list[Word], int]] = []
        while len(posts) < size:
            written, sentiment = author.post()
            key = normalise(" ".join(word for word, _ in written))
            if key in seen:
                continue
            seen.add(key)
            if split == "train" and random.random() < LABEL_NOISE:
                sentiment = random.choice([other for other in NAMES if other != sentiment])
            posts.append((written, sentiment))
        corpus[split] = posts
    return corpus


class _Author:
    """Write posts of one split."""

    def __init__(self, random: Random, split: Split) -> None:
        self._random, self._fidelity = random, CUE_FIDELITY[split]
        self._writer = Writer(random, UNSEEN[split])
        self._language: Language = "lang1"

    def post(self) -> tuple[list[Word], int]:
        """Write a post and its true sentiment."""
        random = self._random
        self._language = random.choice(["lang1", "lang2"])
        sentiment = random.choices([1, -1, 0], [36, 36, 28])[0]
        body, sarcastic = self._body(sentiment)
        head: list[Word] = []
        if random.random() < 0.2:
            head.append(
                (
                    f"@{random.choice('abcdelmnrs')}{random.choice(['_mx', 'tx', 'lu', 'vero', 'nny', 'chi'])}"
                    f"{random.randint(1, 99)}",
                    "other",
                )
            )
        if random.random() < 0.25:
            head.extend(self._phrase(words.OPENERS))
        return roughen([*head, *body, *self._tail(sentiment, sarcastic)], random), sentiment

    def _phrase(self, pairs: list[tuple[str, str]]) -> list[Word]:
        """A fixed phrase in the current language."""
        phrase = self._random.choice(pairs)[self._language == "lang2"]
        return [(word, self._language if any(map(str.isalnum, word)) else "other") for word in phrase.split()]

    def _clause(self, templates: list[patterns.Template], polarity: int = 0) -> list[Word]:
        """A clause; the language runs on, and may switch before it."""
        if self._random.random() < 0.35:
            self._language = self._writer.other(self._language)
        sign = polarity or self._random.choice([1, -1])
        written, self._language = self._writer.clause(self._writer.template(templates), sign, self._language)
        return written

    def _opinion(self, sentiment: int) -> list[Word]:
        """A clause that says what its author thinks."""
        kind = self._weighted(OPINIONS)
        if kind == "same":
            return self._clause(patterns.SAME, sentiment)
        if kind == "turned":
            return self._clause(patterns.TURNED, sentiment)
        if kind == "flipped":
            return self._clause(patterns.FLIPPED, -sentiment)
        return self._clause(patterns.GLAD if sentiment > 0 else patterns.UPSET)

    def _weighted(self, weights: dict[str, int]) -> str:
        """Draw a name by its weight."""
        return self._random.choices(list(weights), list(weights.values()))[0]

    def _fact(self) -> list[Word]:
        """A clause without an opinion of its author, with or without polar words."""
        return self._clause(self._random.choice([patterns.PLAIN, patterns.PLAIN, patterns.NEUTRAL_WITH_CUES]))

    def _body(self, sentiment: int) -> tuple[list[Word], bool]:
        """The clauses of a post, and whether it is sarcastic."""
        comma: Word = (",", "other")
        if sentiment == 0:
            return self._indifferent(), False
        if sentiment < 0 and self._random.random() < SARCASM:
            praise = self._phrase(patterns.PRAISE)
            return [*praise, comma, *self._clause(patterns.MISHAP)], self._random.random() < 0.7
        kind = self._weighted(BODIES)
        if kind == "contrast":
            first, link = self._opinion(-sentiment), self._phrase(patterns.CONTRAST)
            return [*first, *link, *self._opinion(sentiment)], False
        if kind == "concession":
            link, first = self._phrase(patterns.CONCESSION), self._opinion(-sentiment)
            return [*link, *first, comma, *self._opinion(sentiment)], False
        if kind == "late concession":
            first, link = self._opinion(sentiment), self._phrase(patterns.CONCESSION)
            return [*first, comma, *link, *self._opinion(-sentiment)], False
        if kind == "with a fact":
            parts = [self._opinion(sentiment), self._fact()]
            self._random.shuffle(parts)
            return [*parts[0], *self._phrase(patterns.ADDITION), *parts[1]], False
        return self._opinion(sentiment), False

    def _indifferent(self) -> list[Word]:
        """The clauses of a neutral post."""
        kind = self._random.random()
        if kind < 0.5:
            return self._clause(patterns.NEUTRAL_WITH_CUES)
        if kind < 0.7:
            return self._clause(patterns.PLAIN)
        return [*self._fact(), *self._phrase(patterns.ADDITION), *self._fact()]

    def _tail(self, sentiment: int, sarcastic: bool) -> list[Word]:
        """Laughter, emoji and hashtags: they hint at the label, and more so in train."""
        random = self._random
        hint = sentiment if random.random() < self._fidelity else random.choice([1, -1, 0])
        tail: list[Word] = []
        if random.random() < 0.15:
            tail.extend(self._phrase(words.LAUGHTER))
        if random.random() < 0.4:
            tail.append((random.choice(words.EMOJI[hint]), "other"))
        if sarcastic:
            tail.extend(self._phrase(words.SARCASM_TAGS))
        elif random.random() < 0.35:
            tags = {1: words.POSITIVE_TAGS, -1: words.NEGATIVE_TAGS, 0: words.NEUTRAL_TAGS}
            tail.extend(self._phrase(tags[hint] if random.random() < 0.5 else words.NEUTRAL_TAGS))
        if random.random() < 0.05:
            tail.append((f"https://t.co/{random.getrandbits(40):010x}", "other"))
        return tail

"""Words that the training texts do not hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokmask_peft.data import Example


def normal(word: str) -> str:
    """Return a word without case and without what is no letter or digit at its ends; empty for punctuation."""
    folded = word.casefold()
    inside = [place for place, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else ""


def vocabulary(texts: Iterable[Example]) -> set[str]:
    """Return the words of the texts, normalised."""
    return {normal(word) for example in texts for word in example.words}


def unseen_words(words: Sequence[str], known: set[str]) -> list[bool]:
    """Say of each word whether it is unseen; what has no letter or digit never is."""
    return [bool(word) and word not in known for word in map(normal, words)]

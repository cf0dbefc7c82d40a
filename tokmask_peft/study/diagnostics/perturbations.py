"""Misspelt texts, and words that a training has not seen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from tokmask_peft.examples import Pair

Alphabet = dict[str, tuple[str, ...]]


def alphabet(words: Iterable[str]) -> Alphabet:
    """Return the letters of the words by script, in lower case if there is one, sorted."""
    found: dict[str, set[str]] = {}
    for character in set("".join(words)):
        if character.isalpha():
            lower = character.lower()
            found.setdefault(_script(character), set()).add(lower if len(lower) == 1 else character)
    return {script: tuple(sorted(letters)) for script, letters in found.items()}


def misspell(words: Sequence[str], share: float, seed: Sequence[int], letters: Alphabet) -> list[str]:
    """Return words of which those that have a letter are misspelt with the chance `share`, 0 to 1.

    A word that is misspelt at one share is misspelt in the same way at a higher one. The seed can have several parts.
    """
    random = np.random.default_rng(list(seed))
    chances, seeds = random.random(len(words)), random.integers(0, 2**63, len(words))
    return [
        edit(word, np.random.default_rng(int(own)), letters) if chance < share else word
        for word, chance, own in zip(words, chances, seeds, strict=True)
    ]


def misspell_text(text: str | Pair, share: float, seed: Sequence[int], letters: Alphabet) -> str | Pair:
    """Return a running text, or a pair, of which about `share` of the words are misspelt; white space stays."""
    if isinstance(text, Pair):
        return Pair(*(str(misspell_text(part, share, (*seed, at), letters)) for at, part in enumerate(text)))
    changed = iter(misspell(text.split(), share, seed, letters))
    return re.sub(r"\S+", lambda _: next(changed), text)


def edit(word: str, random: np.random.Generator, letters: Alphabet) -> str:
    """Return the word with two letters swapped, or one dropped, inserted or replaced: another word, if there is one."""
    parts = clusters(word)
    places = [place for place, part in enumerate(parts) if part[0].isalpha()]

    def letter_like(old: str, exclude: str = "") -> str:
        """Return a letter of the script in the case of `old`; none if there is none."""
        choice = [one for one in letters.get(_script(old), ()) if one != exclude]
        new = str(random.choice(choice)) if choice else ""
        return new.upper() if old.isupper() and len(new.upper()) == 1 else new

    for kind in random.permutation(4) if places else ():
        if kind == 0:  # swap
            if pairs := [place for place in places if place + 1 in places and parts[place] != parts[place + 1]]:
                at = int(random.choice(pairs))
                parts[at], parts[at + 1] = parts[at + 1], parts[at]
                break
        elif kind == 1:  # drop
            if len(places) > 1:
                del parts[int(random.choice(places))]
                break
        else:  # insert or replace
            at = int(random.choice(places))
            old = parts[at][0]
            if new := letter_like(old, "" if kind == 2 else old.lower()):
                parts[at : at + 1] = [parts[at], new] if kind == 2 else [new + parts[at][1:]]
                break
    return "".join(parts)


def clusters(word: str) -> list[str]:
    """Split a word into characters, each with the combining marks and joiners that follow it."""
    found: list[str] = []
    for character in word:
        if found and (unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"):
            found[-1] += character
        else:
            found.append(character)
    return found


def _script(character: str) -> str:
    """Return the first word of the character's name, which is its script: LATIN, DEVANAGARI, CYRILLIC."""
    return unicodedata.name(character, "?").split()[0]


def normal(word: str) -> str:
    """Return a word without case, and without anything but letters and digits at its ends; empty for punctuation."""
    folded = word.casefold()
    inside = [place for place, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else ""


def unseen_words(words: Sequence[str], known: set[str]) -> list[bool]:
    """Return for each word whether it is unseen; a word without letters and digits never is."""
    return [bool(word) and word not in known for word in map(normal, words)]

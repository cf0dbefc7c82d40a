"""Character noise: a seeded misspelling in a share of the words of a text.

A chosen word gets one edit, each kind as likely: two neighbouring letters swapped, one dropped, one inserted, one
replaced; where a kind cannot change the word another is taken. A letter is a character with the marks that follow it,
so that a vowel sign or an accent stays with its letter. Letters that come in are drawn from those of the same script
in the texts themselves, and take upper case from the letter that they replace or follow; in scripts without case there
is nothing to take. Words without a letter (numbers, punctuation, emoji) stay as they are, and no word becomes empty.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Alphabet = dict[str, tuple[str, ...]]


def alphabet(words: Iterable[str]) -> Alphabet:
    """Return the letters of the words by script, in lower case where there is one, sorted."""
    found: dict[str, set[str]] = {}
    for character in set("".join(words)):
        if character.isalpha():
            lower = character.lower()
            found.setdefault(_script(character), set()).add(lower if len(lower) == 1 else character)
    return {script: tuple(sorted(letters)) for script, letters in found.items()}


def disturb(words: Sequence[str], share: float, seed: Sequence[int], letters: Alphabet) -> list[str]:
    """Return words of which about `share` are misspelt.

    A word that is misspelt at one share is misspelt in the same way at a higher one.

    Args:
        words: of a text.
        share: chance of each word that has a letter, 0 to 1.
        seed: of the choice and the edits, for example seed, draw and number of the text.
        letters: from `alphabet`.
    """
    random = np.random.default_rng(list(seed))
    chances, seeds = random.random(len(words)), random.integers(0, 2**63, len(words))
    return [
        edit(word, np.random.default_rng(int(own)), letters) if chance < share else word
        for word, chance, own in zip(words, chances, seeds, strict=True)
    ]


def disturb_text(text: str, share: float, seed: Sequence[int], letters: Alphabet) -> str:
    """Return a running text of which about `share` of the words are misspelt; white space stays."""
    changed = iter(disturb(text.split(), share, seed, letters))
    return re.sub(r"\S+", lambda _: next(changed), text)


def edit(word: str, random: np.random.Generator, letters: Alphabet) -> str:
    """Return the word with one edit; always another word if it has a letter and its script has two."""
    parts = clusters(word)
    places = [place for place, part in enumerate(parts) if part[0].isalpha()]
    kinds: list[Callable[[list[str], list[int], np.random.Generator, Alphabet], bool]]
    kinds = [_swap, _drop, _insert, _replace]
    for kind in random.permutation(len(kinds)) if places else ():
        if kinds[kind](parts, places, random, letters):
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


def _swap(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    pairs = [place for place in places if place + 1 in places and parts[place] != parts[place + 1]]
    if not pairs:
        return False
    at = int(random.choice(pairs))
    parts[at], parts[at + 1] = parts[at + 1], parts[at]
    return True


def _drop(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    if len(places) < 2:
        return False
    del parts[int(random.choice(places))]
    return True


def _insert(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    at = int(random.choice(places))
    new = _letter_like(parts[at][0], random, letters, other=False)
    if new:
        parts.insert(at + 1, new)
    return bool(new)


def _replace(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    at = int(random.choice(places))
    new = _letter_like(parts[at][0], random, letters, other=True)
    if new:
        parts[at] = new + parts[at][1:]
    return bool(new)


def _letter_like(letter: str, random: np.random.Generator, letters: Alphabet, *, other: bool) -> str:
    """Return a letter of the script, in the case of `letter`; none if there is no (other) one."""
    choice = [one for one in letters.get(_script(letter), ()) if not (other and one == letter.lower())]
    if not choice:
        return ""
    new = str(random.choice(choice))
    return new.upper() if letter.isupper() and len(new.upper()) == 1 else new


def _script(character: str) -> str:
    """Return the first word of the character's name, which is its script: LATIN, DEVANAGARI, CYRILLIC."""
    return unicodedata.name(character, "?").split()[0]

"""Spelling as in real posts: stretched vowels, lost accents, chat abbreviations, lower case."""

from __future__ import annotations

import unicodedata
from random import Random

Word = tuple[str, str]

_SHORT: dict[Word, tuple[str, ...]] = {
    ("que", "lang2"): ("q", "ke"),
    ("porque", "lang2"): ("xq", "pq"),
    ("para", "lang2"): ("pa", "pa'"),
    ("por", "lang2"): ("x",),
    ("también", "lang2"): ("tmb",),
    ("estuvo", "lang2"): ("stuvo",),
    ("está", "lang2"): ("ta", "stá"),
    ("nada", "lang2"): ("nd", "naa"),
    ("you", "lang1"): ("u", "ya"),
    ("are", "lang1"): ("r",),
    ("to", "lang1"): ("2",),
    ("for", "lang1"): ("4",),
    ("with", "lang1"): ("w/", "wit"),
    ("going", "lang1"): ("goin",),
    ("the", "lang1"): ("da", "tha"),
    ("and", "lang1"): ("n", "&"),
    ("please", "lang1"): ("pls", "plz"),
    ("not", "lang1"): ("nt",),
    ("people", "lang1"): ("ppl",),
}


def roughen(written: list[Word], random: Random) -> list[Word]:
    """Spell a post as its writer would: one writer drops accents or capitals throughout, slips are per word."""
    drops_accents = random.random() < 0.45
    lower = random.random() < 0.55
    careless = random.choice([0.0, 0.05, 0.15])
    rough: list[Word] = []
    for position, (word, tag) in enumerate(written):
        if tag != "other" and not word.startswith("#"):
            short = _SHORT.get((word.lower(), tag))
            if short and random.random() < careless * 2:
                word = random.choice(short)
            elif len(word) > 2 and random.random() < careless:
                word = _slip(word, random)
        if drops_accents:
            word = _without_accents(word)
        if lower and not (tag == "ne" and random.random() < 0.5):
            word = word.lower()
        elif position == 0:
            word = word[0].upper() + word[1:]
        rough.append((word, tag))
    return rough


def _slip(word: str, random: Random) -> str:
    """Stretch the last vowel, swap two letters or drop one."""
    vowels = [i for i, sign in enumerate(word) if sign.lower() in "aeiouáéíóú"]
    kind = random.random()
    if kind < 0.5 and vowels:
        place = vowels[-1]
        return word[: place + 1] + word[place] * random.randint(1, 4) + word[place + 1 :]
    if len(word) < 5:
        return word
    place = random.randrange(1, len(word) - 2)
    if kind < 0.75:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + word[place + 1 :]


def _without_accents(word: str) -> str:
    """Drop accents, but keep the tilde of ñ."""
    kept = [
        unicodedata.normalize("NFC", "n\u0303") if sign == "ñ" else unicodedata.normalize("NFD", sign)[0]
        for sign in word
    ]
    return "".join(kept)

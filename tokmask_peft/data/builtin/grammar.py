"""Turn patterns of the built-in corpus into tagged words that switch language at chunk boundaries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Literal, TypeVar

from tokmask_peft.data.builtin import nouns, words
from tokmask_peft.data.builtin.templates import Template

Language = Literal["lang1", "lang2"]
Word = tuple[str, str]
T = TypeVar("T")

SWITCH = 0.35
INSERTION = 0.18
HELD_OUT = 5
KINDS = ("food", "media", "event", "place", "thing", "person")
_SLOT = re.compile(r"\{(\w+)\}")
_PUNCTUATION = re.compile(r"[^\w#@]+")
_AGREEING = {"el": ("el", "la", "the"), "un": ("un", "una", "a"), "este": ("este", "esta", "this")}
_CONTRACTED = {("a", "el"): "al", ("de", "el"): "del"}


class Writer:
    """Write clauses with one random stream.

    Args:
        random: source of every choice.
        unseen: chance to draw a lexicon entry that training never uses; 0 in the training split.
    """

    def __init__(self, random: Random, unseen: float) -> None:
        self.random, self._unseen = random, unseen

    def pick(self, items: Sequence[T]) -> T:
        """Draw an entry; every fifth entry of a list is kept for the test split."""
        if len(items) < HELD_OUT:
            return self.random.choice(items)
        unseen = self._unseen > 0 and self.random.random() < self._unseen
        return self.random.choice([item for i, item in enumerate(items) if (i % HELD_OUT == HELD_OUT - 1) == unseen])

    def template(self, templates: Sequence[Template]) -> Template:
        """Draw a pattern; those marked as held out only where unseen entries are allowed."""
        unseen = self._unseen > 0 and self.random.random() < self._unseen
        return self.random.choice([t for t in templates if t.held_out == unseen])

    def other(self, language: Language) -> Language:
        """The other language."""
        return "lang2" if language == "lang1" else "lang1"

    def clause(self, template: Template, polarity: int, language: Language) -> tuple[list[Word], Language]:
        """Fill a pattern.

        Args:
            template: the pattern.
            polarity: sign of `{a}`; `{b}` has the other.
            language: language to begin in.

        Returns:
            The tagged words, and the language in which the clause ends.
        """
        slots = _Slots(self, template, polarity)
        written: list[Word] = []
        for position, chunk in enumerate(template.chunks):
            if position and self.random.random() < SWITCH:
                language = self.other(language)
            written.extend(slots.fill(chunk[0] if language == "lang1" else chunk[1], language))
        return written, language


class _Slots:
    """The things one clause talks about: the same noun in every chunk."""

    def __init__(self, writer: Writer, template: Template, polarity: int) -> None:
        self._writer = writer
        self._kind = writer.random.choice(template.kinds or KINDS)
        self._noun = writer.pick(nouns.NOUNS[self._kind])
        self._kin = writer.pick(nouns.NOUNS["kin"])
        self._action = writer.pick(words.ACTIONS[self._kind])
        self._qualities = {"a": self._quality(polarity or 1), "b": self._quality(-(polarity or 1))}
        self._neutral = writer.pick(words.NEUTRAL_ADJECTIVES)

    def _quality(self, polarity: int) -> words.Adjective:
        """A polar adjective that fits the noun."""
        lists = words.ADJECTIVES[polarity]
        return self._writer.pick(lists["*"] if self._writer.random.random() < 0.55 else lists[self._kind])

    def fill(self, chunk: str, language: Language) -> list[Word]:
        """Words of a chunk in one language."""
        written: list[Word] = []
        noun_language = self._insertion(language)
        for piece in chunk.split():
            slot = _SLOT.fullmatch(piece)
            if slot is None:
                written.append((piece, "other" if _PUNCTUATION.fullmatch(piece) else language))
            else:
                written.extend(self._slot(slot[1], language, noun_language))
        return _contract(written)

    def _insertion(self, language: Language) -> Language:
        """Language of the noun: now and then the other one, as in 'la party'."""
        insert = self._writer.random.random() < INSERTION
        return self._writer.other(language) if insert else language

    def _slot(self, slot: str, language: Language, noun_language: Language) -> list[Word]:
        """Words of a slot."""
        spanish = language == "lang2"
        pick, random = self._writer.pick, self._writer.random
        if slot in _AGREEING:
            masculine, feminine, english = _AGREEING[slot]
            form = (feminine if self._noun.feminine else masculine) if spanish else english
            return [(form, language)]
        if slot == "n":
            return _tagged(self._noun.en if noun_language == "lang1" else self._noun.es, noun_language)
        if slot in {"a", "b"}:
            quality = self._qualities[slot]
            inserted = random.random() < INSERTION / 3
            if spanish != inserted:
                return _tagged(quality.agree(self._noun), "lang2")
            return _tagged(quality.en, "lang1")
        if slot == "x":
            return _tagged(self._neutral.agree(self._noun) if spanish else self._neutral.en, language)
        if slot in {"i", "when"}:
            return _tagged(pick(words.INTENSIFIERS if slot == "i" else nouns.WHEN)[spanish], language)
        if slot == "k":
            return _tagged(self._kin.es if spanish else self._kin.en, language)
        if slot in {"mi", "lo"}:
            feminine_object = "la" if self._noun.feminine else "lo"
            return [("mi" if slot == "mi" else feminine_object, language)]
        if slot in {"name", "place", "brand"}:
            names = {"name": nouns.NAMES, "place": nouns.PLACES, "brand": nouns.BRANDS}[slot]
            return _tagged(pick(names), "ne")
        return _tagged(self._verb(slot, spanish), language)

    def _verb(self, slot: str, spanish: bool) -> str:
        """A form of the clause's verb."""
        base, third, past = self._action.en
        _, they_now, i_past, they_past, infinitive = self._action.es
        forms = {
            "did": (past, i_past),
            "does": (third, they_now),
            "done": (past, they_past),
            "do": (base, infinitive),
        }
        return forms[slot][spanish]


def _tagged(text: str, tag: str) -> list[Word]:
    """Split a phrase into words with one tag."""
    return [(word, tag) for word in text.split()]


def _contract(written: list[Word]) -> list[Word]:
    """Join 'a el' and 'de el' as Spanish does, and put 'an' before a vowel."""
    joined: list[Word] = []
    for position, (word, tag) in enumerate(written):
        if joined and tag == "lang2" and (joined[-1][0], word) in _CONTRACTED:
            joined[-1] = (_CONTRACTED[joined[-1][0], word], tag)
        elif word == "a" and tag == "lang1" and written[position + 1 : position + 2]:
            following = written[position + 1][0][0].lower()
            joined.append(("an" if following in "aeiou" else "a", tag))
        else:
            joined.append((word, tag))
    return joined

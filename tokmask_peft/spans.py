"""Entities that labels of words mark: `B-PER I-PER` is a person of two words.

**Reading.** Any sequence of labels is read as in seqeval's default mode, and conlleval before (Tjong Kim Sang and
Buchholz 2000): a word is in the entity of the word before it if both have the same type, the word before it does not
end one, and its own label does not begin one. That reads BIO (IOB2), IOB1 and BIOES; BILOU is BIOES with L for E and U
for S.

**Repair.** A sequence that its scheme does not allow is read so, and its entities are written again: `O I-PER I-PER`
becomes `O B-PER I-PER`. This never adds, loses or moves an entity, nor changes a score; seqeval's strict mode then
differs only by what is illegal in the data themselves.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tokmask_peft.errors import DataError

NO_SPANS = "none"
SCHEMES = {"bio": "BI", "iob1": "BI", "bioes": "BIES", "bilou": "BILU"}
"""By the name in `data.spans`, the letters before the type; IOB1 has B only where two entities of a type meet."""
_SAME = {"L": "E", "U": "S"}
_LABEL = re.compile("([BIESLU])(?:-(.*))?", re.DOTALL)
Span = tuple[str, int, int]  # type, first and last word of an entity


@dataclass(frozen=True, slots=True)
class Entity:
    """An entity that a classifier found in a text."""

    type: str
    first: int  # index of its first word
    last: int  # of its last word, which is part of it
    text: str  # its words, with a space between them
    confidence: float  # the lowest of its words' calibrated probabilities of being in an entity of this type


def split_label(label: str) -> tuple[str, str]:
    """Return the letter of a label, with E for L and S for U, and its type; O and no type if it marks no entity."""
    found = _LABEL.fullmatch(label)
    return ("O", "") if found is None else (_SAME.get(found[1], found[1]), found[2] or "")


def mark_of(label: str) -> str:
    """Return the type that a label marks, `entity` if it has none, or O."""
    letter, kind = split_label(label)
    return "O" if letter == "O" else kind or "entity"


def read(labels: Iterable[str]) -> list[Span]:
    """Return the entities of a sequence of labels, from left to right; see the module."""
    found: list[Span] = []
    before = ("O", "")
    for place, label in enumerate(labels):
        letter, kind = split_label(label)
        if before[0] in "BI" and letter in "IE" and before[1] == kind:
            found[-1] = (kind, found[-1][1], place)
        elif letter != "O":
            found.append((kind, place, place))
        before = letter, kind
    return found


@dataclass(frozen=True)
class Spans:
    """How the labels of a classifier mark entities; DataError if a label is not one of the scheme."""

    scheme: str  # a key of `SCHEMES`
    labels: tuple[str, ...]  # that the classifier gives, in the order of its outputs

    def __post_init__(self) -> None:
        form = re.compile(f"O|[{SCHEMES[self.scheme]}](-.*)?", re.DOTALL)
        if odd := tuple(label for label in self.labels if not form.fullmatch(label)):
            letters = ", ".join(f"{letter}-TYPE" for letter in SCHEMES[self.scheme])
            problem = f"data.spans is {self.scheme}, so labels are O, {letters}, but there is {', '.join(odd[:5])}"
            remedy = "Set data.spans=auto, or none if the labels mark no entities, or rename them (data.label_map)."
            raise DataError(f"{problem}. {remedy}", code="span-labels", scheme=self.scheme, labels=odd)

    @cached_property
    def _written(self) -> dict[tuple[str, str], str]:
        return {split_label(label): label for label in self.labels}

    def repaired(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Return a sequence with the same entities in the scheme's form, as far as the classifier has the labels."""
        legal, previous = list(labels), ("", -1)
        for kind, first, last in read(labels):
            for place in range(first, last + 1):
                letter = "B" if place == first else "I"
                if self.scheme == "iob1":
                    letter = "B" if place == first and previous == (kind, first - 1) else "I"
                elif self.scheme != "bio" and place == last:
                    letter = "S" if first == last else "E"
                legal[place] = self._written.get((letter, kind), legal[place])
            previous = kind, last
        return tuple(legal)

    def repaired_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the same of label ids; a negative one, which stands for no answer, is outside, and stays."""
        labels = self.repaired([self.labels[number] if number >= 0 else "O" for number in ids])
        return [self.labels.index(label) if number >= 0 else number for number, label in zip(ids, labels, strict=True)]


def find_scheme(labels: Sequence[str], texts: Iterable[Sequence[str]]) -> tuple[str, str]:
    """Return the scheme of a set of labels, `none` if they mark no entities, and the reason.

    All labels are O or a letter with a type, and at least one begins with B-: a set of languages or parts of speech is
    never taken for entities. Without types, B, I and O are all there. `texts` are sequences of these labels, which tell
    IOB1 from BIO: there, entities usually begin with I.
    """
    found = [re.fullmatch("O|([BIESLU])(-.+)?", label) for label in labels]
    typed = {bool(one[2]) for one in found if one and one[1]}
    letters = {one[1] for one in found if one and one[1]}
    kinds = len({split_label(label)[1] for label in labels if label != "O"})
    fits = all(found) and len(typed) == 1 and (True in typed or ("I" in letters and "O" in labels))
    if not fits or "B" not in letters:
        hint = fits and letters == {"I"} and "O" in labels
        return NO_SPANS, "no label begins with B-; data.spans=iob1 reads I- as entities" if hint else ""
    scheme = next((name for name, allowed in SCHEMES.items() if letters <= {*allowed}), NO_SPANS)
    if scheme == "bio":
        begins = [0, 0]
        for text in texts:
            end = ("", -1)
            for kind, first, last in read(text):
                if end != (kind, first - 1):  # between two entities of a type, both schemes have B
                    begins[text[first].startswith("I")] += 1
                end = kind, last
        scheme = "iob1" if begins[1] > begins[0] else "bio"
    listed = ", ".join(f"{letter}-" for letter in SCHEMES.get(scheme, "") if letter in letters)
    what = f"{kinds} type{'s' * (kinds > 1)}" if True in typed else "no types"
    usual = ", and entities begin with I-" if scheme == "iob1" else ""
    reason = f"data.spans is auto, and the labels mark entities: O, {listed} with {what}{usual}"
    return scheme, "" if scheme == NO_SPANS else reason

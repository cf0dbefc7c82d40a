"""Find the word that a user points at."""

from __future__ import annotations

from collections.abc import Sequence

from tokmask_peft.errors import DataError, nearest


def find_word(words: Sequence[str], wanted: int | str, where: str) -> int:
    """Return the index of a word.

    Args:
        words: of the text.
        wanted: an index from 0, from the end if negative; or the word itself, if it is there once.
        where: what to call the text in messages.

    Raises:
        DataError: there is no such word, or there are several.
    """
    if isinstance(wanted, int):
        if not -len(words) <= wanted < len(words):
            raise DataError(f"{where} has no word {wanted}: its words are 0 to {len(words) - 1}")
        return wanted % len(words)
    places = [index for index, word in enumerate(words) if word == wanted]
    if not places:
        raise DataError(f"{where} has no word '{wanted}'.{nearest(wanted, words)}")
    if len(places) > 1:
        listed = f"{', '.join(map(str, places[:-1]))} and {places[-1]}"
        raise DataError(f"'{wanted}' is word {listed} of {where}: give one of these numbers")
    return places[0]

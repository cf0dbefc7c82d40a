"""One text with its label, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass

Label = str | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Example:
    """A text as read, before tokenization.

    Attributes:
        text: the text (sequence tasks), or its words (token tasks).
        label: the label, or one tag per word; none when the source gives no label.
        where: `file:line` or `split[row]`, for error messages.
    """

    text: str | tuple[str, ...]
    label: Label
    where: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words: as given, or the text split at white space."""
        return tuple(self.text.split()) if isinstance(self.text, str) else self.text

    @property
    def string(self) -> str:
        """The text as one string, words joined by a space."""
        return self.text if isinstance(self.text, str) else " ".join(self.text)

    @property
    def tags(self) -> tuple[str, ...]:
        """The labels as a tuple: one per word, or the only one; empty without a label."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row or text that could not be read, kept at its place where a reader is asked to go on.

    Attributes:
        where: `file:line` or `file[row]`.
        problem: what is wrong with it.
    """

    where: str
    problem: str

"""Words with colours behind them, as HTML: by their influence on an answer, or by their label."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_FAINTEST = 0.04  # of the strongest influence: below, a word stays plain
_STRONGEST = 0.6  # opacity of the strongest; more would cost contrast
HUES = 8
"""Colours for labels that the style sheet has; further labels begin again with the first."""


def influence_words(words: Sequence[str], influences: Sequence[float], focus: int | None = None) -> Markup:
    """Return a text whose words are tinted by their influence, relative to the strongest in the text.

    Args:
        words: of the text.
        influences: per word, positive where it speaks for the answer; empty where unknown.
        focus: index of the word that the answer is about; it gets a frame.
    """
    known = list(influences) or [0.0] * len(words)
    strongest = max(map(abs, known), default=0.0)
    spans = []
    for place, (word, influence) in enumerate(zip(words, known, strict=True)):
        shown = Markup("<strong>{}</strong>").format(word) if place == focus else word
        if strongest == 0.0 or abs(influence) < _FAINTEST * strongest:
            spans.append(Markup("<span>{}</span>").format(shown))
            continue
        weight = _STRONGEST * abs(influence) / strongest
        side = "for" if influence > 0 else "against"
        span = Markup('<span class="{}" style="--w:{:.2f}" title="{:+.2f}">{}</span>')
        spans.append(span.format(side, weight, influence, shown))
    return Markup(" ").join(spans)


def strongest_words(words: Sequence[str], influences: Sequence[float], count: int = 3) -> list[tuple[str, float]]:
    """Return the words of greatest influence with it, for readers who do not see the colours."""
    pairs = sorted(zip(words, influences, strict=True), key=lambda pair: -abs(pair[1]))
    return [(word, influence) for word, influence in pairs[:count] if influence]


def label_words(words: Sequence[str], labels: Sequence[str], order: Sequence[str], sure: Sequence[float]) -> Markup:
    """Return a text whose words are tinted by their label.

    Args:
        words: of the text.
        labels: per word.
        order: all labels; the place of a label gives its colour.
        sure: per word, the probability of its label.
    """
    span = Markup('<span class="label hue-{}" title="{}, {:.3f}">{}</span>')
    return Markup(" ").join(
        span.format(order.index(label) % HUES, label, chance, word)
        for word, label, chance in zip(words, labels, sure, strict=True)
    )


def label_legend(order: Sequence[str]) -> Markup:
    """Return the colours of the labels, in their order."""
    swatch = Markup('<li class="label hue-{}">{}</li>')
    entries = Markup("").join(swatch.format(place % HUES, label) for place, label in enumerate(order))
    return Markup('<ul class="legend" aria-label="labels">{}</ul>').format(entries)

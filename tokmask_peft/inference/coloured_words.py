"""Words with colours behind them, as HTML: by their influence on an answer, or by their label.

The page that shows them includes `words.css`, which lies beside this file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from markupsafe import Markup

_FAINTEST = 0.04  # of the strongest influence: below, a word stays plain
_STRONGEST = 0.6  # opacity of the strongest; more would cost contrast
HUES = 8
"""Colours for labels that the style sheet has; further labels begin again with the first."""


def strengths(influences: Sequence[float], full: float = 0.0) -> list[float]:
    """Return per word how strong its colour is, from -1 (against the answer) to 1 (for it).

    Args:
        influences: per word, in nats.
        full: from which influence on a text's strongest word has the full colour; weaker texts stay pale.
    """
    strongest = max(full, *map(abs, influences)) if influences else 0.0
    return [influence / strongest if strongest else 0.0 for influence in influences]


def influence_words(
    words: Sequence[str],
    influences: Sequence[float],
    focus: int | None = None,
    *,
    full: float = 0.0,
    unmasked: Collection[int] = (),
    tags: Sequence[str] = (),
) -> Markup:
    """Return a text whose words are tinted by their influence, relative to the strongest in the text.

    Args:
        words: of the text.
        influences: per word, positive where it speaks for the answer; empty where unknown.
        focus: index of the word that the answer is about; it gets a frame.
        full: as for `strengths`.
        unmasked: indices of words that cannot be masked.
        tags: per word, what stands small behind it; empty for nothing.
    """
    known = list(influences) or [0.0] * len(words)
    spans = []
    for place, (word, influence, strength) in enumerate(zip(words, known, strengths(known, full), strict=True)):
        shown = Markup("<strong>{}</strong>").format(word) if place == focus else word
        if place in unmasked:
            span = Markup('<span title="cannot be masked">{}</span>').format(shown)
        elif abs(strength) < _FAINTEST:
            span = Markup("<span>{}</span>").format(shown)
        else:
            span = Markup('<span class="{}" style="--w:{:.2f}" title="{:+.2f}">{}</span>').format(
                "for" if influence > 0 else "against", _STRONGEST * abs(strength), influence, shown
            )
        if tags:
            span = Markup('<span class="pair">{}<span class="tag">{}</span></span>').format(span, tags[place])
        spans.append(span)
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

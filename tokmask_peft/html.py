"""HTML of which pages, the demo and notebooks are made: templates, coloured words, pictures, and what notebooks show.

A word's tint is the size of its effect, not relative to the strongest of its text: where no word matters all are pale.
"""

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tokmask_peft.console import baseline_verdict
from tokmask_peft.errors import RunError, check_place

MARK = "<!-- tokmask report -->"  # is in the head of every page, so that a page is replaced but never another file
HUES = 8  # colours for labels that the style sheet has; further labels begin again with the first
FAINTEST = 0.05  # strength below which a word stays plain: a tenth of a nat
_STRONGEST = 0.6  # opacity of the full colour; more would cost contrast


@functools.cache
def environment() -> Environment:
    """Return the templates of the package; every value is escaped, and a missing one is an error."""
    found = Environment(
        loader=PackageLoader("tokmask_peft", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "score": "{:.4f}".format,
        "count": "{:,}".format,
        "number": "{:g}".format,
        "chance": lambda value: "above 99.9%" if 0.9995 <= value < 1 else f"{100 * value:.1f}%",
        "file_name": file_name,
        "verdict": lambda result: baseline_verdict(result.scored, result.baseline),
        "tinted": lambda one: influence_words(one.words, one.influences, one.word),
        "strongest": lambda one: strongest_words(one.words, one.influences),
    }
    found.globals |= {"label_words": label_words, "label_legend": label_legend}
    return found


def check_page(path: Path) -> Path:
    """Return the file of a page to write; a RunError if it cannot be written, or is there and is not a report."""
    if check_place(path, RunError, "bad-output").is_file() and MARK not in path.read_text("utf-8", "replace")[:200]:
        raise RunError(f"{path} exists and is not a report; give another file with --out", code="taken", path=path)
    return path


class InNotebooks:
    """Base of what notebooks show as an HTML fragment with its style, from the template `notebook.html.j2`."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return environment().get_template("notebook.html.j2").render(it=self, kind=type(self).__name__)


def file_name(source: str) -> str:
    """Return the source of a split without the folders of the machine that it was on."""
    for kind in (PurePosixPath, PureWindowsPath):
        if (path := kind(source)).is_absolute():
            return path.name
    return source


def strength_of(influence: float) -> float:
    """Return how strong a word's colour is by its nats, from -1 (against the answer) to 1 (for it): tanh(nats / 2)."""
    return math.tanh(influence / 2)


def influence_words(
    words: Sequence[str],
    influences: Sequence[float],
    focus: int | None = None,
    *,
    unmasked: Collection[int] = (),
    tags: Sequence[str] = (),
) -> Markup:
    """Return a text whose words are tinted by their influence; see `strength_of`.

    Influences are positive if a word speaks for the answer, and empty if not known. `focus` is the index of the word
    that the answer is about, `unmasked` are those of words that cannot be masked; `tags` follow words in small print.
    """
    known = list(influences) or [0.0] * len(words)
    spans = []
    for place, (word, influence) in enumerate(zip(words, known, strict=True)):
        strength = strength_of(influence)
        shown = Markup("<strong>{}</strong>").format(word) if place == focus else word
        if place in unmasked:
            span = Markup('<span title="cannot be masked">{}</span>').format(shown)
        elif abs(strength) < FAINTEST:
            span = Markup("<span>{}</span>").format(shown)
        else:
            side, opacity = "for" if influence > 0 else "against", _STRONGEST * abs(strength)
            tinted = Markup('<span class="{}" style="--w:{:.2f}" title="{:+z.2f}">{}</span>')
            span = tinted.format(side, opacity, influence, shown)
        if tags:
            span = Markup('<span class="pair">{}<span class="tag">{}</span></span>').format(span, tags[place])
        spans.append(span)
    return Markup(" ").join(spans)


def strongest_words(words: Sequence[str], influences: Sequence[float], count: int = 3) -> list[tuple[str, float]]:
    """Return the words of greatest influence with it, of those that have a colour, for readers who do not see it."""
    pairs = sorted(zip(words, influences, strict=True), key=lambda pair: -abs(pair[1]))
    return [(word, influence) for word, influence in pairs[:count] if abs(strength_of(influence)) >= FAINTEST]


def label_words(words: Sequence[str], labels: Sequence[str], order: Sequence[str], sure: Sequence[float]) -> Markup:
    """Return a text whose words are tinted by their label: `order` lists all labels, `sure` their probabilities."""
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


INK, MUTED, GRID = "#010101", "#020202", "#030303"
FIRST, SECOND = "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", FIRST: "--first", SECOND: "--second"}

_STYLE = {
    **dict.fromkeys(("text.parse_math", "axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    "svg.fonttype": "none",  # letters of any script, searchable, in the fonts of the page
    "font.size": 10,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
}


def draw(name: str, alt: str, paint: Callable[[Any], None], size: tuple[float, float] = (3.6, 2.5)) -> Markup:
    """Return what `paint` draws on axes as an `<svg>` element in the colours of the page; its size is in inches.

    `name`, unique on the page, begins the ids inside; `alt` says what it shows to readers who cannot see it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the letters
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head = re.search(r'<svg [^>]*?viewBox="(?P<box>[^"]+)"[^>]*>', text)
    if head is None:
        raise ValueError("matplotlib wrote an <svg> without a viewBox")
    body = re.sub(r"<metadata>.*?</metadata>", "", text[head.end() :], flags=re.DOTALL)
    body = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    label = escape(alt)
    start = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{head["box"]}" role="img" aria-label="{label}">'
    # made of matplotlib's own markup, which escapes its texts, and of an escaped label
    return Markup(start + body)  # noqa: S704


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, an `<svg>` element, and the line below it."""

    svg: Markup
    caption: str

"""Matplotlib figures as SVG inside a page: text stays text, and the page's style sheet gives the colours.

A figure is drawn in stand-in colours, each of which becomes a CSS variable, so that one picture serves a light and a
dark page.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from markupsafe import Markup, escape

from tokmask_peft.errors import ExtraError

INK, MUTED, GRID = "#010101", "#020202", "#030303"
FIRST, SECOND = "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", FIRST: "--first", SECOND: "--second"}

_STYLE = {
    "svg.fonttype": "none",  # letters of any script, searchable, in the fonts of the page
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def require_matplotlib() -> None:
    """Check that pictures can be drawn, without importing anything.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ExtraError(
            "a report draws its pictures with matplotlib, which is not installed: pip install 'tokmask-peft[plots]'"
        )


def draw(name: str, alt: str, paint: Callable[[Any], None], size: tuple[float, float] = (3.6, 2.5)) -> Markup:
    """Return one picture as an `<svg>` element.

    Args:
        name: unique on the page: the ids inside hang on it.
        alt: what the picture shows, for those who cannot see it.
        paint: draws on the axes that it is given.
        size: width and height in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the letters
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, alt)


def _inline(text: str, name: str, alt: str) -> Markup:
    """Cut the XML head away, name the picture, keep its ids apart from other pictures', and open its colours."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    head = re.compile(r'<svg [^>]*?viewBox="(?P<box>[^"]+)"[^>]*>')
    box = head.match(body)
    if box is None:
        raise ValueError("matplotlib wrote an <svg> without a viewBox")
    label = escape(alt)
    start = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box["box"]}" role="img" aria-label="{label}">'
    # made of matplotlib's own markup, which escapes its texts, and of an escaped label
    return Markup(start + body[box.end() :])  # noqa: S704

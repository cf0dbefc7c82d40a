"""A page with explanations that can be shared: one file, no network, no script."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokmask_peft.inference.coloured_words import influence_words
from tokmask_peft.inference.explain import Explanation
from tokmask_peft.inference.show_explanations import FULL_COLOUR, headline


def explanations_page(model: str, explanations: Sequence[Explanation], note: str) -> str:
    """Return the page as HTML.

    Args:
        model: how to call the model on it.
        explanations: a section each.
        note: how words were masked, in a sentence.
    """
    loader = PackageLoader("tokmask_peft", "inference")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("explain_page.html").render(
        model=model,
        note=note,
        items=[
            {"of": explanation, "headline": headline(explanation), "words": _tinted(explanation)}
            for explanation in explanations
        ],
    )


def _tinted(explanation: Explanation) -> Markup:
    return influence_words(
        explanation.words,
        explanation.influences,
        explanation.word,
        full=FULL_COLOUR,
        unmasked=explanation.unmasked,
        tags=explanation.labels if explanation.word is None else (),
    )

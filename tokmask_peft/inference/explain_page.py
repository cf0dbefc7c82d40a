"""A page with explanations that can be shared: one file, no network, no script."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from tokmask_peft.inference.explain import Explanation
from tokmask_peft.inference.show_explanations import headline, strengths


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
            {"of": explanation, "headline": headline(explanation), "strengths": strengths(explanation)}
            for explanation in explanations
        ],
    )

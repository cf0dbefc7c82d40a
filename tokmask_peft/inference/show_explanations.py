"""Explanations in a terminal, as plain lines, as JSON, and as a page that can be shared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from tokmask_peft.inference.coloured_words import strengths
from tokmask_peft.inference.explain import Explanation

FULL_COLOUR = 2.0
"""Nats from which a text's strongest word has the full colour: weaker texts stay pale, noise is not blown up."""
_FOR, _AGAINST = (33, 102, 172), (214, 96, 77)  # blue and orange-red, told apart by colour-blind readers, too


def print_explanations(explanations: Sequence[Explanation], console: Console) -> None:
    """Print words coloured by influence, or, where there are no colours, a line per word with its numbers."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    for number, explanation in enumerate(explanations):
        if number:
            console.print()
        if coloured:
            _print_coloured(explanation, console)
        else:
            _print_plain(explanation)
    if coloured:
        legend = Text("speaks for the label", style=_style(1.0))
        console.print(legend.append("  ", style="default on default").append("against it", style=_style(-1.0)))


def as_record(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON holds it, with numbers to 6 digits."""
    return {key: _rounded(value) for key, value in asdict(explanation).items() if value not in (None, ())}


def print_json(explanations: Sequence[Explanation]) -> None:
    """Print a JSON line per text."""
    for explanation in explanations:
        typer.echo(json.dumps(as_record(explanation), ensure_ascii=False))


def headline(explanation: Explanation) -> str:
    """Say in a line what is explained."""
    if not explanation.label:
        return "each word's label, by the word itself"
    said = f"{explanation.label} ({explanation.probability:.3f})"
    return said if explanation.word is None else f"'{explanation.words[explanation.word]}': {said}"


def _print_coloured(explanation: Explanation, console: Console) -> None:
    line = Text()
    colours = strengths(explanation.influences, FULL_COLOUR)
    for index, (word, strength) in enumerate(zip(explanation.words, colours, strict=True)):
        underlined = " underline" if index == explanation.word else ""
        line.append(word, style=_style(strength) + underlined)
        if explanation.labels and explanation.word is None:
            line.append(f"/{explanation.labels[index]}", style="dim")
        line.append(" ")
    console.print(Text(headline(explanation), style="bold"))
    console.print(line)


def _style(strength: float) -> str:
    """Mix a colour with white, under black letters, whatever the terminal's own colours are."""
    target = _FOR if strength >= 0 else _AGAINST
    share = 0.75 * abs(strength)
    if share < 0.04:
        return ""
    red, green, blue = (round(255 + (part - 255) * share) for part in target)
    return f"rgb(0,0,0) on rgb({red},{green},{blue})"


def _print_plain(explanation: Explanation) -> None:
    typer.echo(headline(explanation))
    typer.echo("word" + ("\tlabel" if explanation.labels else "") + "\tinfluence\tprobability without it")
    for index, word in enumerate(explanation.words):
        label = f"\t{explanation.labels[index]}" if explanation.labels else ""
        if index in explanation.unmasked:
            typer.echo(f"{word}{label}\tcannot be masked")
        else:
            typer.echo(f"{word}{label}\t{explanation.influences[index]:+.2f}\t{explanation.without[index]:.3f}")


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value

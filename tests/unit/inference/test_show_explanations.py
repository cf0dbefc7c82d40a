"""Explanations on screen, as JSON and as a page: every word and number there, nothing unescaped, no network."""

import io
import json
import re

import pytest
from rich.console import Console

from tokmask_peft.inference.display import explanations_page, print_explanations, print_json
from tokmask_peft.inference.explain import Explanation

TEXT = Explanation(
    ("so", "[bold]", "<script>", "&", "bad"),
    (0.5, 3.0, -4.0, -0.001, 0.0),
    'so-so "x"',
    0.93,
    (0.9, 0.4, 0.999, 0.93, 0.93),
    unmasked=(4,),
)
WORDS = Explanation(
    ("ok", "bueno"), (1.0, -0.2), "", 0.8, (0.5, 0.8), labels=("lang1", "<lang2>"), probabilities=(0.9, 0.7)
)


def test_colours_where_there_are_some(capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", width=100, highlight=False)
    print_explanations([TEXT, WORDS], console)
    said = screen.getvalue()
    styles = {word: style.split(";") for style, word in re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", said)}
    assert int(styles["<script>"][-3]) > int(styles["<script>"][-1]), "a word against the label is red"
    assert int(styles["[bold]"][-1]) > int(styles["[bold]"][-3]), "a word for the label is blue"
    assert "&" not in styles, "noise is not coloured"
    assert "/<lang2>" in styles
    assert 'so-so "x" (0.930)' in said
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True, "no_color": True}])
def test_numbers_elsewhere(settings, capsys):
    print_explanations([TEXT, WORDS], Console(file=io.StringIO(), **settings))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:7] == [
        "so\t+0.50\t0.900",
        "[bold]\t+3.00\t0.400",
        "<script>\t-4.00\t0.999",
        "&\t+0.00\t0.930",
        "bad\tcannot be masked",
    ]
    assert lines[-1] == "bueno\t<lang2>\t-0.20\t0.800"


def test_json_holds_what_is_there(capsys):
    print_json([TEXT, WORDS])
    one, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["influences"] == list(TEXT.influences)
    assert "labels" not in one
    assert other["labels"] == list(WORDS.labels)


def test_the_page_is_escaped_and_needs_nothing_else():
    page = explanations_page("me/<model>", [TEXT, WORDS], "words are <masked>")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 2
    assert "me/&lt;model&gt;" in page
    assert "so-so &#34;x&#34;" in page
    assert "words are &lt;masked&gt;" in page
    assert "cannot be masked" in page
    assert "-4.00" in page
    assert "&lt;lang2&gt;" in page
    for loads in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert loads not in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert page.count('class="against"') == 2 + 1  # and the legend

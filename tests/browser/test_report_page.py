"""The report in a browser: it fits a desktop and a phone, its pictures are drawn, and it loads nothing."""

import pytest
from run_files import NASTY, write_run

from tokmask_peft.artifacts import open_run
from tokmask_peft.report.examples import Mistake, Mistakes
from tokmask_peft.report.page import render

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report with a long name, long labels and a long word, as a file address."""
    root = tmp_path_factory.mktemp("report")
    words = ("http://example.org/" + "x" * 200, NASTY, *["palabra"] * 40)
    shown = (Mistake(words, "good", "bad", 0.9, 0.05, "test.tsv:3", 1, (-4.0, *(0.1 * n - 1 for n in range(1, 42)))),)
    run = open_run(write_run(root / "run", task="token"))
    page = root / "report.html"
    page.write_text(render(run, Mistakes("test", 9, 9, 126, 1, shown)), encoding="utf-8")
    return page.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_loads_nothing(address, open_page, overflow, width, scheme):
    page, asked = open_page(address, width, scheme)
    assert overflow(page) <= 0
    assert asked == [address]
    pictures = page.locator("figure svg")
    assert pictures.count() == 5
    for number in range(5):
        box = pictures.nth(number).bounding_box()
        assert box["width"] > 150
        assert box["height"] > 100
    ink = page.locator("figure svg text").first.evaluate("element => getComputedStyle(element).fill")
    assert ink == page.evaluate(
        "() => { const probe = document.body.appendChild(document.createElement('i'));"
        " probe.style.color = 'var(--muted)'; return getComputedStyle(probe).color }"
    )


def test_wide_tables_scroll_inside_themselves(address, open_page):
    page, _ = open_page(address, 390)
    wide = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
    assert wide >= 1
    sentences = page.locator(".scroll:has(td.wide)")
    assert sentences.count() == 2  # duplicates and decisions: their long texts wrap
    for number in range(2):
        assert sentences.nth(number).evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_the_names_of_rows_stay_while_a_table_is_read_sideways(address, open_page):
    page, _ = open_page(address, 390)
    moved = page.evaluate("""[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 20)
      .map(e => {
        const left = () => e.querySelector('tbody th').getBoundingClientRect().left, before = left();
        e.scrollLeft = 20;
        return before - left();
      })""")
    assert moved
    assert max(moved) <= 2


def test_words_are_tinted_by_their_strength(address, open_page, background):
    page, _ = open_page(address)
    strong = page.locator(".mistakes .for").last
    weak = page.locator(".mistakes .for").first
    assert background(strong) > background(weak) > 0
    assert page.locator(".mistakes .against").count() > 5
    dots = "e => Number(getComputedStyle(e).borderBottomColor.match(/[\\d.]+\\)/)?.[0].slice(0, -1))"
    faint = page.locator(".mistakes .against").last.evaluate(dots)
    assert 0 < faint < page.locator(".key .against").evaluate(dots), "noise looks like noise without colours, too"

"""The page of explanations in a browser: it fits a phone, and its words are legible on their colours."""

import pytest

from tokmask_peft.inference.display import explanations_page
from tokmask_peft.inference.explain import Explanation

LUMINANCE = """element => {
  const paint = (colour, under) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
  };
  const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const style = getComputedStyle(element);
  const page = paint(getComputedStyle(document.body).backgroundColor, [255, 255, 255]);
  const back = paint(style.backgroundColor, page);
  const [dark, bright] = [light(back), light(paint(style.color, back))].sort((a, b) => a - b);
  return (bright + .05) / (dark + .05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_its_words_are_legible(tmp_path, open_page, overflow, scheme):
    words = ("قهوة", "http://example.org/" + "x" * 200, "boss")
    found = Explanation(words, (9.0, -9.0, 0.2), "good", 0.9, (0.1, 0.99, 0.9))
    page = tmp_path / "page.html"
    page.write_text(explanations_page("a_run", [found], "words are masked"), encoding="utf-8")
    page, asked = open_page(page.as_uri(), 390, scheme)
    assert overflow(page) <= 0
    assert len(asked) == 1
    coloured = page.locator(".for, .against").all()
    assert len(coloured) == 5  # two of them in the key
    assert min(one.evaluate(LUMINANCE) for one in coloured) >= 4.5  # WCAG 2 AA
    assert page.locator("p.text").get_attribute("dir") == "auto"

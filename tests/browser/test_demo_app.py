"""The demo in a browser: a text is answered, words are coloured, and only this machine is asked."""

import pytest
from tiny_models import build

from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.report.demo import build as build_app
from tokmask_peft.report.demo import launch

TEXT = "mañana <img src=x onerror=alert(1)> ${1+1} boss"


@pytest.fixture(scope="module")
def served():
    """Return a function that serves the demo of a tiny random model, and gives its address."""
    pytest.importorskip("gradio")  # here, because to import it takes seconds of every process
    apps = []

    def serve(task):
        model, tokenizer = build("bert", task)
        model.config.pad_token_id = tokenizer.pad_token_id
        classifier = Classifier(model, tokenizer, task, ("lang1", "lang2", "other"), max_length=32)
        about = "Macro-F1 on test: 0.5. It does NOT beat <b>n-grams</b>."
        app = build_app(classifier, "a_run", about, ["hola boss", "una <i>canción</i>", f"http://t.co/{'x' * 60}"])
        apps.append(app)
        return launch(app)[1]

    yield serve
    for app in apps:
        app.close(verbose=False)


def classify(page, text):
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Classify").click()


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_text_is_answered_with_coloured_words(served, open_page, overflow, background, task):
    address = served(task)
    assert address.startswith("http://127.0.0.1:")
    page, asked = open_page(address, 390)
    page.get_by_text("hola boss").click()
    assert "does NOT beat <b>n-grams</b>" in page.inner_text("body")
    page.wait_for_function("document.querySelector('textarea').value == 'hola boss'")
    places = "[...document.querySelectorAll('#label, #words, button.primary')].map(e => e.getBoundingClientRect().top)"
    before = page.evaluate(places)
    classify(page, TEXT)
    page.wait_for_selector("#words .words")
    assert page.evaluate(places) == pytest.approx(before, abs=1), "the first answer moves nothing"
    tinted = page.locator("#words .for, #words .against" if task == "sequence" else "#words .words .label")
    assert tinted.count() >= 2
    assert background(tinted.first) > 0.02
    assert "<img src=x onerror=alert(1)> ${1+1} boss" in page.inner_text("#words")
    assert page.locator("#words img").count() == 0
    if task == "sequence":
        assert "%" in page.inner_text("#label")
    else:
        assert page.locator("#words .legend li").all_inner_texts() == ["lang1", "lang2", "other"]
        assert page.locator("#words tbody tr").count() == len(TEXT.split())
    assert overflow(page) <= 0
    classify(page, "   ")
    page.wait_for_selector("#words [role=alert]")
    assert "no words" in page.inner_text("#words")
    assert [url for url in asked if not url.startswith(address)] == []

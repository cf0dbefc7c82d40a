"""The demo's answers: coloured words for good input, a sentence for bad input, and nothing of the text's markup."""

import socket

import httpx
import pytest
from run_files import write_run
from tiny_models import build
from typer.testing import CliRunner

from tokmask_peft.cli import app
from tokmask_peft.errors import ModelError
from tokmask_peft.examples import Example
from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.report import demo


@pytest.fixture(scope="module")
def classifier():
    """Return a function that makes a classifier of a tiny random model."""

    def make(task, family="bert"):
        model, tokenizer = build(family, task)
        model.config.pad_token_id = tokenizer.pad_token_id
        return Classifier(model, tokenizer, task, ("lang1", "<b>", "other"), max_length=32)

    return make


def test_a_text_gets_probabilities_and_words_coloured_by_influence(classifier):
    chances, html = demo.answer(classifier("sequence"), "mañana <i>meeting</i> boss")
    assert chances is not None
    assert sum(chances.values()) == pytest.approx(1)
    assert 'class="for"' in html or 'class="against"' in html
    assert "&lt;i&gt;meeting&lt;/i&gt;" in html
    assert "<i>" not in html


@pytest.mark.parametrize(("cut", "said"), [(-99.0, "labels: lang1, &lt;b&gt;, other"), (99.0, "no label")])
def test_several_labels_are_those_above_their_thresholds(classifier, cut, said):
    one = classifier("sequence")
    model = Classifier(one.model, one.tokenizer, "multilabel", one.labels, max_length=32, cuts=[cut] * 3)
    chances, html = demo.answer(model, "mañana boss")
    assert chances.keys() == {"lang1", "<b>", "other"}
    assert said in html


def test_words_get_the_colour_of_their_label(classifier):
    chances, html = demo.answer(classifier("token"), "mañana <i>meeting</i> boss")
    assert chances is None
    assert html.count('<span class="label') == 3
    assert html.count("<tr>") == 4
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "<i>" not in html


@pytest.mark.parametrize(("task", "text"), [("sequence", " \n "), ("token", "half a pair \ud800")])
def test_what_the_classifier_refuses_is_answered_in_words(classifier, task, text):
    chances, html = demo.answer(classifier(task), text)
    assert chances is None
    assert html.startswith('<p class="message" role="alert">The text')


def test_long_texts_are_classified_without_colours(classifier):
    chances, html = demo.answer(classifier("sequence"), "boss " * 301)
    assert chances is not None
    assert "301 words" in html
    assert 'class="for"' not in html


def test_a_text_of_any_length_is_answered_at_once(classifier):
    model = classifier("token")
    model.predict = None  # is not called
    chances, html = demo.answer(model, "boss " * 2_001)
    assert chances is None
    assert "10,005 characters" in html
    assert "tokmask predict" in html


def test_the_server_takes_no_uploads_and_no_large_requests(classifier):
    pytest.importorskip("gradio")
    served = demo.build(classifier("token"), "a_run")
    assert (served._queue.max_size, served.default_config.fns[0].concurrency_limit) == (16, "default")
    try:
        _, address, _ = demo.launch(served)
        with httpx.Client(base_url=address, trust_env=False) as client:
            assert client.get("/").status_code == 200
            assert client.get("/gradio_api/info").status_code == 200
            for path in ("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/upload_progress"):
                assert client.post(path, files={"files": ("a.txt", b"x")}).status_code == 404
            text = {"data": ["a" * 300_000], "fn_index": 0, "session_hash": "a"}
            assert client.post("/gradio_api/queue/join", json=text).status_code == 413
            assert client.post("/gradio_api/queue/join", content=iter([b"a"])).status_code == 413
            text["data"] = ["a boss"]
            assert client.post("/gradio_api/queue/join", json=text).status_code == 200
    finally:
        served.close(verbose=False)


def test_what_is_known_of_a_run(tmp_path, monkeypatch):
    assert demo.of_run("user/name") == ("", [])
    folder = write_run(tmp_path / "run")
    sentence, texts = demo.of_run(str(folder))
    assert ("0.6100" in sentence, "beats the character n-gram baseline" in sentence, texts) == (True, True, [])
    given = [Example(f"text {n}", ("good", "bad")[n % 2], "f:1") for n in range(6)] + [Example("a" * 300, "c", "f:7")]
    monkeypatch.setattr("tokmask_peft.training.evaluate.split_examples", lambda *_: (given, ()))
    assert demo.of_run(str(folder))[1] == ["text 0", "text 1"]
    given[:] = [Example(("a", "b"), tags, "f:1") for tags in (("x", "y"), ("x", "x"))]
    recipe = (folder / "recipe.yaml").read_text().replace("task: sequence", "task: token")
    (folder / "recipe.yaml").write_text(recipe)
    assert demo.of_run(str(folder))[1] == ["a b"]  # one for each label of a first word


def test_a_taken_port_and_a_foreign_host_are_reported_before_loading():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ModelError, match="--port"):
            demo.check_address("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ModelError) as caught:
        demo.check_address("192.0.2.1", None)
    assert caught.value.code == "bad-address"
    demo.check_address(demo.HOST, None)


def test_the_command_listens_on_loopback_by_default(monkeypatch):
    pytest.importorskip("gradio")
    asked = []
    monkeypatch.setattr(demo, "check_address", lambda *address: asked.append(address))
    found = CliRunner().invoke(app, ["demo", "no/such/model/here"])
    assert asked == [("127.0.0.1", None)]
    assert found.exit_code == 2
    assert "does not exist" in found.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "tokmask-peft[demo]" in CliRunner().invoke(app, ["demo", "no/such/model/here"]).stderr

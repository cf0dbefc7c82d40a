"""The page of a run: everything that was measured, escaped, and nothing that was not."""

import os
import re
import sys

import pytest
from run_files import NASTY, Outline, log, result, write_run
from tiny_models import tiny_tokenizer
from typer.testing import CliRunner

from tokmask_peft.artifacts import open_run
from tokmask_peft.cli import app
from tokmask_peft.console import baseline_verdict
from tokmask_peft.errors import ExtraError, RunError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.report.examples import Mistake, Mistakes
from tokmask_peft.report.page import prepare, render, report_run

pytest.importorskip("matplotlib")


def mistakes(task="sequence", **more):
    words, word = (("so", NASTY, "bueno"), 1 if task == "token" else None)
    wrong = Mistake(words, "good", "bad", 0.9999, 0.00004, "test.tsv:3", word, (0.5, -2.0, 0.0))
    return Mistakes(**{"split": "test", "texts": 9, "of": 9, "items": 126, "wrong": 1, "shown": (wrong,), **more})


def page(tmp_path, found=None, shown=None, why="", task="sequence", lines=(), **more):
    """Return a page; without pictures unless the result and the lines of the log are given."""
    if found is None:
        found = result(task)
        del found["calibration"]
    return render(open_run(write_run(tmp_path / "run", found, task=task, lines=lines, **more)), shown, why)


@pytest.fixture(scope="module", params=["sequence", "token"])
def whole(request, tmp_path_factory):
    """A page with everything on it, and its task."""
    task = request.param
    return page(tmp_path_factory.mktemp(task), result(task), mistakes(task), task=task, lines=log()), task


def test_it_holds_what_was_measured(whole):
    text, task = whole
    seen = Outline(text).text
    for expected in (
        "made-up", "someone/tiny-bert", "p = 0.1", "beats the character n-gram baseline", "test 0.6100 0.6200 0.6300",
        "validation 0.7100 0.7200 0.7300", "n-gram baseline 0.5100 0.5200 0.5300", "Temperature 1.250",
        "test 0.0789 0.0123 0.4321 0.4321", "in train and in test 926",
        "No texts were found in validation and in test; in train and nearly in validation;",
        "Merged on reading: so-so → bad (12).",
        "Removed: 87 from train.", "train train.tsv 1,234 5,678 17 29", "61 s in 30 steps", "1.00 GiB",
        "texts are cut at 99 sub-tokens. For the scores, longer ones are read in windows", "595 sub-tokens per second",
        "tokmask predict", "1 of 126", "above 99.9%", "AutoPeftModelFor",
    ):  # fmt: skip
        assert expected in seen
    assert ("By code-mixing index (test)" in seen) == (task == "token")
    assert ("0 to 15 5 50 0.8000 0.8000" in seen) == (task == "token")


def test_texts_and_labels_are_escaped(whole):
    text, _ = whole
    assert "<script" not in text
    seen = Outline(text)
    assert "script" not in seen.tags
    assert "/home/someone" not in text  # of the data report
    assert seen.text.count("alert(") >= 6  # label, warning, decision, shared text, mistake
    assert not [name for name, _ in seen.attributes if name.startswith("on")]


def test_it_is_one_file_that_loads_nothing_and_every_link_has_its_target(whole):
    text, _ = whole
    seen = Outline(text)
    assert not {"link", "script", "iframe", "object", "img"} & set(seen.tags)
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for name, value in seen.attributes if name in ("src", "href", "xlink:href", "srcset")}
    assert links
    assert links <= {f"#{name}" for name in ids}
    assert "@import" not in text
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text


def test_pictures_say_what_they_show_and_take_the_colours_of_the_page(whole):
    text, task = whole
    seen = Outline(text)
    labels = " ".join(value for name, value in seen.attributes if name == "aria-label")
    expected = ["Training loss: 1.000 at step 1, 0.033 at step 30", "0.0789 before the temperature, 0.0123 after"]
    expected += ["0.900 at 0, 0.800 at 0–15, 0.700 at 45–100"] if task == "token" else []
    assert seen.tags.count("svg") == 2 + len(expected)  # those, F1 and rate
    assert [words for words in expected if words not in labels] == []
    assert "var(--ink)" in text
    assert not re.findall(r"#0[1-5]0[1-5]0[1-5]", text)


@pytest.mark.parametrize(("verdict", "colour"), [("does not beat", "bad"), ("cannot tell", ""), ("beats", "good")])
def test_the_verdict_on_the_baseline_has_its_colour(tmp_path, verdict, colour):
    found = result() | {"calibration": {}}
    found["baseline"]["verdict"] = verdict
    text = page(tmp_path, found)
    assert f'class="verdict {colour}"' in text
    assert baseline_verdict(found["test"], found["baseline"]) in Outline(text).text


def test_a_run_without_test_baseline_calibration_and_log(tmp_path):
    found = {key: value for key, value in result().items() if key not in ("test", "baseline", "calibration")}
    del found["data"]["splits"]["test"]
    seen = Outline(page(tmp_path, found, why="no data"))
    assert "svg" not in seen.tags
    for expected in ("macro-F1 on validation 0.7100", "No baseline", "no test split", "did not calibrate",
                     "log.jsonl is missing", "Left out: no data", "By class (validation)"):  # fmt: skip
        assert expected in seen.text


def test_an_older_calibration_has_its_numbers_without_the_picture(tmp_path):
    found = result()
    old = {key: {"nll": 0.5, "ece": 0.25} for key in ("before", "after")}
    found["calibration"] |= {"validation": old, "test": old}
    seen = Outline(page(tmp_path, found)).text
    assert "test 0.2500 0.2500 0.5000 0.5000" in seen
    assert "no reliability diagram" in seen


def test_without_masking_there_is_no_curve_of_it(tmp_path):
    lines = [{key: value for key, value in line.items() if key != "masking_rate"} for line in log()]
    text = page(tmp_path, lines=(*lines, {"step": 31, "loss": None}), masking=0)
    assert "Masking rate p" not in text
    constant = [line | {"masking_rate": 0.1} for line in log()]
    assert "Masking rate p" not in page(tmp_path / "constant", lines=constant)
    assert "0.033 at step 30" in text


@pytest.mark.parametrize(("probability", "is_repaired"), [(0.02, True), (0.7, False)])
def test_a_label_that_was_repaired_says_why_its_probability_is_low(tmp_path, probability, is_repaired):
    one = Mistake(("uno", "dos"), "O", "B-x", probability, 0.3, "test.conll:1", 0)
    text = page(tmp_path, task="token", shown=Mistakes("test", 9, 9, 126, 1, (one,)))
    assert ("a likelier label was replaced" in text) == is_repaired


def test_changed_data_and_samples_are_mentioned(tmp_path):
    assert "have changed since training: 99 texts now" in page(tmp_path, shown=mistakes(items=99))
    sampled = page(tmp_path / "b", shown=mistakes(items=99, of=500))
    assert "random sample of 9 of its 500 texts" in sampled
    assert "have changed" not in sampled
    assert "Without word colours: no mask" in page(tmp_path / "c", shown=mistakes(unexplained="no mask"))


@pytest.mark.parametrize(("kind", "spaced"), [("bytelevel", True), ("wordpiece", False)])
def test_the_snippet_encodes_words_as_the_run_did(tmp_path, kind, spaced):
    run = open_run(write_run(tmp_path / "run", result("token") | {"calibration": {}}, task="token", lines=()))
    assert "spaced = " not in render(run, None)  # no tokenizer with the adapter
    tiny_tokenizer(kind).save_pretrained(run.folder.adapter)
    assert ("spaced = " in render(run, None)) == spaced


def test_only_a_report_is_replaced(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')  # by a run that was killed
    assert len(open_run(folder).log) == len(log())
    path, _ = report_run(folder, examples=False)
    assert path == folder / "report.html"
    report_run(folder, examples=False)
    mine = tmp_path / "thesis.html"
    mine.write_text("mine")
    os.mkfifo(tmp_path / "pipe")  # or a device, which the page would replace
    bad = [tmp_path / name for name in ("no/such.html", "", "pipe", f"{'x' * 250}.html")]
    for out, code in ((mine, "taken"), *((path, "bad-output") for path in bad)):
        with pytest.raises(RunError) as caught:
            report_run(folder, out, examples=False)
        assert caught.value.code == code
    assert mine.read_text() == "mine"


def test_missing_matplotlib_is_reported_before_anything_else(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"tokmask-peft\[plots\]"):
        prepare(folder)


def test_the_page_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "secret" / "mine", result() | {"calibration": {}})
    path, problem = report_run(folder)  # its data are not there
    assert problem
    text = path.read_text()
    assert "secret" not in text
    assert "tokmask predict runs/mine" in text
    monkeypatch.chdir(tmp_path)
    report_run("secret/mine", examples=False)
    assert "tokmask predict secret/mine" in path.read_text()


@pytest.mark.parametrize(("masking", "shown"), [({"p": 0.1}, "p = 0.1"), (
    {"p": 0, "p_start": 0.2, "schedule": "linear"}, "p ≤ 0.2 (linear)")])  # fmt: skip
def test_the_rate_is_that_of_the_whole_training(masking, shown):
    assert TokenMaskConfig(**masking).rates == shown


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    def test_mistakes_of_the_user_are_one_message(self, tmp_path):
        unfinished, broken = (write_run(tmp_path / name) for name in ("unfinished", "broken"))
        (unfinished / "result.json").unlink()
        (broken / "result.json").write_text("{")
        for argument in (tmp_path, tmp_path / "nope", unfinished, broken):
            found = self.run(argument)
            assert found.exit_code == 2
            assert str(argument) in found.stderr
            assert len(found.stderr.splitlines()) == 1

    def test_data_that_are_gone_leave_the_mistakes_out_and_say_so(self, tmp_path):
        found = self.run(write_run(tmp_path / "run"))
        assert found.exit_code == 0, found.output
        assert "Note: the page shows no mistakes" in found.stderr
        assert "Left out" in (tmp_path / "run/report.html").read_text()


def test_warnings_that_matter_come_before_the_scores(tmp_path):
    found = result() | {"calibration": {}}
    found["data"]["hygiene"] |= {"mode": "report", "test_shared": 17, "validation_in_test": 3}
    found["test"]["without_prediction"] = 5
    floor = {"code": "not-above-floor", "message": "below that of character n-grams", "key": "a"}
    found["warnings"] = [floor, floor | {"message": "below that of a linear probe"}]
    text = page(tmp_path, found)
    shown = Outline(text).text
    assert "elow that of character" not in shown  # the verdict says it
    for words in ("Below that of a linear probe", "A warning <script>", "20 texts are both in test", "5 words of test"):
        assert shown.index(words) < shown.index("macro-F1 weighted F1 accuracy")
    assert text.count("A warning &lt;script&gt;") == 1
    quiet = result() | {"calibration": {}}
    quiet["data"]["warnings"] = []
    assert 'class="alerts"' not in page(tmp_path / "other", quiet)

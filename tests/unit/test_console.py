"""What a run prints."""

import contextlib
import gc
import io
import json
import re
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tokmask_peft.artifacts import Result
from tokmask_peft.cli import app
from tokmask_peft.console import (
    Decision,
    SafeConsole,
    baseline_verdict,
    calibration_line,
    echo,
    make_console,
    print_classes,
    print_decisions,
    print_lines,
    print_result,
    print_scores,
    quick_imports,
)
from tokmask_peft.examples import Prediction, WordPredictions
from tokmask_peft.inference.display import print_answers, print_explanations
from tokmask_peft.inference.explain import Explanation


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120, highlight=False, soft_wrap=True)


def part(score, **more):
    return {"f1_macro": score, "f1_weighted": score, "accuracy": score, "items": 1234, **more}


def test_brackets_are_text_and_not_markup(console, tmp_path):
    print_decisions(console, [Decision("mask [token]", "[mask]", "modules [q_proj, /v_proj] are [bold]")])
    print_lines(console, "Data", ["file [a].csv"])
    warning = {"code": "not-above-floor", "message": "the score is below that of character n-grams", "key": "a"}
    warnings = [warning, warning | {"message": "the score is below that of a linear probe"}]
    floor = part(0.6, verdict="does not beat", interval=[-0.2, -0.1])
    scores = {"validation": part(0.5), "labels": ["a", "b"], "baseline": floor, "warnings": warnings}
    print_result(console, Result.from_dict(scores), tmp_path / "[a]" / "adapter")
    text = console.file.getvalue()
    assert ("NOT beat" in text, "that of character" in text, "that of a linear" in text) == (True, False, True)
    for expected in ("mask [token]", " [mask] ", "[q_proj, /v_proj] are [bold]", "file [a].csv", "/[a]/adapter"):
        assert expected in text


def test_control_characters_are_shown_and_not_obeyed(capsys):
    evil = "a\x1b[2Jb\x9b31mc\u202ed\r\x00\ud800"
    console = make_console()
    print_decisions(console, [Decision(evil, evil, evil)])
    print_lines(console, "Data", [evil])
    print_lines(make_console(), "Data", [evil])  # that of the commands
    print_scores(console, {evil: part(0.5, without_prediction=1)})
    print_answers([evil], [Prediction(evil, {evil: 1.0})], as_json=False)
    print_answers([evil], [WordPredictions((evil,), (evil,), ({evil: 1.0},))], as_json=False)
    explanation = Explanation((evil,), (1.0,), evil, 0.5, (0.5,), labels=(evil,))
    for is_terminal in (True, False):
        print_explanations([explanation], SafeConsole(width=200, force_terminal=is_terminal))
    echo(evil, err=True)
    for text in capsys.readouterr():
        styles = re.sub(r"\x1b\[[0-9;]*m", "", text)  # rich's own
        assert "a\\u001b[2Jb\\u009b31mc\\u202ed" in styles
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", styles)
    print_answers([evil], [Prediction(evil, {evil: 1.0})], as_json=True)
    assert json.loads(capsys.readouterr().out)["text"] == evil
    refused = CliRunner().invoke(app, ["train", "no\x1b[2Jsuch"])
    assert (refused.exit_code, "\x1b" in refused.stderr, "u001b[2J" in refused.stderr) == (2, False, True)


def test_scores_say_what_was_cut_and_how_mixed_posts_fare(console):
    mixing = [{"cmi": "0 to 15", "posts": 1000, "f1_macro": 0.25}]
    print_scores(console, {"test": part(0.5, without_prediction=17, by_mixing=mixing), "validation": part(1.0)})
    text = console.file.getvalue()
    assert ["test", "0.5000", "0.5000", "0.5000", "1,234"] in [line.split() for line in text.splitlines()]
    assert "test: 17 words" in text
    assert "code-mixing index 0 to 15: macro-F1 0.2500 (1,000 posts)" in text


def test_each_class_has_a_line(console):
    classes = {f"[l{n}]": {"precision": 0.5, "recall": 0.25, "f1": n / 50, "support": 1200} for n in range(50)}
    print_classes(console, "posts.csv", part(0.5, per_class=dict(list(classes.items())[:3])))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["label", "precision", "recall", "F1", "support"] in rows
    assert ["[l2]", "0.5000", "0.2500", "0.0400", "1,200"] in rows
    print_classes(console, "test", part(0.5, per_class=dict(reversed(classes.items()))))
    many = console.file.getvalue()
    assert ("[l39]" in many, "[l40]" in many, "10 classes" in many) == (True, False, True)
    assert max(map(len, many.splitlines())) <= 80


@pytest.mark.parametrize("verdict", ["beats", "does not beat", "cannot tell", None])
def test_the_verdict_is_given_whichever_way_it_falls(verdict):
    found = {} if verdict is None else {"verdict": verdict, "interval": [-0.02, 0.08]}  # older runs have none
    sentence = baseline_verdict(part(0.63), part(0.6, **found))
    assert ("not enough to tell" in sentence, "NOT" in sentence) == (
        verdict in ("cannot tell", None),
        verdict == "does not beat",
    )
    assert "+0.0300" in sentence
    assert ("-0.0200 to +0.0800" in sentence) == (verdict is not None)
    assert not baseline_verdict(part(0.5), None)


def test_a_temperature_that_is_left_out_is_said_with_the_reason():
    figures = {"validation": {"before": {"ece": 0.1}, "after": {"ece": 0.2}}}
    line = calibration_line({"temperature": 1.5, **figures})
    assert "Temperature 1.500" in line
    assert "on validation 0.1" in line
    line = calibration_line({"temperature": 1.0, "left_out": "it does not help", **figures})
    assert "no temperature is used, because it does not help" in line
    assert "the texts it is fitted on" in line


@pytest.mark.parametrize("imported", [True, False])
def test_the_first_imports_are_made_without_collecting_garbage(monkeypatch, imported):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    import transformers.modeling_utils  # noqa: F401

    if not imported:
        monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    with contextlib.suppress(ImportError), quick_imports():
        assert gc.isenabled() is imported
        raise ImportError
    assert gc.isenabled()
    assert frozen == ([] if imported else [False])

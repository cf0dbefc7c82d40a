"""What notebooks show: short texts, and fragments of HTML in which everything is escaped."""

import pytest
from run_files import NASTY, Outline, write_run

from tokmask_peft.artifacts import open_run
from tokmask_peft.examples import Prediction, WordPredictions
from tokmask_peft.inference.explain import Explanation

ANSWERS = [
    Prediction(NASTY, {NASTY: 0.75, "b": 0.25}),
    WordPredictions((NASTY, "b"), ("x", NASTY), ({"x": 0.9, NASTY: 0.1}, {"x": 0.2, NASTY: 0.8})),
    WordPredictions((), (), ()),
    Explanation((NASTY, "b"), (2.0, -0.5), NASTY, 0.9, (0.5, 0.9)),
    Explanation(("a",), (0.0,), "", 0.9, (0.5,), labels=(NASTY,), probabilities=(0.9,)),
]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_answers_and_explanations(answer):
    assert not {"script", "img"} & {*Outline(answer._repr_html_()).tags}
    assert len(repr(answer)) < 300


def test_many_words_are_cut_in_the_short_form():
    words = tuple(f"w{number}" for number in range(100))
    assert repr(WordPredictions(words, words, tuple({word: 1.0} for word in words))).endswith("w7/w7 …)")


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_run_and_its_result(tmp_path, task):
    run = open_run(write_run(tmp_path / "run", task=task))
    for one in (run, run.result):
        shown = Outline(one._repr_html_())
        assert "script" not in shown.tags
        assert f"{run.result.scored['f1_macro']:.4f}" in shown.text
        assert {"table", "details"} <= {*shown.tags}
    assert f"{run.result.scored['f1_macro']:.4f}" in repr(run.result)
    assert len(repr(run)) < 500

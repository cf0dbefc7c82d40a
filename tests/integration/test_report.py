"""The report of a run that was trained here, through Python and through the command line."""

import re

import pytest

from tokmask_peft.artifacts import open_run
from tokmask_peft.report.page import report_run

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_report_of_a_trained_run(trained, tokmask, tmp_path, task):
    done = open_run(trained("bert", task).folder.root)
    calibration = done.result.calibration["test"]
    assert sum(row["items"] for row in calibration["after"]["reliability"]) == calibration["items"]
    if task == "token":
        assert tokmask("report", done.folder.root, "--out", "page.html").stdout.split() == ["page.html"]
    else:
        assert report_run(done.folder.root, tmp_path / "page.html") == (tmp_path / "page.html", "")
    page = (tmp_path / "page.html").read_text()
    assert f"{done.result.scored['f1_macro']:.4f}" in page
    assert page.count("<svg") == 3  # loss, F1, reliability; the masking rate is constant
    matrix = done.result.scored["confusion"]["matrix"]
    wrong = sum(map(sum, matrix)) - sum(row[place] for place, row in enumerate(matrix))
    seen = re.search(r"([\d,]+) of ([\d,]+) (texts|words) in test are wrong", page)
    assert seen is not None
    assert [int(number.replace(",", "")) for number in seen.groups()[:2]] == [wrong, sum(map(sum, matrix))]
    assert "have changed" not in page
    if wrong:
        assert 'class="for"' in page

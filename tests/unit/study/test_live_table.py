import io

from rich.console import Console

from tokmask_peft.study.ledger import CellState
from tokmask_peft.study.runner import SweepDisplay, duration, remaining_seconds, summary_line

CELLS = {
    "a": CellState("done", 0.5, 60.0),
    "b": CellState("done", 0.75, 120.0),
    "c": CellState("running"),
    "d": CellState("waiting"),
    "e": CellState("failed", reason="no memory"),
    "f": CellState("pruned"),
}


def test_the_line_says_all():
    assert summary_line(CELLS, 130) == (
        "2/6 done, 1 running, 1 failed, 1 pruned; best b (validation macro-F1 0.7500); about 2 min left"
    )
    assert summary_line({}, None) == "0/0 done, 0 running"


def test_remaining_time_is_that_of_what_is_open():
    assert remaining_seconds(CELLS, {"c": 30.0}, 1) == 2 * 90 - 30
    assert remaining_seconds(CELLS, {"c": 500.0}, 1) == 90  # it takes longer than the mean; the other is to come
    assert remaining_seconds(CELLS, {}, 2) == 90
    assert remaining_seconds({"d": CELLS["d"]}, {}, 1) is None
    assert remaining_seconds({"a": CELLS["a"]}, {}, 1) == 0


def test_durations():
    assert [duration(s) for s in (5, 89, 600, 7260)] == ["5 s", "89 s", "10 min", "2 h 1 min"]


def test_the_table_of_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with SweepDisplay(console, 1) as display:
        display.update(CELLS, {"c": 30.0}, ["step 4, loss 0.5"])
        display._live.refresh()
    said = console.file.getvalue()
    for expected in ("2/6 done", "c  step 4, loss 0.5", "30 s", "failed: e: no memory", "min left"):
        assert expected in said

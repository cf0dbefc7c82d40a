"""Several workers on one sweep: no trial twice, none lost, whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from sweep_worker import sweep

WORKER = Path(__file__).parent / "sweep_worker.py"


def start(folder, *arguments):
    with (folder / "said").open("a") as said:
        return subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *map(str, arguments)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def journal(folder):
    file = folder / "stub" / "journal"
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(condition, *processes):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        assert all(process.poll() is None for process in processes), "a worker ended early"
        time.sleep(0.01)


def counted(folder, what):
    return Counter(cell for word, cell, _ in journal(folder) if word == what)


def test_two_workers_and_a_kill_in_the_middle_double_and_lose_nothing(tmp_path):
    cells = {f"p{p}-seed{seed}" for p in ("0", "0.1") for seed in range(1, 6)}
    one, two = start(tmp_path, 5), start(tmp_path, 5)  # at once: both find the sweep new
    wait_for(lambda: len(counted(tmp_path, "end")) >= 3, one, two)
    one.kill()
    one.wait()
    # whoever takes over must not wait for a heartbeat to grow old: the worker was on this machine
    three = start(tmp_path, 5)
    assert (two.wait(timeout=120), three.wait(timeout=120)) == (0, 0), (tmp_path / "said").read_text()

    assert counted(tmp_path, "end") == dict.fromkeys(cells, 1), (tmp_path / "said").read_text()
    again = {cell: times for cell, times in counted(tmp_path, "start").items() if times > 1}
    assert len(again) <= 2, "only what the killed worker had in hand may begin a second time"
    before = journal(tmp_path)
    sweep(tmp_path, 5)
    assert journal(tmp_path) == before, "a finished trial was run again"


def test_a_sweep_that_is_stopped_goes_on_alone(tmp_path):
    worker = start(tmp_path, 3)
    wait_for(lambda: len(counted(tmp_path, "end")) >= 2, worker)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=120) == 130
    assert "runs finished; repeat the command" in (tmp_path / "said").read_text()
    sweep(tmp_path, 3)
    assert set(counted(tmp_path, "end").values()) == {1}
    assert len(counted(tmp_path, "end")) == 6


def test_a_failed_trial_is_reported_and_stops_nothing(tmp_path, capsys):
    cells = sweep(tmp_path, 3, broken=2)
    assert [name for name, cell in cells.items() if cell.state == "failed"] == ["p0-seed2", "p0.1-seed2"]
    said = capsys.readouterr().out
    assert "failed p0-seed2: the stand-in was asked to fail (exit code 2)" in said
    assert "4/6 done, 0 running, 2 failed" in said
    before = journal(tmp_path)
    sweep(tmp_path, 3, broken=2)
    assert journal(tmp_path) == before, "a failed trial is run again only when asked for"
    sweep(tmp_path, 4, retry=True)  # the cause is mended, and a seed is added
    assert set(counted(tmp_path, "end").values()) == {1}
    assert len(counted(tmp_path, "end")) == 8


def test_claims_of_many_workers_never_meet(tmp_path):
    command = [sys.executable, str(WORKER.with_name("claim_all.py")), str(tmp_path)]
    workers = [subprocess.Popen([*command, str(i), "3"], stdout=subprocess.PIPE, text=True) for i in range(3)]
    claimed = Counter(name for worker in workers for name in worker.communicate(timeout=120)[0].split())
    assert len(claimed) == 20
    assert set(claimed.values()) == {1}

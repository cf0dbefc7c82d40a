"""Several workers on one sweep: no trial twice, none lost, whatever is killed."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")
WORKER = Path(__file__).parent / "sweep_worker.py"


@pytest.fixture
def start(begin, tmp_path):
    """Return a function that starts a worker of a sweep."""
    return lambda *arguments: begin(WORKER, tmp_path, *arguments)


def journal(folder):
    file = folder / "stub" / "journal"
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(condition, *workers):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        assert all(worker.process.is_alive() for worker in workers), "a worker ended early"
        time.sleep(0.01)


def counted(folder, what):
    return Counter(cell for word, cell, _ in journal(folder) if word == what)


def test_two_workers_and_a_kill_in_the_middle_double_and_lose_nothing(start, tmp_path):
    cells = {f"p{p}-seed{seed}" for p in ("0", "0.1") for seed in range(1, 6)}
    one, two = start(5), start(5)  # at once: both find the sweep new
    wait_for(lambda: len(counted(tmp_path, "end")) >= 3, one, two)
    one.process.kill()
    one.end()
    # whoever takes over must not wait for a heartbeat to grow old: the worker was on this machine
    done = [two.end(120), start(5).end(120)]
    assert [worker.returncode for worker in done] == [0, 0], done

    assert counted(tmp_path, "end") == dict.fromkeys(cells, 1), done
    again = {cell: times for cell, times in counted(tmp_path, "start").items() if times > 1}
    assert len(again) <= 2, "only what the killed worker had in hand may begin a second time"
    before = journal(tmp_path)
    assert start(5).end(120).returncode == 0
    assert journal(tmp_path) == before, "a finished trial was run again"


def test_a_sweep_that_is_stopped_goes_on_alone(start, tmp_path):
    worker = start(5)  # so that it is not done before a busy machine gets to the signal
    wait_for(lambda: len(counted(tmp_path, "end")) >= 2, worker)
    os.kill(worker.process.pid, signal.SIGINT)
    done = worker.end(120)
    assert done.returncode == 130
    assert "runs finished; repeat the command" in done.stdout
    assert start(5).end(120).returncode == 0
    assert set(counted(tmp_path, "end").values()) == {1}
    assert len(counted(tmp_path, "end")) == 10


def test_a_failed_trial_is_reported_and_stops_nothing(start, tmp_path):
    done = start(3, 2).end(120)
    assert done.returncode == 1
    assert "failed p0-seed2: the stand-in was asked to fail (exit code 2)" in done.stdout
    assert "4/6 done, 0 running, 2 failed" in done.stdout
    before = journal(tmp_path)
    assert start(3, 2).end(120).returncode == 1
    assert journal(tmp_path) == before, "a failed trial is run again only when asked for"
    assert start(4, -1, "--retry").end(120).returncode == 0  # the cause is mended, and a seed is added
    assert set(counted(tmp_path, "end").values()) == {1}
    assert len(counted(tmp_path, "end")) == 8


def test_claims_of_many_workers_never_meet(begin, tmp_path):
    workers = [begin(WORKER.with_name("claim_all.py"), tmp_path, number, 3) for number in range(3)]
    claimed = Counter(name for worker in workers for name in worker.end(120).stdout.split())
    assert len(claimed) == 20
    assert set(claimed.values()) == {1}

"""A worker's process: one run after the other, its end, its reason, and no state that a run leaves to the next."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokmask_peft.artifacts import RunFolder
from tokmask_peft.study.worker import Worker


@pytest.fixture
def start(plan):
    """Return a function that runs Python code as the training of the first cell."""
    workers = []

    def run(code):
        worker = Worker(functools.partial(_train, code), threads=1)
        workers.append(worker)
        begin(worker, plan, 0)
        return worker

    yield run
    for worker in workers:
        worker.end()


def _train(code, recipe, resume):
    exec(code, {"recipe": recipe, "resume": resume})


def begin(worker, plan, number):
    worker.begin(plan.recipe_of(plan.cells[number]))


def ended(worker):
    while (code := worker.poll()) is None:
        time.sleep(0.01)
    return code


def test_one_process_runs_one_cell_after_the_other_and_resumes_a_folder_that_holds_something(start, plan):
    (plan.folder / "p0.1-seed1").mkdir(parents=True)
    (plan.folder / "p0.1-seed1" / "log.jsonl").touch()
    worker = start("import os; print(recipe.name, resume, os.getpid(), os.getsid(0))")
    assert ended(worker) == 0
    *first, process, session = worker.log.read_text().split()
    begin(worker, plan, 1)
    assert ended(worker) == 0
    assert (first, worker.log.read_text().split()[:3]) == (["p0-seed1", "False"], ["p0.1-seed1", "True", process])
    assert session == process, "Ctrl-C at the terminal must not reach it"


def test_after_a_failure_the_next_cell_gets_a_new_process(start, plan):
    worker = start("import os; os._exit(0 if 'p0.1' in recipe.name else 3)")
    assert ended(worker) == 3
    begin(worker, plan, 1)
    assert ended(worker) == 0


def test_what_a_process_says_at_its_end_is_the_reason(start):
    worker = start("raise MemoryError('too large')")
    assert worker.reason(ended(worker)) == "MemoryError: too large (exit code 1)"


def test_the_reason_is_not_that_of_an_earlier_attempt(start, plan):
    worker = start("""
if resume:
    raise MemoryError("too large")
recipe.run_dir.mkdir()
(recipe.run_dir / "log.jsonl").touch()
print("Error: of before", flush=True)
raise SystemExit(2)""")
    assert worker.reason(ended(worker)) == "of before (exit code 2)"
    begin(worker, plan, 0)
    assert worker.reason(ended(worker)) == "MemoryError: too large (exit code 1)"


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        ("step 1\nError: mine: 2 problems\n  a: wrong\n", 2, "mine: 2 problems a: wrong (exit code 2)"),
        ("", 3, "no message (exit code 3)"),
        ("", 0, "the process ended without a result"),
        ("", -9, "killed by SIGKILL (out of memory?)"),
        ("", -15, "killed by SIGTERM"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, log, code, reason):
    worker = Worker(_train, threads=1)
    worker.log = tmp_path / "log"
    worker.log.write_text(log)
    assert worker.reason(code) == reason


@pytest.mark.timeout(60)
def test_a_run_ends_with_the_sweep_that_began_it(plan):
    code = f"""
import os, time
from test_worker import Worker, begin, functools, _train
from tokmask_peft.study.plan import make_plan
if __name__ == "__main__":
    plan = make_plan("quickstart", ["output_dir={plan.base.output_dir}"], p="0", seeds="1,", name="mine")
    worker = Worker(functools.partial(_train, "import os, time; print(os.getpid()); time.sleep(120)"), 1)
    begin(worker, plan, 0)
    while not worker.log.read_text():  # which is the process id
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    process = int((plan.folder / "logs" / "p0-seed1.log").read_text())
    while Path(f"/proc/{process}/exe").exists():  # the timeout of the test is the bound
        time.sleep(0.01)


def test_stopping_asks_first_and_then_insists(start):
    code = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('asked'))\n"
    worker = start(code + "print('ready')\nwhile True: time.sleep(0.01)")
    for word in ("ready", "asked"):
        while word not in worker.log.read_text():
            assert worker.poll() is None
        worker.stop()
    assert ended(worker) == -9


def test_evaluations_are_read_once(tmp_path):
    worker = Worker(_train, threads=1)
    worker.run, worker._read = RunFolder(tmp_path), 0
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_f1_macro": 0.25}]
    worker.run.log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval_')
    assert list(worker.new_evaluations()) == [(2, 0.25)]
    assert list(worker.new_evaluations()) == []
    assert worker.progress() == "step 2"

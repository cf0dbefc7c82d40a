"""A worker's process: one run after the other, its end, its reason, and no state that a run leaves to the next."""

import json
import os
import sys

import pytest

from tokmask_peft.study.plan import make_plan
from tokmask_peft.study.worker import Worker

TASKS = "from tokmask_peft.study.worker import tasks\nfor task in tasks():\n    "


@pytest.fixture
def plan(tmp_path):
    return make_plan("quickstart", [f"output_dir={tmp_path}"], p="0,0.1", seeds="1,", name="mine")


@pytest.fixture
def start(plan):
    """Return a function that runs Python code as the worker of the first cell."""
    workers = []

    def run(code):
        worker = Worker([sys.executable, "-c", code], threads=1)
        workers.append(worker)
        begin(worker, plan, 0)
        return worker

    yield run
    for worker in workers:
        worker.end()


def begin(worker, plan, number):
    worker.begin(plan.recipe_of(plan.cells[number]))


def ended(worker):
    while (code := worker.poll()) is None:
        pass
    return code


def test_one_process_runs_one_cell_after_the_other(start, plan):
    worker = start(TASKS + "print(task['recipe']['name'], task['resume'], flush=True); import os; print(os.getpid())")
    assert ended(worker) == 0
    first = worker.log.read_text().split()
    begin(worker, plan, 1)
    assert ended(worker) == 0
    second = worker.log.read_text().split()
    assert (first[:2], second[:2]) == (["p0-seed1", "False"], ["p0.1-seed1", "False"])
    assert first[2] == second[2]


def test_after_a_failure_the_next_cell_gets_a_new_process(start, plan):
    worker = start(TASKS + "print(task['recipe']['name']); import os; os._exit(0 if 'p0.1' in str(task) else 3)")
    assert ended(worker) == 3
    begin(worker, plan, 1)
    assert ended(worker) == 0


def test_a_folder_that_holds_something_is_resumed(start, plan):
    folder = plan.folder / "p0-seed1"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").touch()
    worker = start(TASKS + "print(task['resume'])")
    assert ended(worker) == 0
    assert worker.log.read_text() == "True\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('Error: mine: 2 problems'); print('  a: wrong'); exit(2)", "mine: 2 problems a: wrong (exit code 2)"),
        ("raise MemoryError('too large')", "MemoryError: too large (exit code 1)"),
        ("exit(3)", "no message (exit code 3)"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        ("import os; os.kill(os.getpid(), 15)", "killed by SIGTERM"),
    ],
)
def test_the_reason_of_a_failure(start, code, reason):
    worker = start(TASKS + code)
    status = ended(worker)
    assert worker.reason(status) == reason


def test_a_process_that_does_not_start_has_a_reason(start):
    worker = start("import no_such_module")
    assert "No module named 'no_such_module'" in worker.reason(ended(worker))


def test_a_run_ends_with_the_sweep_that_began_it(start):
    worker = start(TASKS + "import time; time.sleep(120)")
    worker._process.stdin.close()  # the system closes the pipe of a killed process
    assert ended(worker) == 130


def test_ctrl_c_at_the_terminal_does_not_reach_it(start):
    worker = start(TASKS + "import os; print(os.getsid(0))")
    ended(worker)
    assert int(worker.log.read_text()) != os.getsid(0)


def test_stopping_asks_first_and_then_insists(start):
    code = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))\n"
    worker = start(TASKS + code + "    print('ready', flush=True)\n    while True: time.sleep(0.01)")
    while "ready" not in worker.log.read_text():
        assert worker.poll() is None
    worker.stop()
    while "asked" not in worker.log.read_text():
        assert worker.poll() is None
    worker.stop()
    assert ended(worker) == -9


def test_evaluations_are_read_once(start):
    worker = start(TASKS + "pass")
    ended(worker)
    worker.run.root.mkdir(parents=True)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_f1_macro": 0.25}]
    worker.run.log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "eval_')
    assert list(worker.new_evaluations()) == [(2, 0.25)]
    assert list(worker.new_evaluations()) == []
    assert worker.progress() == "step 2"

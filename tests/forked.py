"""Processes that start in no time: forked from one that has the libraries imported already, which takes seconds.

Each is a process of its own (working directory, environment, signals, exit code), but for what libraries read from the
environment as they are imported. Tests of that, of the Hub's address say, start an interpreter.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
ROOMS = ["tokmask_peft.training.train", "tokmask_peft.inference.classifier", "tokmask_peft.report.page"]
FORKS.set_forkserver_preload([*ROOMS, "sklearn.linear_model"])


@dataclass(frozen=True)
class Finished:
    """What a process left."""

    returncode: int
    stdout: str
    stderr: str


def command(arguments, cwd, env, out, err):
    """Start `python -m tokmask_peft` with these arguments; `out` and `err` are the files that it writes to."""
    places = (str(cwd), dict(env), str(out), str(err))
    process = FORKS.Process(target=_module, args=("tokmask_peft", [str(part) for part in arguments], *places))
    process.start()
    return process


def ended(process, out, err, timeout) -> Finished:
    """Wait for a process and return what it left; one that takes longer than `timeout` seconds is killed."""
    process.join(timeout)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    said = [Path(file).read_text(encoding="utf-8") for file in (out, err)]
    assert not late, f"not done after {timeout} s: {said[1][-2000:]}"
    return Finished(process.exitcode, *said)


def _module(name, arguments, cwd, env, out, err):
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # the end of a forked process leaves these out

"""Processes that start in no time: forked from one that has the libraries imported already, which takes seconds.

Each is a process of its own: working directory, environment, signals, exit code. Of what libraries read from the
environment as they are imported it has what concerns the Hub.
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
ROOMS = ["tokmask_peft.training.train", "tokmask_peft.inference.classifier", "tokmask_peft.report.page"]
FORKS.set_forkserver_preload([*ROOMS, "sklearn.linear_model", "optuna"])


@dataclass(frozen=True)
class Finished:
    """What a process left."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Python:
    """`python` with arguments, forked; `folder` takes what it writes on stdout and stderr."""

    process: multiprocessing.Process
    folder: Path

    @classmethod
    def start(cls, arguments, cwd, environment, folder):
        """Start with `-m MODULE`, `-c CODE` or a file, and further arguments."""
        places = (str(cwd), dict(environment), str(folder))
        process = FORKS.Process(target=_run, args=([str(part) for part in arguments], *places))
        process.start()
        return cls(process, Path(folder))

    def end(self, timeout=280) -> Finished:
        """Wait for the end and return what is left; one that takes longer than `timeout` seconds is killed."""
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        said = [(self.folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        assert not late, f"not done after {timeout} s: {said[1][-2000:]}"
        return Finished(self.process.exitcode, *said)


def two(function, *given):
    """Call a function with rank 0 and 1, and what is given, in two processes."""
    from torch.multiprocessing import start_processes

    start_processes(function, given, nprocs=2, start_method="forkserver")


def _run(arguments, cwd, environment, folder):
    gc.freeze()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if the tests run under nohup
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            importlib.reload(sys.modules[name])
    if "huggingface_hub.hf_api" in sys.modules:
        hub = sys.modules["huggingface_hub.hf_api"]
        hub.api.endpoint = hub.constants.ENDPOINT
    kind, *rest = arguments
    sys.argv = arguments if kind not in ("-m", "-c") else rest
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # the end of a forked process leaves these out

"""What only a GPU can show, in parts, each in a process of its own with a time limit.

    bash benchmarks/gpu/measure.sh                 all parts, 9 minutes at most (LIMIT=seconds)
    bash benchmarks/gpu/measure.sh attention cli   some of them
    DRY=1 bash benchmarks/gpu/measure.sh           on a CPU with tiny layers: tries the code; its figures mean nothing

`make gpu-pack` fills `.gpu` for a machine without a network; there it is `bash .gpu/measure.sh`. Results go to
`$OUT/results.json` after every step of every part, so that a part that is cut off loses nothing; output to
`$OUT/log.txt`. Reads TOKMASK_TOKENIZERS (configs and tokenizers), TOKMASK_DATA if set (real tweets; otherwise the
built-in corpus), and MINILM (a folder with that model).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

OUT = Path(os.environ.get("OUT", "gpu-out"))
WORK = Path(os.environ.get("GPU_WORK", str(Path(tempfile.gettempdir()) / "gpu-work")))
DRY = os.environ.get("DRY") == "1"
SLOWER = 10 if DRY else 1
LIMIT = float(os.environ.get("LIMIT", "525")) * SLOWER
START = float(os.environ.setdefault("GPU_START", str(time.time())))
PARTS = {  # name: seconds at most, the most valuable first
    "env": 60, "attention": 60, "parity": 75, "tests": 150, "cli": 170, "stock": 110, "memory_cap": 70,
    "minilm": 60, "bench": 170, "compile": 70, "bench7b": 150,
}  # fmt: skip
USE_BACKBONES = ("cli", "stock", "memory_cap")
FULL_SDPA = ("stock", "bench", "bench7b")
"""Parts that time; the others choose among attention kernels as RTX 30 and 40 cards do."""


class Driver:
    """Runs parts one after the other and joins their records."""

    def __init__(self, log: TextIO) -> None:
        self.log, self.status = log, {}

    def left(self) -> float:
        """Return the seconds that are left."""
        return LIMIT - (time.time() - START)

    def run(self, parts: list[str]) -> None:
        """Run parts; the backbones are made while the first ones use the card."""
        preparing = self._launch("prepare") if {*parts} & {*USE_BACKBONES} else None
        for part in parts:
            if part in USE_BACKBONES and preparing is not None:
                self._finish(preparing, "prepare", 120.0 * SLOWER)
                preparing = None
            seconds = min(PARTS[part] * SLOWER, self.left() - 8)
            if seconds < 12:
                self.status[part] = "no time left"
                continue
            print(f"== {part} ({seconds:.0f} s at most, {self.left():.0f} left)", file=self.log)
            self._finish(self._launch(part), part, seconds)
        self._join()
        print(json.dumps(self.status, indent=1))

    def _launch(self, part: str) -> subprocess.Popen[bytes]:
        laptop = {} if part in FULL_SDPA else {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
        command = [sys.executable, __file__, "--part", part]
        environment = {**os.environ, **laptop}
        output = {"stdout": self.log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, start_new_session=True, **output)

    def _finish(self, process: subprocess.Popen[bytes], part: str, seconds: float) -> None:
        start, seconds = time.time(), max(min(seconds, self.left()), 1)
        while process.poll() is None and time.time() - start < seconds:
            time.sleep(0.5)
            self._join()
        self.status[part] = f"exit {process.returncode}, {time.time() - start:.0f} s"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.status[part] = f"cut off after {seconds:.0f} s"
        self._join()

    def _join(self) -> None:
        content = {"status": self.status, "wall": round(time.time() - START, 1), "dry": DRY}
        for part in ("prepare", *PARTS):
            path = WORK / f"{part}.json"
            if path.is_file():
                try:
                    content[part] = json.loads(path.read_text())
                except ValueError:
                    content[part] = {"error": "half-written"}
        partial = OUT / "results.tmp"
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(OUT / "results.json")


def run_part(name: str) -> None:
    """Run one part in this process."""
    if name != "tests":
        from tokmask_peft.console import quiet_libraries

        quiet_libraries()
    import checks
    import steps
    import trainings

    parts = {**checks.PARTS, **trainings.PARTS, **steps.PARTS}
    parts[name]()


if __name__ == "__main__":
    if "--part" in sys.argv:
        run_part(sys.argv[sys.argv.index("--part") + 1])
    else:
        OUT.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        with (OUT / "log.txt").open("a", buffering=1) as log:
            Driver(log).run([name for name in sys.argv[1:] if name in PARTS] or list(PARTS))

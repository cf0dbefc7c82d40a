"""What only a GPU can show, in parts, each in a process of its own with a time limit.

    bash benchmarks/gpu/measure.sh                 all parts, 9 minutes at most (LIMIT=seconds)
    bash benchmarks/gpu/measure.sh attention cli   some of them
    DRY=1 bash benchmarks/gpu/measure.sh           on a CPU with tiny layers: tries the code; its figures mean nothing

`make gpu-pack` fills `.gpu` for a machine without a network; there it is `bash .gpu/measure.sh`. A part writes its
results to `$OUT/PART.json` after every step, so that one that is cut off loses nothing; when it has ended they move to
`$OUT/results.json`, since few files may come back from such a machine. Output goes to `$OUT/log.txt`. The `status` in
`results.json` names the parts that were cut off or had no time left: name those in a second call.
Reads TOKMASK_TOKENIZERS (configs and tokenizers), TOKMASK_DATA if set (real tweets; otherwise the built-in corpus), and
MINILM and E5 (folders with MiniLM and multilingual-e5-small, for real scores; ARM is a key of the masked runs).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

OUT = Path(os.environ.get("OUT", "gpu-out"))
SLOWER = 10 if os.environ.get("DRY") == "1" else 1
END = float(os.environ.get("GPU_START", time.time())) + float(os.environ.get("LIMIT", "525")) * SLOWER
PARTS = {  # name: seconds at most, the most valuable first
    "env": 60, "attention": 60, "parity": 75, "tests": 150, "compile": 70, "cli": 190, "stock": 130,
    "memory_cap": 80, "bench": 170, "bench7b": 150, "minilm": 60, "scores": 180,
}  # fmt: skip
USE_BACKBONES = {"cli", "stock", "memory_cap"}
FULL_SDPA = {"stock", "bench", "bench7b"}
"""Parts that time; the others choose among attention kernels as RTX 30 and 40 cards do."""


def launch(part: str) -> subprocess.Popen[bytes]:
    """Start a part."""
    laptop = {} if part in FULL_SDPA else {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    with (OUT / "log.txt").open("a") as log:
        command = [sys.executable, __file__, "--part", part]
        environment = {**os.environ, **laptop}
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for a part, end it if it takes longer, and return what became of it."""
    start, seconds = time.time(), max(min(seconds, END - time.time()), 1)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"cut off after {seconds:.0f} s"
    return f"exit {process.returncode}, {time.time() - start:.0f} s"


def run(parts: Sequence[str]) -> None:
    """Run parts one after the other; the backbones are made while the first ones use the card."""
    preparing = launch("prepare") if {*parts} & USE_BACKBONES else None
    for part in parts:
        if part in USE_BACKBONES and preparing is not None:
            collect("prepare", finish(preparing, 120.0 * SLOWER))
            preparing = None
        seconds = min(PARTS[part] * SLOWER, END - time.time() - 8)
        collect(part, finish(launch(part), seconds) if seconds >= 12 else "no time left")
    print(json.dumps(json.loads((OUT / "results.json").read_text())["status"], indent=1))


def collect(part: str, status: str) -> None:
    """Move the results of a part to the file of all parts, with what became of it."""
    file, whole = OUT / f"{part}.json", OUT / "results.json"
    found = json.loads(whole.read_text()) if whole.is_file() else {"status": {}}
    if file.is_file():
        found[part] = json.loads(file.read_text())
    elif part in found:  # an earlier call measured it
        status = f"{found['status'][part].partition(' before; then ')[0]} before; then {status}"
    found["status"][part] = status
    partial = whole.with_suffix(".tmp")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(whole)
    for rest in (file, file.with_suffix(".tmp")):
        rest.unlink(missing_ok=True)


def run_part(name: str) -> None:
    """Run one part in this process."""
    if name != "tests":
        from tokmask_peft.console import quiet_libraries

        quiet_libraries()
    import checks
    import steps
    import trainings

    print(f"== {name}", flush=True)
    {**checks.PARTS, **trainings.PARTS, **steps.PARTS}[name]()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        run_part(sys.argv[2])
    else:
        if unknown := [name for name in sys.argv[1:] if name not in PARTS]:
            sys.exit(f"There is no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
        OUT.mkdir(parents=True, exist_ok=True)
        run(sys.argv[1:] or list(PARTS))

"""The GPU benchmark's code on a CPU, with tiny layers: everything but the device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def test_the_smoke_run_prints_every_way_and_writes_nothing():
    if not os.environ.get("TOKMASK_TOKENIZERS"):
        pytest.skip("TOKMASK_TOKENIZERS is not set")
    pytest.importorskip("bitsandbytes")
    written = SCRIPT.parent / "results" / "gpu.json"
    before = written.read_bytes() if written.is_file() else None
    done = run("--device", "cpu", "--smoke", "--only", "TinyLlama-1.1B")
    assert done.returncode == 0, done.stderr[-3000:]
    for way in ("padded", "grouped, checkpointed", "padding_free", "padding_free, offload"):
        assert f"2 layers: {way}: estimate to peak" in done.stdout
    for way in ("padded, checkpointed", "padded to 128, checkpointed"):
        assert f"padding_free to PEFT's preparation, {way}: speed" in done.stdout
    assert (written.read_bytes() if written.is_file() else None) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so():
    done = run()
    assert done.returncode == 2
    assert "there is no CUDA GPU here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_fit_leaves_its_ways_out(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    measured, missing = gpu.Way("padded", rates=[1.0]), gpu.Way("grouped")
    with gpu.left_out([measured, missing]):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert (measured.ran_out, missing.ran_out) == (False, True)
    with pytest.raises(ValueError, match="else"), gpu.left_out([measured]):
        raise ValueError("else")

"""Ctrl-C leaves a run that goes on as if nothing had happened."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokmask_peft.artifacts import RunFolder

SLOW = "training.epochs=6"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_uninterrupted(write_recipe, tokmask, begin, tmp_path, number):
    recipe = write_recipe()
    whole, broken = RunFolder(tmp_path / "runs" / "whole"), RunFolder(tmp_path / "runs" / "broken")
    tokmask("train", recipe, SLOW, "name=whole", "--quiet")

    process, end = begin("train", recipe, SLOW, "name=broken")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if broken.log.is_file() and len(broken.log.read_text().splitlines()) >= 20:  # within the second epoch
            os.kill(process.pid, number)
            break
        time.sleep(0.005)
    done = end()
    text = done.stdout + done.stderr
    assert done.returncode == 130, text
    assert "Traceback" not in text
    assert "--resume" in text
    assert not broken.finished()
    scored = [line["step"] for line in map(json.loads, broken.log.read_text().splitlines()) if "eval_loss" in line]
    assert all(step % 12 == 0 for step in scored), "a broken-off epoch was scored"
    stopped_at = int(broken.last_checkpoint().name.removeprefix("checkpoint-"))
    assert 0 < stopped_at < 72
    assert f"stopped at step {stopped_at} of 72" in text, "the checkpoint of the stop is not the one that is kept"

    refused = tokmask("train", recipe, SLOW, "name=broken", check=False)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    other = tokmask("train", recipe, SLOW, "name=broken", "masking.p=0.2", "--resume", check=False)
    assert other.returncode == 2
    assert "masking.p: 0.1 before, 0.2 now" in other.stderr

    weights = broken.last_checkpoint() / "adapter_model.safetensors"
    whole_file, half = weights.read_bytes(), dict(list(load_file(weights).items())[::2])
    save_file(half, weights)
    unfit = tokmask("train", broken.recipe, "--resume", check=False)
    assert unfit.returncode == 2
    assert f"{len(load_file(whole.adapter / weights.name)) - len(half)} missing" in unfit.stderr
    weights.write_bytes(whole_file)

    tokmask("train", broken.recipe, "--resume", "--quiet")
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, broken))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)
    losses = [
        {line["step"]: line["loss"] for line in map(json.loads, run.log.read_text().splitlines()) if "loss" in line}
        for run in (whole, broken)
    ]
    assert list(losses[1]) == list(range(1, 73))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)

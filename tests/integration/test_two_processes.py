"""Two processes train as one does with the same global batch: `torchrun` and `accelerate launch` work unchanged."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tokmask_peft.artifacts import RunFolder
from tokmask_peft.recipe.loading import SHIPPED
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.train import train

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tokmask_peft")
# Nothing random but the batches: each process draws dropout and masks of its own.
EXACT = ("adapter.dropout=0", "masking.p=0", "training.max_steps=6", "training.baseline=false")
SHARDED = ("accelerate.commands.launch", f"--config_file={SHIPPED / '_accelerate/fsdp_qlora.yaml'}")
SHARDED_WORKER = str(Path(__file__).with_name("fsdp_worker.py"))
HEAD = "base_model.model.score.weight"


def launch(launcher, *arguments):
    """Train in two processes of a launcher and return what was printed on stdout and stderr."""
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout, done.stderr


@pytest.fixture
def both(begin):
    """Return a function that starts two processes with the settings that torchrun gives them, and waits for them."""

    def run(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [begin(*arguments, **world, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        return [python.end(timeout=100) for python in ranks]

    return run


def logged(run, key="loss"):
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.parametrize(
    ("launcher", "family", "task", "batching", "head"),
    [
        (TORCHRUN, "bert", "token", "padding_free", "random"),
        (None, "bert", "sequence", "grouped", "probe"),
        (None, "qwen2", "sequence", "padded", "random"),
    ],
)
def test_two_processes_are_one_with_the_same_global_batch(
    write_recipe, both, tmp_path, launcher, family, task, batching, head
):
    recipe = write_recipe(family, task)
    options = [*EXACT, f"training.batching={batching}", f"training.head={head}"]
    if head == "probe":  # of nearly constant features: large steps would magnify what rounding changes in its weights
        options.append("training.learning_rate=1e-6")
    one, two = (RunFolder(tmp_path / "runs" / name) for name in ("one", "two"))
    train(Recipe.load(recipe, [*options, "name=one", "training.batch_size=8"]), quiet=True)
    command = ("train", recipe, *options, "name=two", "training.batch_size=4")
    if launcher:
        said, _ = launch(launcher, *command)
    else:
        ended = both("-m", "tokmask_peft", *command)
        assert [python.returncode for python in ended] == [0, 0], ended[0].stderr + ended[1].stderr
        said = "".join(python.stdout for python in ended)
    assert said.count("Decisions") == 1, "one process prints"
    assert list(logged(two)) == list(range(1, 7))
    assert logged(two) == pytest.approx(logged(one), abs=1e-5)
    assert logged(two, "eval_f1_macro") == pytest.approx(logged(one, "eval_f1_macro"), abs=1e-6)
    expected, found = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
    results = [json.loads(run.result.read_text()) for run in (one, two)]
    for part in ("validation", "test"):
        assert results[1][part]["confusion"] == results[0][part]["confusion"]
    assert results[1].get("probe") == results[0].get("probe")
    assert ("probe" in results[1]) == (head == "probe")


def test_a_signal_to_one_process_stops_all_at_the_same_step(write_recipe, both, tmp_path):
    worker = Path(__file__).with_name("stop_worker.py")
    ended = both(worker, "train", write_recipe(), *EXACT, "training.batch_size=4")
    assert [python.returncode for python in ended] == [130, 130]
    assert any("stopped at step 3 of 6" in python.stderr + python.stdout for python in ended)
    assert RunFolder(tmp_path / "runs" / "tiny").last_checkpoint().name == "checkpoint-3"


def test_sharded_qlora_is_one_process_is_masked_and_leaves_a_whole_adapter(write_recipe, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("SEEN", str(tmp_path))
    recipe = write_recipe("qwen2-wide", "sequence")  # 4-bit blocks are of 64 weights
    options = (*EXACT, "training.max_steps=2", "model.quantization=nf4")
    one, two, masked = (RunFolder(tmp_path / "runs" / name) for name in ("one", "two", "masked"))
    train(Recipe.load(recipe, [*options, "name=one", "training.batch_size=8"]), quiet=True)
    command = ("train", recipe, *options, "training.batch_size=4")
    commands = (*command, "name=two", "then", *command, "name=masked", "masking.p=0.4")
    said, warned = launch(SHARDED, SHARDED_WORKER, *commands)
    assert said.count("Decisions") == 2, "one process prints"
    assert "Excluding from FSDP2 sharding" not in warned, "4-bit weights are sharded, too"
    assert logged(two) == pytest.approx(logged(one), abs=1e-5)
    expected, found = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)

    for rank in (0, 1):  # the maskers' own: patterns differ by them, see test_masking_ranks
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen["sharded"] == [True, True], "two steps, with the embedding in shards"
        share = torch.cat([(ids == seen["mask"]).flatten() for ids in seen["ids"]]).float().mean()
        assert 0.1 < share < 0.6, "0.4 of what may be masked"
    assert list(logged(masked)) == [1, 2]
    assert set(logged(masked, "masking_rate").values()) == {0.4}
    found = load_file(masked.adapter / "adapter_model.safetensors")
    backbone = AutoModelForSequenceClassification.from_pretrained(Recipe.load(recipe).model.backbone, num_labels=2)
    loaded = PeftModel.from_pretrained(backbone, str(masked.adapter))
    torch.testing.assert_close(loaded.base_model.model.score.modules_to_save["default"].weight.detach(), found[HEAD])
    moved = [weight for name, weight in found.items() if "lora_B" in name]
    assert moved
    assert all(weight.abs().sum() > 0 for weight in moved), "born as zeros"
    assert all(weight.isfinite().all() for weight in found.values())

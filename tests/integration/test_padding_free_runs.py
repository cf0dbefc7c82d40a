"""Whole runs on packed batches: what they learn is what padded batches teach."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tokmask_peft import Recipe, evaluate, train


def run(path, name, *overrides):
    common = ["adapter.dropout=0", "training.baseline=false", f"name={name}"]
    return train(Recipe.load(path, [*common, *overrides]), quiet=True)


def losses(done):
    lines = map(json.loads, done.folder.log.read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("bert", "token", ["masking.unit=word"]),
        ("bert", "token", ["data.label_on=mean", "masking.replace=drop", "masking.unit=token"]),
        ("qwen2", "sequence", ["masking.unit=word"]),
    ],
)
def test_packed_and_padded_runs_are_one(write_recipe, family, task, options):
    path = write_recipe(family, task)
    options = (*options, "masking.p=0.3", "training.gradient_accumulation=2")
    padded = run(path, "padded", "training.batching=padded", *options)
    packed = run(path, "packed", "training.batching=padding_free", *options)
    decision = {"what": "batching", "choice": "padding_free", "reason": "a batch is one row, with attention per text"}
    assert decision in packed.result.decisions
    found = losses(packed)
    assert found == pytest.approx(losses(padded), abs=1e-3)
    assert sum(found[-4:]) < sum(found[:4])
    one, two = (load_file(done.folder.adapter / "adapter_model.safetensors") for done in (padded, packed))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-3, rtol=0)
    assert packed.result.test["f1_macro"] == pytest.approx(padded.result.test["f1_macro"], abs=0.03)
    assert evaluate(packed.folder.root)["confusion"] == packed.result.test["confusion"]

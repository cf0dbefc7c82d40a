"""Every way to mask, in runs from recipes: bf16, 4 bits, each kind of batch, and resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tokmask_peft.artifacts import RunFolder
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.train import train

SHORT = ("training.max_steps=5", "training.baseline=false", "masking.p=0.4")
WAYS = {
    "random": ("replace=random", "share=0.6", "per_text=uniform", "unit=continuation"),
    "drop": ("replace=drop", "share=0.6"),
    "gap": ("schedule=gap", "share=0.5", "score_masked=false", "p_start=0.4"),
}

READY = {f"{name}_{label}" for name in ("level", "accuracy") for label in range(2)}


def masks(recipe, monkeypatch, *options):
    """Train, and return the run and which sub-tokens were masked in each training forward."""
    found, count = [], TokenMasker._count

    def noting(self, ids, masked):
        found.append(masked.clone())
        count(self, ids, masked)

    with monkeypatch.context() as patch:
        patch.setattr(TokenMasker, "_count", noting)
        run = train(Recipe.load(recipe, [*SHORT, *options]), quiet=True)
    return run, found


@pytest.mark.parametrize(
    ("way", "family", "task", "batching", "views"),
    [
        ("random", "bert", "token", "padding_free", 1),
        ("random", "qwen2", "sequence", "grouped", 2),
        ("drop", "qwen2", "sequence", "padded", 2),
        ("gap", "qwen2", "token", "padding_free", 1),
    ],
)
def test_precision_changes_no_mask(write_recipe, monkeypatch, way, family, task, batching, views):
    options = [f"masking.{key}" for key in WAYS[way]] + [f"training.batching={batching}", f"training.views={views}"]
    recipe = write_recipe(family, task)
    run, expected = masks(recipe, monkeypatch, *options, "name=fp32")
    low, found = masks(recipe, monkeypatch, *options, "name=nf4", "model.precision=bf16", "model.quantization=nf4")
    fixed = way != "gap"  # the loss moves the rate
    for one, other in zip(expected if fixed else expected[:1], found if fixed else found[:1], strict=True):
        assert torch.equal(one, other)
    assert all(masked.any() for masked in found)
    if views == 2:
        assert not any(masked[: len(masked) // 2].any() for masked in found), "the first view is clean"
    for each in (run, low):
        lines = [json.loads(line) for line in each.folder.log.read_text().splitlines()]
        assert len([line for line in lines if line.get("masking_rate", 0) > 0 and line["loss"] > 0]) == 5
        weights = load_file(each.folder.adapter / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
        assert all(weight.abs().sum() > 0 for name, weight in weights.items() if ".lora_B" in name)


@pytest.mark.parametrize(
    ("task", "options", "logged"),
    [
        ("sequence", ("masking.schedule=overfit", "masking.share=0.5", "masking.target=0.6"), {"accuracy"}),
        ("sequence", ("masking.schedule=ready", "training.views=2", "training.batching=grouped"), READY),
        ("token", ("masking.schedule=gap", "masking.share=0.5", "masking.score_masked=false"), {"clean", "masked"}),
        (
            "token",
            ("masking.replace=drop", "masking.per_text=uniform", "training.views=2", "training.batching=padded"),
            (),
        ),
        ("sequence", ("masking.replace=random", "masking.unit=continuation", "masking.trainable_mask=true"), ()),
    ],
)
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(write_recipe, tmp_path, task, options, logged):
    options = (*options, "masking.p=0.4", "training.epochs=2", "training.baseline=false", "training.logging_steps=5")
    recipe = Recipe.load(write_recipe(task=task), options)
    run = RunFolder(tmp_path / "runs" / "tiny")
    train(recipe, quiet=True)
    files = run.adapter / "adapter_model.safetensors", run.predictions
    expected = [file.read_bytes() for file in files]
    log = [json.loads(line) for line in run.log.read_text().splitlines()]
    run.result.unlink()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-24")
    assert run.last_checkpoint().name == "checkpoint-12"
    train(recipe, resume=True, quiet=True)
    assert [file.read_bytes() for file in files] == expected
    again = [json.loads(line) for line in run.log.read_text().splitlines()]
    names = {f"masking_{name}" for name in ("rate", *logged)}
    ours = [
        [{key: line[key] for key in line if key.startswith("masking_")} for line in lines] for lines in (log, again)
    ]
    assert ours[0] == ours[1]
    assert all(line.keys() == names for line in ours[0] if line)
    assert sum(map(bool, ours[0])) == 5

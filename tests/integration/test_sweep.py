"""A sweep of real runs: train, go on, report."""

import json

import pytest

from tokmask_peft import train
from tokmask_peft.recipe.schema import Recipe

pytest.importorskip("optuna")


@pytest.mark.usefixtures("forked_workers")
def test_sweep_and_report(write_recipe, tokmask, tmp_path):
    recipe = write_recipe()
    command = ["sweep", recipe, "--p", "0,0.3", "--seeds", "1", "training.max_steps=4"]
    said = tokmask(*command).stdout
    folder = tmp_path / "runs" / "tiny-sweep"
    assert "2/2 done" in said
    assert f"Next: tokmask report {folder}" in said
    for p, name in ((0, "p0-seed1"), (0.3, "p0.3-seed1")):
        run = folder / name
        alone = [f"masking.p={p}", "seed=1", f"name=alone-{p}", "training.max_steps=4", "training.baseline=false"]
        trained_here = train(Recipe.load(recipe, alone), quiet=True).folder.root
        # the sweep trained the second in the process of the first
        for file in ("adapter/adapter_model.safetensors", "predictions.json"):
            assert (run / file).read_bytes() == (trained_here / file).read_bytes()
        assert not (run / "checkpoints").exists()
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        result = json.loads((run / "result.json").read_text())
        kept = json.loads((run / "predictions.json").read_text())
        for split, count in (("validation", 32), ("test", 40)):
            gold, predicted = kept[split]["gold"], kept[split]["predicted"]
            assert len(gold) == len(predicted) == count
            right = sum(one == two for one, two in zip(gold, predicted, strict=True))
            assert result[split]["accuracy"] == pytest.approx(right / count)
    assert "baseline" in json.loads((folder / "p0-seed1" / "result.json").read_text())
    assert "baseline" not in json.loads((folder / "p0.3-seed1" / "result.json").read_text())

    again = tokmask(*command).stdout
    assert "started" not in again
    assert "2/2 done" in again

    before = (folder / "sweep.json").read_text()
    refused = tokmask(*command[:-1], "training.max_steps=5", code=2)
    assert "training.max_steps: 4 before, 5 now" in refused.stderr
    assert (folder / "sweep.json").read_text() == before

    said = tokmask("report", folder).stdout
    assert "Macro-F1, differences from p = 0, seed by seed" in said
    assert all((folder / "report" / name).is_file() for name in ("f1_against_p.png", "report.html"))
    found = json.loads((folder / "report" / "statistics.json").read_text())
    assert found["rows"][1]["difference"]["bootstrap_problem"] is None

import json

import numpy as np
import pytest

from tokmask_peft.spans import find_scheme
from tokmask_peft.study.plan import make_plan
from tokmask_peft.training.metrics import Predictions, entity_scores, scores

LABELS = ("a", "b", "c")


@pytest.fixture
def plan(tmp_path):
    """A sweep of two cells."""
    return make_plan("quickstart", [f"output_dir={tmp_path}"], p="0,0.1", seeds="1,", name="mine")


@pytest.fixture
def made_up_sweep(tmp_path):
    """Return a function that writes a sweep whose runs are drawn: an arm's accuracy is 0.6 plus its `gains`."""

    def make(gains=None, seeds="4", texts=120, leave_out=(), sampler="grid", name="made-up", labels=LABELS, **axes):
        plan = make_plan("trec/minilm", [f"output_dir={tmp_path}"], seeds=seeds, name=name, sampler=sampler, **axes)
        plan.folder.mkdir()
        plan.write()
        gold = np.random.default_rng(0).integers(0, len(labels), texts)
        for cell in plan.cells:
            label = cell.arm.label if cell.arm else cell.name
            if cell.name in leave_out:
                continue
            random = np.random.default_rng([cell.seed, sum(map(ord, label))])
            right = random.random(texts) < 0.6 + (gains or {}).get(label, 0.0) + random.normal(0, 0.01)
            predicted = np.where(right, gold, (gold + 1) % len(labels))
            found = scores(gold, predicted, labels)
            if find_scheme(labels, ())[0] != "none":
                found |= entity_scores(Predictions(list(gold[:, None]), list(predicted[:, None])), labels)
            folder = plan.folder / cell.name
            folder.mkdir()
            rows = {"gold": [[int(i)] for i in gold], "predicted": [[int(i)] for i in predicted]}
            content = {"labels": list(labels), "validation": rows, "test": rows}
            (folder / "predictions.json").write_text(json.dumps(content))
            speed = {"step_seconds": 2.0 if "neftune" in label else 1.0, "steps": 10}
            speed["environment"] = {"versions": {"torch": "2"}}
            result = {"labels": list(labels), "validation": found, "test": found, "speed": speed, "baseline": None}
            (folder / "result.json").write_text(json.dumps(result))
        return plan.folder

    return make

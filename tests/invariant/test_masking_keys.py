"""Every way to mask gives the same gradients in packed and in padded batches, and agrees between two processes."""

import os

import forked
import pytest
import torch
from test_views import assert_close, one_step

from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.training.losses import ClassificationLoss

KEYS = {
    "random": {"replace": "random"},
    "share": {"share": 0.5},
    "uniform": {"per_text": "uniform"},
    "continuation": {"unit": "continuation", "p": 0.8},
    "span": {"unit": "span", "replace": "random", "share": 0.7},
    "unscored": {"score_masked": False, "share": 0.6, "per_text": "uniform"},
    "drop": {"replace": "drop", "unit": "word", "share": 0.7},
    "overfit": {"schedule": "overfit", "share": 0.5, "p_start": 0.4},
    "gap": {"schedule": "gap", "share": 0.5, "p_start": 0.4, "score_masked": False},
}
CASES = [(name, task) for name in KEYS for task in ("sequence", "token")] + [("ready", "sequence")]


def config(name):
    return TokenMaskConfig(**{"p": 0.4, **KEYS.get(name, {"schedule": name})})


def masking(trainer):
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, TokenMaskCallback))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_packed_is_padded(name, task, tmp_path, monkeypatch):
    masked, count = [], TokenMasker._count

    def noting(self, ids, found):
        masked.append(int(found.sum()))
        count(self, ids, found)

    monkeypatch.setattr(TokenMasker, "_count", noting)
    packed, one, _ = one_step(tmp_path, task, config=config(name), views=1)
    padded, two, _ = one_step(tmp_path, task, config=config(name), views=1, packed=False)
    assert masked[0] == masked[1] > 5
    assert_close(packed, padded)
    states = [masking(trainer).schedule.state_dict() for trainer in (one, two)]
    assert states[0] == pytest.approx(states[1], abs=1e-5)
    if name in ("overfit", "gap", "ready"):
        assert len(states[0]) > 2, "it took no answers in"


TOGETHER = [
    ("token", {"score_masked": False, "schedule": "gap", "share": 0.5, "p_start": 0.4}, {"views": 1}),
    ("token", {"replace": "drop", "per_text": "uniform"}, {"views": 2}),
    ("sequence", {"schedule": "ready", "replace": "random"}, {"views": 2, "views_masked": "both"}),
]


def worker(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    found, asked, call = [], [], ClassificationLoss.__call__

    def noting(self, outputs, labels, num_items_in_batch=None):
        asked.append((int((labels != -100).sum()), int(num_items_in_batch)))
        return call(self, outputs, labels, num_items_in_batch)

    ClassificationLoss.__call__ = noting
    for number, (task, keys, views) in enumerate(TOGETHER):
        settings = {"config": TokenMaskConfig(**{"p": 0.4, **keys}), **views}
        gradients, trainer, seen = one_step(f"{folder}/{number}", task, accumulation=2, **settings)
        state = masking(trainer).schedule.state_dict()
        found.append({"gradients": gradients, "state": state, "seen": seen, "asked": list(asked)})
        asked.clear()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def test_two_processes_share_gradients_rates_and_the_number_of_scored_items(tmp_path):
    forked.two(worker, str(tmp_path), 29500 + os.getpid() % 2000)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for (task, keys, _), one, two in zip(TOGETHER, *ranks, strict=True):
        assert_close(one["gradients"], two["gradients"])
        assert one["state"] == two["state"]
        assert not all(torch.equal(*pair) for pair in zip(one["seen"], two["seen"], strict=True))
        scored = sum(count for found in (one, two) for count, _ in found["asked"])
        assert {items for found in (one, two) for _, items in found["asked"]} == {scored}
        if task == "sequence":
            assert sum(name.startswith("level") for name in one["state"]) == 3
        if "schedule" in keys:
            assert len(one["state"]) > 2, "the answers of both"

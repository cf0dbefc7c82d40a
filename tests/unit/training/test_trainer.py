import pytest
import torch
from tiny_models import tiny_tokenizer

from tokmask_peft.errors import RecipeError
from tokmask_peft.training.trainer import check_trackers, collator


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_batches_have_few_shapes_and_ignored_padding(task):
    tokenizer = tiny_tokenizer("wordpiece")
    rows = [{"input_ids": [5] * n, "labels": [1] * n if task == "token" else 1} for n in (3, 9, 13)]
    batch = collator(tokenizer, task)(rows)
    assert batch["input_ids"].shape == (3, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9, 13]
    if task == "token":
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [3, 9, 13]
    assert torch.equal(batch["input_ids"] == tokenizer.pad_token_id, batch["attention_mask"] == 0)


def test_unknown_and_missing_trackers_are_told_apart():
    check_trackers(())
    with pytest.raises(RecipeError, match=r"there is no tracker 'tensorbord'.*Did you mean 'tensorboard'"):
        check_trackers(("tensorbord",))
    with pytest.raises(RecipeError, match=r"'comet_ml' is not installed \(pip install comet_ml\)"):
        check_trackers(("comet_ml",))

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, tiny_tokenizer
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from tokmask_peft.data.batches import TokenBudgetSampler
from tokmask_peft.errors import RecipeError
from tokmask_peft.model.decisions import DTYPES
from tokmask_peft.model.layers import QuickDropout
from tokmask_peft.recipe.schema import Recipe, TrainingConfig
from tokmask_peft.tasks import get_task
from tokmask_peft.training.environment import tokens_per_step
from tokmask_peft.training.trainer import OrderedEvalTrainer, check_trackers, training_arguments


def test_batches_have_few_shapes_and_ignored_padding():
    tokenizer = tiny_tokenizer("wordpiece")
    rows = [{"input_ids": [5] * n, "labels": [1] * n} for n in (3, 9, 13)]
    batch = get_task("token").collator(tokenizer)(rows)
    assert batch["input_ids"].shape == (3, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9, 13]
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [3, 9, 13]
    assert torch.equal(batch["input_ids"] == tokenizer.pad_token_id, batch["attention_mask"] == 0)


def test_unknown_and_missing_trackers_are_reported():
    check_trackers(())
    with pytest.raises(RecipeError, match=r"Did you mean 'tensorboard'.*\n.*pip install comet_ml") as caught:
        check_trackers(("tensorbord", "comet_ml"))
    assert (caught.value.code, caught.value.fields["trackers"]) == ("no-tracker", ["tensorbord", "comet_ml"])


class AsTrained(TrainerCallback):
    """Notes at each step whether the adapters would cast what enters them, and whether dropout is the quick one."""

    def __init__(self):
        self.casts, self.dropout = set(), set()

    def on_step_end(self, args, state, control, model, **kwargs):
        self.casts |= {module.cast_input_dtype_enabled for module in model.modules() if hasattr(module, "lora_A")}
        self.dropout |= dropout_of(model)


def dropout_of(model):
    return {type(module) is QuickDropout for module in model.modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("low", ["bf16", "fp16", None])
def test_forwards_are_changed_for_as_long_as_they_train(low, tmp_path):
    model, _ = build("bert")
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    precision = {low: True} if low else {}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", **precision)
    rows = [{"input_ids": [5, 6, 7], "labels": 1}] * 2
    seen = AsTrained()
    collate = get_task("sequence").collator(tiny_tokenizer("wordpiece"))
    OrderedEvalTrainer(model, arguments, collate, train_dataset=rows, callbacks=[seen]).train()
    assert seen.casts == {low is None}
    assert seen.dropout == {True}
    assert all(module.cast_input_dtype_enabled for module in model.modules() if hasattr(module, "lora_A"))
    assert dropout_of(model) == {False}


LENGTHS = [8] * 62  # so that a budget of 32 makes batches of 4 texts, and one of 2


@pytest.mark.parametrize(("processes", "accumulation", "steps"), [(1, 3, 6), (4, 1, 4), (1, 1, 16)])
def test_the_sub_tokens_of_a_step_are_those_of_an_epoch_over_its_steps(processes, accumulation, steps):
    common = {"gradient_accumulation": accumulation, "batching": "padded"}
    sized = tokens_per_step(TrainingConfig(batch_size=4, **common), LENGTHS, None, processes)
    batches = len(TokenBudgetSampler(LENGTHS, 32, "padded", 0, 0, processes))
    budgeted = tokens_per_step(TrainingConfig(tokens_per_batch=32, **common), LENGTHS, batches, processes)
    assert sized == budgeted == 62 * 8 / steps


def test_a_loss_that_is_not_a_number_is_logged_as_it_is(tmp_path):
    recipe = Recipe.load("quickstart", ["training.report_to=[]", "training.max_steps=2", "training.logging_steps=1"])
    arguments = training_arguments(recipe, tmp_path, torch.device("cpu"), torch.float32)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.load_best_model_at_end = False
    losses = iter([0.5, float("nan")])
    trainer = OrderedEvalTrainer(
        build("bert")[0], arguments, get_task("sequence").collator(tiny_tokenizer("wordpiece")),
        train_dataset=[{"input_ids": [5, 6, 7], "labels": 1}] * 2,
        compute_loss_func=lambda outputs, *_, **__: outputs.logits.sum() * 0 + next(losses),
    )  # fmt: skip
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert (first, math.isnan(second)) == (0.5, True)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_trainer_scales_the_loss_in_fp16(precision, tmp_path):
    recipe = Recipe.load("quickstart", ["training.report_to=[]"])
    found = training_arguments(recipe, tmp_path, torch.device("cpu"), DTYPES[precision])
    assert (found.bf16, found.fp16) == (precision == "bf16", precision == "fp16")

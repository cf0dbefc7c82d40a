"""What the message offers where memory runs out: what the recipe may be changed to, and what saves memory."""

import pytest
import torch

from tokmask_peft.errors import RunError
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.memory import evaluation_memory_errors, explained_memory_errors


def make_recipe(**sections):
    sections["model"] = {"backbone": "any", **sections.get("model", {})}
    sections["data"] = {"task": "sequence", "path": "any", **sections.get("data", {})}
    return Recipe.model_validate({"name": "x", **sections})


def told(recipe, movable=True, **options):
    with pytest.raises(RunError) as caught, explained_memory_errors(recipe, movable, **options):
        raise MemoryError
    return str(caught.value)


def test_a_smaller_budget_makes_the_same_optimizer_step():
    recipe = make_recipe(training={"tokens_per_batch": 1024, "gradient_accumulation": 3})
    assert "training.tokens_per_batch=512 training.gradient_accumulation=6;" in told(recipe)


@pytest.mark.parametrize("evaluating", [True, False])
def test_a_trained_mask_row_may_be_given_up(evaluating):
    with_row = make_recipe(masking={"trainable_mask": True}, training={"batch_size": 1, "eval_batch_size": 1})
    assert "masking.trainable_mask=false" in told(with_row, evaluating=evaluating)
    assert "trainable_mask" not in told(make_recipe(), evaluating=evaluating)


@pytest.mark.parametrize("options", [{}, {"evaluating": True}, {"loading": True}])
@pytest.mark.parametrize(("held", "offered"), [("none", True), ("int8", True), ("nf4", False), ("auto", False)])
def test_nf4_is_offered_to_whatever_takes_more(held, offered, options):
    message = told(make_recipe(model={"quantization": held}), **options)
    assert ("model.quantization=nf4" in message) is offered


def test_checkpointing_is_offered_only_where_the_backbone_can_do_it():
    assert "model.gradient_checkpointing=true" in told(make_recipe())
    assert "gradient_checkpointing" not in told(make_recipe(), checkpointable=False)


def test_fewer_layers_come_with_their_price():
    assert "adapter.layers=0.5 (may cost score);" in told(make_recipe())


def test_fewer_texts_do_not_help_where_the_backbone_is_loaded():
    message = told(make_recipe(), loading=True)
    assert "batch" not in message
    assert "model.embedding=offload" in message
    assert "model.embedding" not in told(make_recipe(), movable=False, loading=True)


@pytest.mark.parametrize(("texts", "offered"), [(128, "--batch-size 32 (batch_size=32);"), (1, None), (None, None)])
def test_an_evaluation_of_a_run_is_told_what_its_command_takes(texts, offered):
    def said(device):
        with pytest.raises(RunError) as caught, evaluation_memory_errors(torch.device(device), texts):
            raise MemoryError
        return str(caught.value)

    assert offered in said("cuda") if offered else "batch" not in said("cuda")
    assert "CUDA_VISIBLE_DEVICES= before the command" in said("cuda")
    assert "CUDA" not in said("cpu")

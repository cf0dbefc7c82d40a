"""The sub-tokens that an optimizer step takes, by which a run's speed is told."""

import pytest

from tokmask_peft.data.batches import TokenBudgetSampler
from tokmask_peft.recipe.schema import TrainingConfig
from tokmask_peft.training.memory import tokens_per_step

LENGTHS = [8] * 64  # so that a budget of 32 makes batches of 4 texts


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_budget_and_a_batch_size_count_the_texts_of_all_processes(processes, accumulation):
    common = {"gradient_accumulation": accumulation, "batching": "padded"}
    sized = tokens_per_step(TrainingConfig(batch_size=4, **common), LENGTHS, None, processes)
    batches = len(TokenBudgetSampler(LENGTHS, 32, "padded", 0, 0, processes))
    budgeted = tokens_per_step(TrainingConfig(tokens_per_batch=32, **common), LENGTHS, batches, processes)
    assert sized == budgeted == 4 * 8 * accumulation * processes

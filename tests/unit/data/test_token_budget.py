"""Batches by a budget of sub-tokens."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokmask_peft.data.batches import TokenBudgetSampler
from tokmask_peft.errors import RecipeError

LENGTHS = np.random.default_rng(0).lognormal(2.7, 0.6, 300).clip(3, 64).astype(int).tolist()


def cost(batch, lengths, batching):
    if batching == "padding_free":
        return sum(lengths[text] for text in batch)
    return len(batch) * -(-max(lengths[text] for text in batch) // 8) * 8


@pytest.mark.parametrize("batching", ["padded", "grouped", "padding_free"])
@pytest.mark.parametrize("processes", [1, 3])
def test_every_text_once_within_the_budget_in_as_many_batches(batching, processes):
    samplers = [TokenBudgetSampler(LENGTHS, 256, batching, 7, rank, processes) for rank in range(processes)]
    orders = []
    for epoch in range(12):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        batches = list(chain(*shares))
        assert sorted(chain(*batches)) == list(range(len(LENGTHS)))
        assert max(cost(batch, LENGTHS, batching) for batch in batches) <= 256
        orders.append(batches)
    assert orders[0] != orders[1]


def test_seed_and_epoch_decide():
    one, same, other = (TokenBudgetSampler(LENGTHS, 200, "padded", seed) for seed in (1, 1, 2))
    same.set_epoch(4)
    list(same)
    same.set_epoch(0)
    assert list(one) == list(same) != list(other)


def test_the_budget_is_used():
    packed = TokenBudgetSampler(LENGTHS, 512, "padding_free", 0)
    assert len(packed) <= 1.1 * sum(LENGTHS) / 512 + 1
    padded, grouped = (TokenBudgetSampler(LENGTHS, 512, batching, 0) for batching in ("padded", "grouped"))
    assert len(packed) < len(grouped) < len(padded)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40),
    processes=st.integers(1, 4),
    batching=st.sampled_from(["padded", "grouped", "padding_free"]),
)
def test_any_lengths(lengths, processes, batching):
    samplers = [TokenBudgetSampler(lengths, 32, batching, 0, rank, processes) for rank in range(processes)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    assert set(chain(*chain(*shares))) == set(range(len(lengths)))
    if len(lengths) >= processes * len(samplers[0]):
        assert len(list(chain(*chain(*shares)))) == len(lengths)
    assert all(batch and cost(batch, lengths, batching) <= 32 for batch in chain(*shares))


def test_a_text_that_exceeds_the_budget():
    with pytest.raises(RecipeError, match="longest text takes 64 sub-tokens, more than the 48 of a batch") as caught:
        TokenBudgetSampler([3, 60], 48, "padded", 0)
    assert caught.value.code == "budget-too-small"
    TokenBudgetSampler([3, 48], 48, "padding_free", 0)

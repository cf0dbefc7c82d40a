"""Dropout with few random bits: right rates, right means, torch's place, and gone afterwards."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import build
from torch import nn

from tokmask_peft.model import packed
from tokmask_peft.model.layers import QuickDropout, dropout, quick_dropout
from tokmask_peft.model.memory.estimate import Setting, estimate
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.model.packed import Packing
from tokmask_peft.recipe.schema import Recipe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=40)
@given(p=st.floats(0.0, 1.0), shape=st.lists(st.integers(0, 5), min_size=0, max_size=3), dtype=st.sampled_from(DTYPES))
def test_every_element_is_zero_or_scaled_and_so_is_its_gradient(p, shape, dtype):
    x = torch.ones(shape, dtype=dtype).transpose(0, -1) if shape else torch.ones((), dtype=dtype)  # strided, too
    dropped = dropout(x.requires_grad_(), p)
    assert (dropped.shape, dropped.dtype) == (x.shape, dtype)
    scale = torch.tensor(65536 / max(1, round((1 - p) * 65536)), dtype=dtype)
    assert torch.all((dropped == 0) | (dropped == scale))
    dropped.backward(torch.ones_like(dropped))
    torch.testing.assert_close(x.grad, dropped.detach(), atol=0, rtol=0)


@pytest.mark.parametrize(("p", "dtype"), [(0.02, torch.float32), (0.1, torch.bfloat16), (0.5, torch.float16)])
def test_as_many_are_dropped_as_torch_drops_and_the_mean_stays(p, dtype):
    count = 400_000
    torch.manual_seed(0)
    dropped = dropout(torch.ones(count, dtype=dtype), p)
    deviation = math.sqrt(p * (1 - p) / count)
    zero = (dropped == 0).double() - p
    assert abs(zero.mean().item()) < 5 * deviation
    scale = 1 / (1 - p)
    rounded = torch.tensor(scale, dtype=dtype).item() / scale
    assert abs(dropped.double().mean().item() / rounded - 1) < 5 * deviation * scale
    assert dropped.max().item() == pytest.approx(F.dropout(torch.ones(100, dtype=dtype), p).max().item(), rel=1e-4)
    for distance in range(1, 9):  # neighbours are dropped independently, although four elements share a draw
        correlation = (zero[distance:] * zero[:-distance]).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(count)


def test_the_seed_decides_and_nothing_is_drawn_without_need():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.4), dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.4), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(state, torch.get_rng_state())


class Twice(nn.Dropout):
    """Somebody's own dropout."""


def test_only_plain_dropout_is_changed_and_only_for_the_time_being(monkeypatch):
    ours, x = [], torch.ones(3, 2)
    monkeypatch.setattr("tokmask_peft.model.layers.dropout", lambda x, p: ours.append(p) or x)
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), Twice(0.5), nn.Linear(2, 2))
    with quick_dropout(model):
        model(x)
        model.eval()(x)
        with quick_dropout(model):  # twice is once
            pass
        model.train()(x)
    model(x)
    assert ours == [0.5, 0.5]
    with pytest.raises(RuntimeError, match="shapes"), quick_dropout(model):
        model(torch.ones(3, 5))
    assert not any(isinstance(module, QuickDropout) for module in model.modules())


@pytest.mark.parametrize(
    ("causal", "window", "scaling"), [(False, None, 0.3), (False, 2, None), (True, None, None), (True, 2, 0.3)]
)
def test_attention_with_dropout_is_torchs_where_nothing_is_dropped(monkeypatch, causal, window, scaling):
    """The weights that stay are divided by 1 - p, so without draws the result is that of torch's kernel over 1 - p."""
    lengths = [3, 7, 4, 30, 1]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packing = Packing.make(bounds, sum(lengths), max(lengths))
    assert {mask is None for _, _, mask in packing.buckets} == {True, False}
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(lengths), 4, 8, generator=draw).requires_grad_() for _ in range(3)]
    expected = packed.attend_in_buckets(rows, packing, causal, window, 0.0, scaling, F.scaled_dot_product_attention)
    monkeypatch.setattr(packed, "dropped", lambda x, p: x / (1 - p))
    found = 0.8 * packed.attend_in_buckets(rows, packing, causal, window, 0.2, scaling, packed._dropped_attention)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(output.square().sum(), rows) for output in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("device", "ours"), [("cpu", True), ("cuda", False)])
def test_the_estimate_counts_the_dropout_that_will_run(monkeypatch, device, ours):
    seen = []
    monkeypatch.setattr("tokmask_peft.model.layers.dropout", lambda x, p: seen.append(p) or x)
    recipe = Recipe.load("trec/minilm", ["data.path=.", "model.backbone_path=null"])
    config = build("bert")[0].config
    config.hidden_dropout_prob = 0.2
    estimate(recipe, Setting(config, device, "none", torch.float32), Shape.padded(2, 8), Shape.padded(1, 8))
    assert (0.2 in seen) == ours

"""Attached at p = 0 the masker changes nothing, to the bit: outputs, gradients, weights, random state, dropout."""

import pytest
import torch
from tiny_models import TEXTS, build, encode

from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe import TokenMaskConfig

LABELS = torch.arange(len(TEXTS)) % 3


def train(family, attach, task="sequence"):
    """Take two steps with dropout; return everything that could differ."""
    model, tokenizer = build(family, task=task, dropout=0.2)
    batch = {**encode(tokenizer), "labels": LABELS}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    torch.manual_seed(3)
    masker = attach(model, tokenizer)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = torch.get_rng_state()
    if masker is not None:
        assert masker.step == 2
        masker.detach()
    return torch.stack(losses), state, [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize("family", ["bert", "qwen2", "gemma3"])  # the last scales its embedding
def test_rate_zero_is_no_masker(family):
    losses, state, weights = train(family, lambda *_: None)
    config = TokenMaskConfig(p=0.0, unit="span")
    masked_losses, masked_state, masked_weights = train(family, lambda *it: TokenMasker.attach(*it, config))
    assert torch.equal(losses, masked_losses)
    assert torch.equal(state, masked_state)
    assert all(torch.equal(one, other) for one, other in zip(weights, masked_weights, strict=True))


def test_masking_draws_no_random_numbers():
    """At p > 0 the loss moves, and the stream that dropout reads does not."""
    losses, state, _ = train("bert", lambda *_: None)
    masked_losses, masked_state, _ = train("bert", lambda *it: TokenMasker.attach(*it, TokenMaskConfig(p=0.5)))
    assert torch.equal(state, masked_state)
    assert not torch.equal(losses, masked_losses)

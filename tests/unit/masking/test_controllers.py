"""Rates that react to the training, and how many texts are masked how much."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokmask_peft.masking.pattern import masked_positions
from tokmask_peft.masking.schedule import SCHEDULES, Answers
from tokmask_peft.recipe import TokenMaskConfig

STEPS = 100


def answers(clean=0.5, masked=0.5, clean_loss=1.0, masked_loss=1.0, classes=2):
    """Return the answers of a step with ten unmasked and ten masked texts of each class."""
    ten = [10.0] * classes
    right = [10.0 * share for share in ([masked] * classes if isinstance(masked, float) else masked)]
    losses = [10.0 * clean_loss] * classes, [10.0 * masked_loss] * classes
    return Answers(ten, [10.0 * clean] * classes, losses[0], ten, right, losses[1])


def run(schedule, seen, steps=STEPS, first=0):
    rates = []
    for step in range(first, first + steps):
        rates.append(schedule.rate(step / STEPS))
        schedule.observe_step(seen(rates[-1]))
    return rates


def test_the_rate_rises_while_the_model_overfits_and_falls_otherwise():
    up = run(TokenMaskConfig(p=0.3, schedule="overfit", share=0.5).make_schedule(), lambda rate: answers(clean=1.0))
    assert up[0] == 0
    assert up == sorted(up)
    assert up[21] == pytest.approx(0.3)
    assert up[-1] == 0.3
    config = TokenMaskConfig(p=0.3, p_start=0.3, schedule="overfit", share=0.5, target=0.95)
    down = run(config.make_schedule(), lambda rate: answers(clean=0.94))
    assert down[0] == 0.3
    assert down == sorted(down, reverse=True)
    assert down[-1] == 0


def test_the_gap_of_the_losses_is_held_at_its_target():
    schedule = TokenMaskConfig(p=0.5, schedule="gap", share=0.5).make_schedule()
    rates = run(schedule, lambda rate: answers(masked_loss=1.0 + rate))  # the target is met at a rate of 0.25
    assert rates[-1] == pytest.approx(0.25, abs=0.03)
    assert min(rates) == pytest.approx(0.05)


def test_a_class_is_masked_as_far_as_its_masked_texts_are_answered():
    schedule = TokenMaskConfig(p=0.3, schedule="ready").make_schedule()
    assert schedule.class_scale() is None
    rates = run(schedule, lambda rate: answers(masked=[0.9, 0.1]))
    assert set(rates) == {0.3}
    assert schedule.class_scale() == [1.0, 0.0]


@pytest.mark.parametrize("name", ["overfit", "gap", "ready"])
def test_a_resumed_controller_continues(name):
    config = TokenMaskConfig(p=0.4, schedule=name, share=0.5)

    def seen(rate):
        return answers(clean=0.8 + rate / 2, masked=[0.9] * 3 + [0.5] * 9, masked_loss=1.0 + rate, classes=12)

    whole = config.make_schedule()
    expected = run(whole, seen)
    first, second = config.make_schedule(), config.make_schedule()
    begun = run(first, seen, 40)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), sort_keys=True)))  # as the Trainer saves it
    assert begun + run(second, seen, 60, 40) == expected
    assert second.class_scale() == whole.class_scale()


def test_a_controller_without_unmasked_texts_is_refused():
    for name in ("overfit", "gap"):
        with pytest.raises(ValidationError, match="share"):
            TokenMaskConfig(schedule=name)
    with pytest.raises(ValidationError, match=r"0\.5"):
        TokenMaskConfig(per_text="uniform", p=0.6)


def test_every_schedule_is_off_at_p_0():
    assert {name for name in SCHEDULES if not TokenMaskConfig(p=0, schedule=name, share=0.5).is_off} == set()


ROWS, LENGTH = 400, 25


def masked(rate, share=1.0, per_text="fixed", seed=0, **options):
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    maskable = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    return masked_positions(ids, rate, seed, 3, 0, maskable, share=share, per_text=per_text, **options)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.5), st.floats(0.1, 1.0), st.sampled_from(["fixed", "uniform"]), st.integers(0, 2**31))
def test_a_share_of_the_texts_is_masked_and_higher_values_only_add(rate, share, per_text, seed):
    found = masked(rate, share, per_text, seed)
    assert not (found & ~masked(min(rate * 1.5, 0.5), share, per_text, seed)).any()
    assert not (found & ~masked(rate, min(share * 1.5, 1.0), per_text, seed)).any()
    whole = masked(rate, 1.0, per_text, seed)
    chosen = found.any(dim=1)
    assert torch.equal(found[chosen], whole[chosen])
    if rate > 0.3 and per_text == "fixed":
        assert chosen.float().mean().item() == pytest.approx(share, abs=0.15)


def test_texts_draw_their_own_rates():
    rates = masked(0.3, per_text="uniform").float().mean(dim=1)
    assert rates.mean().item() == pytest.approx(0.3, abs=0.03)
    assert rates.std() > 1.5 * masked(0.3).float().mean(dim=1).std()
    assert rates.max() < 0.9


def test_a_packed_row_draws_as_its_texts_do():
    rows = torch.arange(ROWS).repeat_interleave(LENGTH)[None]
    positions = torch.arange(LENGTH).repeat(ROWS)[None]
    ids, maskable = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    for options in ({"share": 0.4}, {"per_text": "uniform"}, {"spare_one": True}):
        packed = masked_positions(ids, 0.3, 0, 3, 0, maskable, rows=rows, positions=positions, **options)
        assert torch.equal(packed.view(ROWS, LENGTH), masked(0.3, **options))


def test_one_unit_of_every_text_is_spared():
    found = masked(0.95, spare_one=True)
    assert not found.all(dim=1).any()
    assert torch.equal(found, masked(0.95) & found)
    assert (masked(0.95) & ~found).sum() == masked(0.95).all(dim=1).sum()

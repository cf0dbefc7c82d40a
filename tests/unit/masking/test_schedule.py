"""The masking rate over training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmask_peft.recipe import TokenMaskConfig


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"p": 0.3}, {0.0: 0.3, 0.5: 0.3, 1.0: 0.3}),
        ({"p": 0.3, "schedule": "linear", "p_start": 0.1}, {0.0: 0.1, 0.5: 0.2, 1.0: 0.3}),
        ({"p": 0.4, "schedule": "linear", "begin": 0.25, "end": 0.75}, {0.2: 0.0, 0.5: 0.2, 0.75: 0.4, 1.0: 0.4}),
        ({"p": 0.4, "schedule": "cosine"}, {0.0: 0.0, 0.25: 0.0585786, 0.5: 0.2, 1.0: 0.4}),
        ({"p": 0.2, "schedule": "warmup"}, {0.0: 0.0, 0.05: 0.1, 0.1: 0.2, 1.0: 0.2}),
        ({"p": 0.0, "p_start": 0.5, "schedule": "linear"}, {0.0: 0.5, 0.5: 0.25, 1.0: 0.0}),
    ],
)
def test_rates(settings, expected):
    config = TokenMaskConfig(**settings)
    assert {share: config.make_schedule().rate(share) for share in expected} == pytest.approx(expected, abs=1e-6)


@given(
    p=st.floats(0, 0.99),
    p_start=st.floats(0, 0.99),
    schedule=st.sampled_from(["linear", "cosine", "warmup"]),
    share=st.floats(-1, 2),
)
def test_rate_stays_between_its_ends_and_ends_exactly(p, p_start, schedule, share):
    config = TokenMaskConfig(p=p, p_start=p_start, schedule=schedule)
    assert min(p, p_start) - 1e-12 <= config.make_schedule().rate(share) <= max(p, p_start) + 1e-12
    assert config.make_schedule().rate(0.0) == p_start
    assert config.make_schedule().rate(1.0) == p

"""The pattern as a pure function: reference values, shares, nesting, whole units, independence of the layout."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from tokmask_peft.masking import pattern
from tokmask_peft.masking.pattern import masked_positions

IDS = torch.zeros(64, 128, dtype=torch.int64)
ALL = torch.ones_like(IDS, dtype=torch.bool)


def mask(rate=0.3, seed=1, step=0, rank=0, maskable=ALL, **kwargs):
    return masked_positions(torch.zeros(maskable.shape, dtype=torch.int64), rate, seed, step, rank, maskable, **kwargs)


@pytest.mark.parametrize(("word", "expected"), [(1, 0x514E28B7), (0xFFFFFFFF, 0x81F16F39), (0, 0)])
def test_the_hash_is_that_of_murmur3(word, expected):
    # MurmurHash3_x86_32 of the empty text under the seeds 1, 0xffffffff and 0 is its finaliser of the seed.
    assert pattern._mix(word) == expected
    assert pattern._mix(torch.tensor([word])).tolist() == [expected]


class NoOverflow(TorchDispatchMode):
    """Fails where int64 arithmetic leaves its range; eager torch wraps around, code from torch.compile may crash."""

    checked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        exact = {torch.ops.aten.mul.Tensor: operator.mul, torch.ops.aten.add.Tensor: operator.add}.get(func)
        result = func(*args, **(kwargs or {}))
        if exact is not None and result.dtype == torch.int64:
            values = [arg.double() if isinstance(arg, torch.Tensor) else float(arg) for arg in args]
            assert exact(*values).abs().max() < 2.0**63
            self.checked += 1
        return result


@pytest.mark.parametrize(("seed", "step", "rank"), [(0, 0, 0), (2**64 - 1, 2**62, 2**31), (2**31, 2**32 - 1, 1)])
def test_no_integer_overflows(seed, step, rank):
    with NoOverflow() as mode:
        mask(0.3, seed, step, rank, maskable=ALL[:4], word_starts=ALL[:4], unit="span", span_length=3)
        mask(0.3, seed, step, rank, maskable=ALL[:4], positions=torch.arange(-5, 123)[None])
    assert mode.checked > 20


def test_draws_are_uniform_and_use_all_24_bits():
    step_key = torch.tensor(77)
    draws = pattern._draw(pattern._mix(torch.arange(200)[:, None]), step_key, torch.arange(500)[None])
    assert 0 <= draws.min() < 1000
    assert 2**24 - 1000 < draws.max() < 2**24
    assert stats.kstest(draws.flatten().double().numpy() / 2**24, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_share_is_the_rate_over_many_seeds(rate):
    total = sum(int(mask(rate, seed=seed, step=seed % 7, rank=seed % 3).sum()) for seed in range(50))
    assert stats.binomtest(total, 50 * IDS.numel(), rate).pvalue > 1e-4


@pytest.mark.parametrize("axis", ["seed", "step", "rank", "row", "position"])
def test_neighbours_along_each_axis_are_independent(axis):
    if axis in ("row", "position"):
        one = mask(0.3, seed=5)
        other = one.roll(1, 0 if axis == "row" else 1)
    else:
        one, other = mask(0.3, **{axis: 3}), mask(0.3, **{axis: 4})
    assert stats.binomtest(int((one & other).sum()), one.numel(), 0.09).pvalue > 1e-4


def test_counters_cannot_stand_in_for_each_other():
    assert not torch.equal(mask(step=1, rank=0), mask(step=0, rank=1))
    assert not torch.equal(mask(seed=1, step=0), mask(seed=0, step=1))
    assert not torch.equal(mask(seed=1), mask(seed=1 + 2**32))


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(0, 0.99),
    high=st.floats(0, 0.99),
    seed=st.integers(0, 2**63),
    unit=st.sampled_from(["token", "word", "span"]),
)
def test_a_higher_rate_only_adds(low, high, seed, unit):
    low, high = sorted((low, high))
    starts = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed % 2**32)) < 0.5
    both = [
        mask(rate, seed, maskable=ALL[:4, :32], word_starts=starts, unit=unit, span_length=2) for rate in (low, high)
    ]
    assert not (both[0] & ~both[1]).any()


def test_rate_zero_masks_nothing_and_a_tensor_is_as_good_as_a_number():
    assert not mask(0.0).any()
    as_tensors = mask(torch.tensor(0.3), step=torch.tensor(9))
    assert as_tensors.any()
    assert torch.equal(as_tensors, mask(0.3, step=9))


def words_of(maskable, starts):
    """Split a text into words the slow way: lists of positions, maskable ones only."""
    words = []
    for position, (may, starts_here) in enumerate(zip(maskable.tolist(), starts.tolist(), strict=True)):
        if not may:
            continue
        if starts_here or position == 0 or not maskable[position - 1]:
            words.append([])
        words[-1].append(position)
    return words


texts = st.lists(st.tuples(st.booleans(), st.integers(0, 9).map(bool)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(text=texts, seed=st.integers(0, 1000), span=st.integers(1, 4))
def test_words_and_spans_are_whole_and_nothing_protected_is_touched(text, seed, span):
    starts, maskable = (torch.tensor(column) for column in zip(*text, strict=True))
    words = words_of(maskable, starts)
    by_unit = {
        unit: mask(0.5, seed, maskable=maskable[None], word_starts=starts[None], unit=unit, span_length=span)[0]
        for unit in ("word", "span")
    }
    for masked in by_unit.values():
        assert not (masked & ~maskable).any()
        for word in words:
            assert masked[word].all() or not masked[word].any()
    # A border between a masked and an unmasked word is a border between spans: all at one distance modulo the length.
    flags = [bool(by_unit["span"][word[0]]) for word in words]
    borders = {i % span for i in range(1, len(flags)) if flags[i] != flags[i - 1]}
    assert len(borders) <= 1
    if span == 1:
        assert torch.equal(by_unit["span"], by_unit["word"])


def test_a_protected_token_ends_a_word():
    """What follows it inside the same word is a word of its own, which may have another fate."""
    starts = torch.tensor([[True, False, False, False]]).expand(64, 4)
    maskable = torch.tensor([[True, True, False, True]]).expand(64, 4)
    masked = mask(0.5, maskable=maskable, word_starts=starts, unit="word")
    assert torch.equal(masked[:, 0], masked[:, 1])
    assert not torch.equal(masked[:, 0], masked[:, 3])


def test_share_of_words_and_spans_is_the_rate():
    starts = torch.arange(128).expand(64, 128) % 4 == 0  # 32 words of 4 tokens
    for unit, words in (("word", 1), ("span", 4)):
        flags = torch.cat(
            [mask(0.2, seed, word_starts=starts, unit=unit, span_length=words)[:, ::4] for seed in range(30)]
        )
        # Whole units, so that the draws are independent: with span 4, every fourth word's flag.
        sample = flags[:, ::words]
        assert stats.binomtest(int(sample.sum()), sample.numel(), 0.2).pvalue > 1e-4


def test_borders_of_spans_move_from_text_to_text():
    many = ALL[:1].expand(1000, -1)
    flags = mask(0.5, maskable=many, word_starts=many, unit="span", span_length=3)
    borders = (flags[:, 1:] != flags[:, :-1]).int()
    per_phase = torch.stack([borders[:, phase::3].sum() for phase in range(3)])
    assert per_phase.min() > 0.8 * per_phase.max()


def packed(lengths, maskable, starts, unit):
    """Mask texts as one packed row, and as padded rows; return both, text by text."""
    count, longest = len(lengths), max(lengths)
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    rows = torch.arange(count)[:, None].expand(count, longest)[real][None]
    positions = torch.arange(longest)[None].expand(count, longest)[real][None]
    padded = mask(0.4, maskable=maskable & real, word_starts=starts, unit=unit, span_length=2)
    one_row = mask(
        0.4, maskable=maskable[real][None], word_starts=starts[real][None], unit=unit, span_length=2,
        rows=rows, positions=positions,
    )  # fmt: skip
    return padded[real], one_row[0]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    unit=st.sampled_from(["token", "word", "span"]),
)
def test_a_packed_batch_masks_as_the_padded_one(lengths, seed, unit):
    generator = torch.Generator().manual_seed(seed)
    maskable, starts = torch.rand(2, len(lengths), max(lengths), generator=generator) < 0.7
    padded, one_row = packed(lengths, maskable, starts, unit)
    assert torch.equal(padded, one_row)

"""Class weights against their formula, and the loss against torch and against a plain loop."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokmask_peft.errors import RecipeError
from tokmask_peft.examples import IGNORED
from tokmask_peft.training.losses import ClassificationLoss, class_weights

COUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**6), min_size=1)


class TestClassWeights:
    @given(counts=COUNTS, wanted=st.sampled_from(["inverse", "sqrt_inverse"]))
    @settings(max_examples=30)
    def test_they_sum_to_the_number_of_classes_and_fall_with_the_count(self, counts, wanted):
        found = class_weights(wanted, counts)
        assert sum(found) == pytest.approx(len(counts))
        power = 1.0 if wanted == "inverse" else 0.5
        products = [weight * count**power for weight, count in zip(found, counts.values(), strict=True)]
        assert products == pytest.approx([products[0]] * len(products))

    def test_by_hand(self):
        assert class_weights("sqrt_inverse", {"a": 16, "b": 4}) == pytest.approx([2 / 3, 4 / 3])
        assert class_weights("inverse", {"a": 16, "b": 4}) == pytest.approx([0.4, 1.6])
        assert class_weights("none", {"a": 16, "b": 4}) is None

    def test_a_class_without_examples_has_a_finite_weight(self):
        assert all(map(math.isfinite, class_weights("inverse", {"a": 5, "b": 0})))

    def test_explicit_ones_follow_the_order_of_the_labels(self):
        assert class_weights({"b": 2, "a": 0.5}, {"a": 1, "b": 1}) == [0.5, 2.0]

    def test_every_mistake_of_explicit_ones_is_named(self):
        with pytest.raises(RecipeError) as caught:
            class_weights({"lang_1": 1.0, "other": 1.0}, {"lang1": 3, "lang2": 4, "other": 5})
        assert (caught.value.code, len(caught.value.problems)) == ("class-weights", 3)
        assert "Did you mean 'lang1'?" in caught.value.problems[0]


def batch(texts=5, words=7, classes=4, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(texts, words, classes, generator=generator) * scale
    labels = torch.randint(0, classes, (texts, words), generator=generator)
    labels[torch.rand(texts, words, generator=generator) < 0.4] = IGNORED
    return logits, labels


def out(logits):
    return SimpleNamespace(logits=logits)


def by_hand(logits, labels, weights=None, gamma=0.0):
    """Focal loss (Lin et al. 2017), item by item: -w (1 - p)^gamma log p, over the number of labelled items."""
    total, items = 0.0, 0
    for row, answers in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for scores, answer in zip(row, answers, strict=True):
            if answer == IGNORED:
                continue
            p = math.exp(scores[answer]) / sum(map(math.exp, scores))
            total -= (1.0 if weights is None else weights[answer]) * (1.0 - p) ** gamma * math.log(p)
            items += 1
    return total / items


class TestClassificationLoss:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
    def test_one_label_per_text_with_smoothing(self, smoothing):
        logits, labels = batch()
        first, answers = logits[:, 0], labels.clamp(min=0)[:, 0]
        expected = F.cross_entropy(first, answers, label_smoothing=smoothing)
        torch.testing.assert_close(ClassificationLoss(smoothing=smoothing)({"logits": first}, answers), expected)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("weights", [None, [0.2, 3.0, 1.0, 0.0]])
    def test_focal_and_weighted_against_a_plain_loop(self, weights, gamma):
        logits, labels = batch(seed=1)
        found = ClassificationLoss(weights, gamma)(out(logits), labels)
        assert found.item() == pytest.approx(by_hand(logits, labels, weights, gamma), rel=1e-5)

    @given(seed=st.integers(0, 999), cut=st.integers(1, 4), gamma=st.sampled_from([0.0, 1.5]))
    @settings(max_examples=25)
    def test_however_a_batch_is_split_loss_and_gradient_are_the_same(self, seed, cut, gamma):
        logits, labels = batch(seed=seed)
        loss = ClassificationLoss([0.5, 2.0, 1.0, 0.1], gamma, smoothing=0.1)
        items = (labels != IGNORED).sum()
        whole = logits.clone().requires_grad_()
        expected = loss(out(whole), labels, num_items_in_batch=items)
        expected.backward()
        parts = logits.clone().requires_grad_()
        total = 0.0
        for piece in (slice(0, cut), slice(cut, None)):
            part = loss(out(parts[piece]), labels[piece], num_items_in_batch=items)
            part.backward()
            total += part.item()
        assert total == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(parts.grad, whole.grad)
        torch.testing.assert_close(loss(out(logits), labels), expected)  # alone, a batch counts its own items

    def test_ignored_positions_give_nothing(self):
        logits, labels = batch(seed=3)
        other = torch.where((labels == IGNORED).unsqueeze(-1), torch.full_like(logits, 50.0), logits).requires_grad_()
        loss = ClassificationLoss([1.0, 2.0, 3.0, 4.0], gamma=2.0, smoothing=0.1)
        found = loss(out(other), labels)
        torch.testing.assert_close(found, loss(out(logits), labels))
        found.backward()
        assert (other.grad[labels == IGNORED] == 0).all()
        assert (other.grad[labels != IGNORED] != 0).any()

    @pytest.mark.parametrize("gamma", [0.0, 0.5])
    def test_all_labels_ignored_is_a_finite_zero(self, gamma):
        logits = torch.randn(2, 3, 4, requires_grad=True)
        loss = ClassificationLoss([1.0] * 4, gamma)(out(logits), torch.full((2, 3), IGNORED))
        assert loss.item() == 0.0
        loss.backward()
        assert (logits.grad == 0).all()

    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    def test_certainty_leaves_the_gradient_finite(self, gamma):
        logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
        ClassificationLoss(gamma=gamma)(out(logits), torch.tensor([0, 0])).backward()
        assert logits.grad.isfinite().all()
        assert logits.grad[1].abs().sum() > 0

    @pytest.mark.parametrize("gamma", [0.0, 1.0])
    def test_bf16_logits_are_computed_in_fp32(self, gamma):
        logits, labels = batch(seed=4, scale=20.0)
        half = logits.bfloat16()
        found = ClassificationLoss([0.3, 1.0, 2.0, 0.7], gamma)(out(half), labels)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, ClassificationLoss([0.3, 1.0, 2.0, 0.7], gamma)(out(half.float()), labels))

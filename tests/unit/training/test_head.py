"""The head's start from a linear probe."""

import numpy as np
import pytest

from tokmask_peft.training.head import probe


@pytest.mark.parametrize(("classes", "with_bias"), [(2, True), (2, False), (3, True), (3, False), (4, True)])
def test_the_weights_are_for_features_as_they_are(classes, with_bias):
    draw = np.random.default_rng(3)
    gold = np.arange(240) % min(classes, 3)  # the fourth class has no item
    centres = draw.normal(size=(3, 6)) * 4
    features = (centres[gold] + draw.normal(size=(240, 6))) * 10.0 ** np.arange(-3, 3) + 5 * with_bias
    weight, bias = probe(features.astype(np.float32), gold, 1.0, classes, with_bias)
    assert weight.shape == (classes, 6)
    assert bias.any() == with_bias
    assert ((features @ weight.T + bias).argmax(-1) == gold).mean() > 0.9
    shifted, _ = probe((features * 100).astype(np.float32), gold, 1.0, classes, with_bias)
    np.testing.assert_allclose(shifted * 100, weight, rtol=0.05, atol=0.02)

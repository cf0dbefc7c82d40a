"""What `auto` in the training section becomes, from the number of texts."""

import math

import pytest

from tokmask_peft.recipe.loading import load_recipe, shipped_recipes
from tokmask_peft.recipe.schema import TrainingConfig


@pytest.mark.parametrize(
    ("texts", "size", "steps"),
    [(20, 8, (100, 130)), (100, 8, (400, 420)), (300, 8, (400, 440)), (1_000, 8, (640, 760)),
     (5_000, 16, (1_200, 1_600)), (30_000, 32, (2_500, 3_000)), (1_000_000, 32, (62_500, 62_500))],
)  # fmt: skip
@pytest.mark.parametrize("processes", [1, 2])
def test_steps_fit_the_number_of_texts(texts, size, steps, processes):
    found = TrainingConfig(gradient_accumulation=2).decided(texts, 20 * texts, processes)
    step = found["batch_size"] * 2 * processes
    assert step == size
    assert steps[0] <= found["epochs"] * math.ceil(texts / step) <= steps[1]
    assert found["patience"] == math.ceil(found["epochs"] / 2)


def test_given_numbers_stay_and_budgets_count():
    given = TrainingConfig(epochs=6, batch_size=32)
    assert given.decided(300, 6_000) == {"patience": None}
    assert TrainingConfig(patience=None, epochs=3).decided(300, 6_000) == {"batch_size": 8}
    for views in (1, 2):  # 16 texts at a time, or 8 of them twice
        budget = TrainingConfig(tokens_per_batch=320, batch_size=1, views=views).decided(1_000, 20_000)
        assert 640 <= budget["epochs"] * 1_000 / (16 / views) <= 760


def test_recipes_of_studies_keep_their_numbers():
    for name in shipped_recipes():
        training = load_recipe(name, ["data.path=x"]).training
        auto = name == "quickstart" or "e5-small" in name
        assert (training.epochs == "auto") == auto, name
        assert training.decided(10_000, 200_000) == {"patience": None} or auto, name

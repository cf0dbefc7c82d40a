"""A regularizer added from outside the package: a field that carries its arm's name, what is off and what is usual."""

from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from tokmask_peft.recipe.loading import load_recipe
from tokmask_peft.recipe.schema import Recipe, Regularizer, TrainingConfig, regularizers


# -- the example of CONTRIBUTING --
class WithRDrop(TrainingConfig):
    """In the package: one more field of TrainingConfig, and the loss that reads it."""

    rdrop: Annotated[float, Regularizer("rdrop", off=0.0, usual=1.0)] = Field(
        0.0, ge=0, description="weight of R-Drop (Wu et al. 2021); 0 is off"
    )


# -- end --
class MyRecipe(Recipe):
    training: WithRDrop = Field(default_factory=WithRDrop)


def arm(name):
    """Return the settings of an arm: every regularizer is off except the one named."""
    return {path: mark.usual if mark.name == name else mark.off for path, mark in regularizers(MyRecipe).items()}


def with_settings(settings):
    content = load_recipe("quickstart").model_dump(mode="json")
    for path, value in settings.items():
        section, key = path.split(".")
        content[section][key] = value
    return MyRecipe.model_validate(content)


def test_the_field_makes_an_arm():
    assert {path: mark.name for path, mark in regularizers().items()} == {
        "model.attention_dropout": "attention_dropout",
        "adapter.dropout": "lora_dropout",
        "training.label_smoothing": "label_smoothing",
        "training.views": "views",
        "training.neftune_alpha": "neftune",
    }
    assert set(regularizers(MyRecipe)) - set(regularizers()) == {"training.rdrop"}
    assert with_settings(arm("rdrop")).training.rdrop == 1.0
    other = with_settings(arm("neftune"))
    assert (other.training.rdrop, other.training.neftune_alpha) == (0.0, 5)
    with pytest.raises(ValidationError):
        with_settings({"training.rdrop": -1})


@pytest.mark.parametrize("name", [mark.name for mark in regularizers().values()])
def test_every_off_and_usual_value_is_valid(name):
    assert with_settings(arm(name)) != with_settings(arm("none"))

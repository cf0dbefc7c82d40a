"""Backbones that cannot compute activations again: neither an error nor a remedy comes of it."""

import pytest
import torch
from measured import make_recipe
from transformers import AlbertConfig, MPNetConfig, PreTrainedModel

from tokmask_peft.errors import ModelError
from tokmask_peft.model.decisions import can_checkpoint
from tokmask_peft.model.memory.estimate import Room, Setting
from tokmask_peft.model.memory.step import bare_model
from tokmask_peft.training import memory as fits
from tokmask_peft.training.memory import before_training, forecast, ways_out

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL = {**SIZE, "vocab_size": 100, "max_position_embeddings": 140, "num_labels": 3}
CONFIGS = [AlbertConfig(embedding_size=16, **SMALL), MPNetConfig(**SMALL)]
TIGHT = Room(700 * 2**20, "this machine's free memory")


class Loaded:
    """What is read of a loaded backbone."""

    quantization, dtype = "none", torch.float32

    def __init__(self, config):
        self.model: PreTrainedModel = bare_model(config, "sequence", torch.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_cannot_be_checkpointed_is_estimated_and_helped_without(config, monkeypatch):
    setting, recipe = Setting(config, "cpu", "none", torch.float32), make_recipe("x", training={"batch_size": 2})
    assert not can_checkpoint(Loaded(config).model)
    tight = forecast(recipe, setting, "padded", None, TIGHT)
    assert (tight.fits, tight.decision.choice, tight.recipe.model.gradient_checkpointing) == (False, "off", False)
    assert "ForSequenceClassification cannot do it" in tight.decision.reason
    offered = " ".join(remedy.text for remedy in ways_out(tight, setting, "padded", None))
    assert "training.batch_size=" in offered
    assert "checkpointing" not in offered
    assert ("adapter.layers" in offered) == (config.model_type != "albert")  # whose layers share their weights
    monkeypatch.setattr(fits, "device_room", lambda device: TIGHT)
    monkeypatch.setattr(fits, "workload", lambda *_: tight.shapes)
    decided, decision, warning = before_training(recipe, Loaded(config), "padded", None, torch.device("cpu"))
    assert (decided.model.gradient_checkpointing, decision.choice) == (False, "off")
    assert "the largest batch would take" in warning


def test_asking_for_it_is_refused_by_name():
    recipe = make_recipe("x", model={"gradient_checkpointing": True})
    setting = Setting(CONFIGS[0], "cpu", "none", torch.float32)
    with pytest.raises(ModelError, match="AlbertForSequenceClassification cannot do that: set it to false"):
        forecast(recipe, setting, "padded", None, None)

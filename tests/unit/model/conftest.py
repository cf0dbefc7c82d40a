from pathlib import Path

import pytest
import torch
from tiny_models import build

from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.recipe.schema import ModelConfig


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Return a function that saves a tiny random backbone, without its head, and gives its folder."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            model, tokenizer = build(family)
            folder = tmp_path_factory.mktemp(f"backbone-{family}")
            model.base_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def model_config(tiny_folder):
    def make(family: str, **settings) -> ModelConfig:
        chosen = {"precision": "fp32", "quantization": "none", **settings}
        return ModelConfig(backbone=str(tiny_folder(family)), **chosen)

    return make


@pytest.fixture(scope="session")
def load(model_config):
    """Return a function that loads a tiny backbone with three labels on the CPU."""

    def make(family, task="sequence", **settings):
        labels = ("negative", "neutral", "positive")
        return load_backbone(model_config(family, **settings), task, labels, torch.device("cpu"))

    return make

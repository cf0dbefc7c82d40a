from pathlib import Path

import pytest
from tiny_models import build

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


@pytest.fixture
def model_config(tiny_folder):
    def make(family: str, **settings) -> ModelConfig:
        chosen = {"precision": "fp32", "quantization": "none", **settings}
        return ModelConfig(backbone=str(tiny_folder(family)), **chosen)

    return make

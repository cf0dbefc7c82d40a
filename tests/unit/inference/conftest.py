from pathlib import Path

import pytest
import torch
from tiny_models import build

from tokmask_peft.artifacts import AdapterInfo, Calibration, Loading
from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.model.adapter import add_adapter, save_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

LABELS = {"sequence": ("bad [x]", "good", "so-so"), "token": ("lang1", "lang2", "otro")}


@pytest.fixture(scope="session")
def classifier():
    """Return a function that makes a classifier of a tiny random model, without an adapter."""

    def make(family="bert", task="sequence", max_length=24, temperature=1.0):
        model, tokenizer = build(family, task)
        model.config.pad_token_id = tokenizer.pad_token_id
        return Classifier(model, tokenizer, task, LABELS[task], max_length=max_length, temperature=temperature)

    return make


@pytest.fixture(scope="session")
def saved_adapter(tmp_path_factory):
    """Return a function that saves an adapter with random weights as a run does, and gives its folder."""
    made: dict[tuple, Path] = {}

    def make(family="bert", task="sequence", **loading) -> Path:
        key = (family, task, *sorted(loading.items()))
        if key not in made:
            root = tmp_path_factory.mktemp("saved")
            model, tokenizer = build(family)
            model.base_model.save_pretrained(root / "backbone")
            tokenizer.save_pretrained(root / "backbone")
            config = ModelConfig(backbone=str(root / "backbone"), quantization="none", precision="fp32")
            torch.manual_seed(0)
            backbone = load_backbone(config, task, LABELS[task], torch.device("cpu"))
            wrapped, _ = add_adapter(backbone, AdapterConfig(r=4), task)
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.5)
            folder = root / "adapter"
            save_adapter(wrapped, folder, config.backbone)
            backbone.tokenizer.save_pretrained(str(folder))
            info = {"task": task, "labels": tuple(LABELS[task]), "calibration": Calibration(temperature=2.0)}
            AdapterInfo(**info, loading=Loading(**{"max_length": 24, **loading})).write(folder)
            made[key] = folder
        return made[key]

    return make

"""The estimate of an evaluation beside a forward that is really run, without gradients.

Not for int8: what bitsandbytes takes within a product is not counted, and is as much again with few layers.
"""

import pytest
import torch
from measured import LABELS, make_recipe, measure_forward, save_random, save_real
from tiny_models import FAMILIES, build
from transformers import AutoConfig

from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.memory.estimate import Setting, estimate
from tokmask_peft.model.memory.step import Shape

needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")
SMALL, LARGE = Shape.padded(2, 8), Shape.padded(12, 40)


def compared(config, recipe, quantization, dtype, tolerance):
    """The evaluation is the larger batch: it is what tells."""
    found = estimate(recipe, Setting(config, "cpu", quantization, dtype), SMALL, LARGE)
    measured = measure_forward(recipe, LARGE)
    assert abs(found.evaluation - measured) <= tolerance * measured, f"{found.evaluation:,}, measured {measured:,}"


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("name", "quantization", "precision"),
    [
        ("Qwen2.5-0.5B", "nf4", "bf16"),
        ("Qwen2.5-0.5B", "none", "fp32"),
        ("TinyLlama-1.1B-Chat-v1.0", "none", "bf16"),
        ("TinyLlama-1.1B-Chat-v1.0", "nf4", "fp32"),
        ("bert-base-multilingual-cased", "nf4", "fp32"),
    ],
)
def test_of_real_shapes(name, quantization, precision, tmp_path):
    config, dtype = save_real(name, 2, precision, tmp_path)
    recipe = make_recipe(tmp_path, model={"quantization": quantization, "precision": precision})
    compared(config, recipe, quantization, dtype, 0.02)


@pytest.mark.parametrize(("family", "task"), [*((name, "sequence") for name in FAMILIES), ("bert", "token")])
def test_of_every_family(family, task, tmp_path):
    depth = "n_layers" if family == "distilbert" else "num_hidden_layers"
    model, tokenizer = build(family, task, **{depth: 6})
    save_random(model.base_model.config, tokenizer, tmp_path, torch.float32)
    recipe = make_recipe(tmp_path, task, model={"quantization": "none", "precision": "fp32"})
    config = AutoConfig.from_pretrained(tmp_path, num_labels=len(LABELS))
    compared(config, recipe, "none", torch.float32, 0.02)

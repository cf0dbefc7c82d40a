"""What is prepared for training on quantized weights, and what of PEFT's preparation is left out on purpose."""

import pytest
import torch
from tiny_models import encode

from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import bitsandbytes_problem, enable_checkpointing
from tokmask_peft.recipe.schema import AdapterConfig

pytestmark = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")


@pytest.fixture(params=["bert", "qwen2"])
def quantized(request, model_config):
    config = model_config(request.param, quantization="nf4", precision="bf16")
    backbone = load_backbone(config, "sequence", ("a", "b"), torch.device("cpu"))
    model, _ = add_adapter(backbone, AdapterConfig(r=4, dropout=0.0), "sequence")
    return model.train(), encode(backbone.tokenizer)


def test_nothing_frozen_is_upcast(quantized):
    model, _ = quantized
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and "original_module" not in n}
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16, torch.uint8}
    embedding = model.get_input_embeddings()
    assert embedding.weight.dtype == torch.bfloat16


def test_the_embedding_gives_no_gradients_and_checkpointing_needs_none(quantized):
    model, batch = quantized
    found = []
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: outputs.append(output))
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).logits.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert [output.requires_grad for output in outputs] == [False, False]
    assert any("lora_B" in name and gradient.abs().sum() > 0 for name, gradient in found[0].items())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_nothing_is_computed_again_below_the_adapter(model_config):
    config = model_config("qwen2", quantization="nf4", precision="bf16")
    backbone = load_backbone(config, "sequence", ("a", "b"), torch.device("cpu"))
    model, _ = add_adapter(backbone, AdapterConfig(r=4, layers=1), "sequence")
    enable_checkpointing(model.train())
    calls = []
    for index, layer in enumerate(backbone.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    with torch.autocast("cpu", torch.bfloat16):
        model(**encode(backbone.tokenizer)).logits.sum().backward()
    assert calls == [0, 1, 1]

"""The estimate beside a GPU's own count, and the embedding on the host; skipped without a GPU."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, encode
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import enable_checkpointing
from tokmask_peft.model.memory.estimate import MARGIN, estimate
from tokmask_peft.model.memory.step import Setting, Shape
from tokmask_peft.model.placement import place_embedding
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPE = Shape.padded(16, 64)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "TinyLlama-1.1B-Chat-v1.0", "bert-base-multilingual-cased"])
def test_the_estimate_is_what_the_allocator_counts(name, quantization, checkpointing, tmp_path):
    folder = os.environ.get("TOKMASK_TOKENIZERS")
    if not folder:
        pytest.skip("TOKMASK_TOKENIZERS is not set")
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.from_pretrained(Path(folder) / name, num_labels=3)
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(Path(folder) / name).save_pretrained(tmp_path)
    model = {"backbone": str(tmp_path), "quantization": quantization, "precision": "bf16"}
    model["gradient_checkpointing"] = checkpointing
    data = {"task": "sequence", "builtin": True}
    recipe = Recipe.model_validate({"name": "x", "model": model, "data": data})
    found = estimate(recipe, Setting(config, "cuda", quantization, torch.bfloat16), SHAPE, Shape.padded(1, 8))

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backbone = load_backbone(recipe.model, "sequence", ("a", "b", "c"), torch.device("cuda"))
    wrapped, _ = add_adapter(backbone, recipe.adapter, "sequence")
    wrapped.cuda().train()
    if checkpointing:
        enable_checkpointing(wrapped)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    ids = torch.full((16, 64), 5, device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0
    for step in range(3):
        if step == 1:  # loading and the first step, which makes the optimizer's states, are over
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            logits = wrapped(input_ids=ids, attention_mask=mask).logits
        F.cross_entropy(logits.float(), torch.zeros(16, dtype=torch.long, device="cuda")).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert abs(found.tensors - measured) <= MARGIN["cuda"] * measured, f"{found.to_dict()}, measured {measured:,}"


@pytest.mark.parametrize("placement", ["offload", "8bit"])
@pytest.mark.parametrize("family", ["bert", "qwen2", "llama"])
def test_a_placed_embedding_masks_as_a_resident_one(family, placement):
    outputs, ids = [], []
    for where in ("resident", placement):
        model, tokenizer = build(family)
        model.requires_grad_(False)
        place_embedding(model, where, torch.device("cuda"))
        model.cuda().train()
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, output: (ids.append(args[0]), outputs.append(output)))
        with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3, seed=1)):
            model(**{name: value.cuda() for name, value in encode(tokenizer).items()})
    assert torch.equal(*ids)
    assert outputs[1].is_cuda
    if placement == "offload":
        assert torch.equal(*outputs)
        assert model.get_input_embeddings().weight.device.type == "cpu"
    else:
        torch.testing.assert_close(outputs[1], outputs[0], atol=5e-3, rtol=0.01)


def test_an_offloaded_embedding_takes_nothing_on_the_gpu():
    model, _ = build("qwen2", vocab_size=50_000, hidden_size=512, head_dim=64)
    place_embedding(model.requires_grad_(False), "offload", torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    model.cuda()
    assert torch.cuda.memory_allocated() - before < 50_000 * 512 * 4 / 2

"""What only a CUDA GPU can show; skipped without one."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TEXTS, build, encode
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.pattern import masked_positions
from tokmask_peft.model import packed
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import enable_checkpointing, rows_problem
from tokmask_peft.model.layers import place_embedding
from tokmask_peft.model.memory.estimate import MARGIN, estimate
from tokmask_peft.model.memory.step import Setting, Shape
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig, Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_the_pattern_is_that_of_the_cpu():
    ids = torch.randint(5, 100, (16, 40))
    patterns = [
        masked_positions(
            ids.to(device),
            torch.tensor(0.3, device=device),
            7,
            torch.tensor(3, device=device),
            0,
            torch.ones_like(ids, dtype=torch.bool, device=device),
        ).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*patterns)
    assert 0.2 < patterns[0].float().mean() < 0.4


def test_masking_waits_for_nothing():
    model, tokenizer = build("qwen2")
    model.cuda().train()
    batch = on_gpu(encode(tokenizer))
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3)):
        model(**batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.get_input_embeddings()(batch["input_ids"])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["qwen2", "llama", "bert"])
def test_nf4_trains_before_and_after_an_evaluation(family, tmp_path):
    pytest.importorskip("bitsandbytes")
    body, tokenizer = build(family)
    body.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = ModelConfig(backbone=str(tmp_path), quantization="nf4", precision="bf16")
    backbone = load_backbone(config, "sequence", ("a", "b"), torch.device("cuda"))
    model, _ = add_adapter(backbone, AdapterConfig(r=4, dropout=0.0), "sequence")
    batch = on_gpu(encode(tokenizer))
    found = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(**batch).logits.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n})
        model.eval()
        with torch.no_grad():
            model(**batch)
    assert all(gradient.abs().sum() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


BATCH = Shape.padded(16, 64)


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
    found = estimate(recipe, Setting(config, "cuda", quantization, torch.bfloat16), BATCH, Shape.padded(1, 8))

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
            model(**on_gpu(encode(tokenizer)))
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


SHAPE = {"hidden_size": 128, "head_dim": 32}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("family", "settings"), [("bert", {}), ("qwen2", {}), ("llama", {}), ("mistral", {"sliding_window": 4})]
)
def test_packed_is_padded_in_bf16(family, settings, kernel, monkeypatch):
    model, tokenizer = build(family, **{**SHAPE, **settings})
    model.cuda()
    called = []
    found = packed._varlen_attention
    if kernel and (problem := rows_problem(torch.device("cuda", 0), torch.bfloat16, 32)):
        pytest.skip(problem)

    def counted(*args, **kwargs):
        called.append(1)
        return found(*args, **kwargs)

    monkeypatch.setattr(packed, "_varlen_attention", counted)
    if not kernel:
        monkeypatch.setattr(packed, "rows_problem", lambda *_: "not asked for")
    weights = [model.base_model.get_input_embeddings().weight]
    ids = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    found_logits, found_gradients = [], []
    for batch in (encode(tokenizer), PackedCollator("sequence")(ids)):
        if "cu_seqlens" in batch:
            enable_padding_free(model)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**on_gpu(batch)).logits.float()
        found_logits.append(logits)
        found_gradients.append(torch.autograd.grad(logits.square().sum(), weights)[0])
    assert bool(called) is kernel
    torch.testing.assert_close(found_logits[1], found_logits[0], atol=0.1, rtol=0.05)
    padded, ours = (gradient.flatten() for gradient in found_gradients)
    assert torch.nn.functional.cosine_similarity(ours, padded, dim=0) > 0.98


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_packed_is_padded_in_fp32(family):
    model, tokenizer = build(family)
    model.cuda()
    ids = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    with torch.no_grad():
        padded = model(**on_gpu(encode(tokenizer))).logits
        enable_padding_free(model)
        ours = model(**on_gpu(PackedCollator("sequence")(ids))).logits
    torch.testing.assert_close(ours, padded, atol=1e-4, rtol=0)

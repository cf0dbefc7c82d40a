"""Packed batches on a CUDA GPU, with its kernel for packed rows and without; skipped without one."""

import pytest
import torch
from tiny_models import TEXTS, build, encode

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.model import packed
from tokmask_peft.model.packed import enable_padding_free

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPE = {"hidden_size": 128, "head_dim": 32}


def on_gpu(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("family", "settings"), [("bert", {}), ("qwen2", {}), ("llama", {}), ("mistral", {"sliding_window": 4})]
)
def test_packed_is_padded_in_bf16(family, settings, kernel, monkeypatch):
    model, tokenizer = build(family, **{**SHAPE, **settings})
    model.cuda()
    called = []
    found = packed._varlen_kernel()
    if kernel and found is None:
        pytest.skip("this torch or this GPU has no kernel for packed rows")

    def counted(*args, **kwargs):
        called.append(1)
        return found(*args, **kwargs)

    monkeypatch.setattr(packed, "_varlen_kernel", lambda: counted if kernel else None)
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

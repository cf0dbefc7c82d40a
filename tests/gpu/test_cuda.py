"""What only a CUDA GPU can show; skipped without one."""

import pytest
import torch
from tiny_models import build, encode

from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.pattern import masked_positions
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TEXTS = ["mañana tengo un meeting", "ok", "i love this canción so much"]


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
    batch = {name: value.cuda() for name, value in encode(tokenizer, TEXTS).items()}
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
    batch = {name: value.cuda() for name, value in encode(tokenizer, TEXTS).items()}
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

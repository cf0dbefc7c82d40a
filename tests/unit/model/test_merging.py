import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, encode

from tokmask_peft.model.adapter import MOST_ROUNDED, merge_if_harmless


def adapted(size, dtype=torch.bfloat16, **options):
    """Return a PEFT model whose adapter changes weights of .2 by about `size`, and a batch."""
    model, tokenizer = build("bert")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=4, target_modules=["query", "dense"], **options)
    found = get_peft_model(model.to(dtype), lora, autocast_adapter_dtype=True).eval()
    torch.manual_seed(1)
    for name, weight in found.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=(size / 2) ** 0.5)  # four products of two
    return found, encode(tokenizer)


@torch.inference_mode()
def logits(model, batch):
    with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
        return model(**batch).logits.float()


def layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def test_fp32_is_merged_exactly():
    model, batch = adapted(0.001, torch.float32)
    before = logits(model, batch)
    merged, decision = merge_if_harmless(model)
    assert (decision.what, decision.choice, layers(merged)) == ("adapter", "merged", [])
    torch.testing.assert_close(logits(merged, batch), before, rtol=1e-5, atol=1e-5)


def test_bf16_is_merged_where_it_deviates_no_more_than_the_adapter_kept_apart():
    exact = logits(*adapted(0.05, torch.float32))
    model, batch = adapted(0.05)
    apart = logits(model, batch)
    merged, decision = merge_if_harmless(model)
    assert (decision.choice, layers(merged)) == ("merged", [])
    assert "rounding to bf16 takes up to" in decision.reason
    deviation = (logits(merged, batch) - exact).square().mean().sqrt()
    assert deviation < 2 * (apart - exact).square().mean().sqrt() + 1e-3


def test_a_change_that_bf16_weights_would_lose_is_kept_apart():
    model, batch = adapted(1e-5)
    before = logits(model, batch)
    same, decision = merge_if_harmless(model)
    assert same is model
    assert decision.choice == "kept apart"
    assert torch.equal(logits(same, batch), before)


@torch.no_grad()
def test_the_share_that_decides_is_that_of_the_worst_matrix(monkeypatch):
    model, _ = adapted(0.002)
    worst = 0.0
    for layer in layers(model):
        weight, change = layer.get_base_layer().weight.double(), layer.get_delta_weight("default").double()
        taken = (weight + change).bfloat16().double() - weight - change
        worst = max(worst, float(taken.norm() / change.norm()))
    for limit, choice in ((worst * 1.01, "merged"), (worst * 0.99, "kept apart")):
        monkeypatch.setattr("tokmask_peft.model.adapter.MOST_ROUNDED", limit)
        assert merge_if_harmless(adapted(0.002)[0])[1].choice == choice
    assert 0 < MOST_ROUNDED < 1


@pytest.mark.parametrize(
    ("options", "size", "choice"),
    [
        ({"dtype": torch.float32, "use_dora": True}, 0.05, "merged"),
        ({"use_dora": True}, 0.05, "kept apart"),
        ({}, 0.0, "merged"),  # changes nothing
    ],
)
def test_dora_is_merged_in_fp32_alone_and_what_changes_nothing_always(options, size, choice):
    assert merge_if_harmless(adapted(size, **options)[0])[1].choice == choice


def test_some_rows_stand_for_all(monkeypatch):
    shares = []
    for rows in (16, 10_000):
        monkeypatch.setattr("tokmask_peft.model.adapter.SAMPLED", rows)
        shares.append(float(re.search(r"up to ([\d.]+)%", merge_if_harmless(adapted(0.05)[0])[1].reason)[1]))
    assert shares[0] == pytest.approx(shares[1], rel=0.2)

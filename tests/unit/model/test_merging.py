import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build, encode

from tokmask_peft.model.adapter import (
    MOST_ROUNDED,
    _plain_changes,
    add_adapter,
    load_adapter,
    load_merged,
    merge_if_harmless,
    save_adapter,
)
from tokmask_peft.recipe.schema import AdapterConfig


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


@pytest.fixture
def save(load, tmp_path):
    """Return a function that saves an adapter with random weights, and returns its folder."""

    def make(family, config, trained_row=None):
        model, _ = add_adapter(load(family), config, "sequence", trained_row)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(model, tmp_path, "any/name")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("family", "options", "precision"),
    [("bert", {}, "bf16"), ("qwen2", {"rslora": True}, "fp32"), ("xlm-r", {"r": 3}, "bf16")],
)
def test_plain_lora_is_merged_without_peft_bit_for_bit(load, save, family, options, precision, monkeypatch):
    folder = save(family, AdapterConfig(**options))
    theirs, reason = merge_if_harmless(load_adapter(load(family, precision=precision), folder))
    monkeypatch.setattr("peft.get_peft_model", None)
    ours, decision = load_merged(load(family, precision=precision), folder)
    assert decision == reason
    assert decision.choice == "merged"
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("options", "row"), [({"dora": True}, None), ({"layers": 1}, None), ({}, 7)], ids=["dora", "layers", "row"]
)
def test_anything_else_is_left_to_peft(load, save, options, row):
    folder = save("qwen2", AdapterConfig(**options), row)
    assert _plain_changes(load("qwen2"), folder) is None
    ours, _ = load_merged(load("qwen2"), folder)
    theirs, _ = merge_if_harmless(load_adapter(load("qwen2"), folder))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=0.0, rtol=0.0)


def test_an_adapter_that_rounding_would_spoil_is_kept_apart_by_peft(load, save):
    folder = save("bert", AdapterConfig())
    path = folder / "adapter_model.safetensors"
    save_file({name: value * 1e-3 for name, value in load_file(path).items()}, path)
    model, decision = load_merged(load("bert", precision="bf16"), folder)
    assert decision.choice == "kept apart"
    assert isinstance(model, PeftModel)

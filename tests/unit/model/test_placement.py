"""The input embedding on the host and in 8 bits: same masking, same adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TEXTS, build, encode
from torch import nn

from tokmask_peft.errors import ModelError, RecipeError
from tokmask_peft.masking.embedding import UsedRows, find_embedding, read_rows
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter, save_adapter
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.layers import HostEmbedding, place_embedding
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.loading import load_recipe
from tokmask_peft.recipe.schema import AdapterConfig

CPU = torch.device("cpu")
PLACED = [
    "offload",
    pytest.param("8bit", marks=pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="bitsandbytes")),
]
TOLERANCE = {"offload": 0.0, "8bit": 1 / 220}


def found(family, placement, tokenizer_texts=TEXTS):
    """Return what the masked embedding gives, the ids it was asked for, and the spare row during and after."""
    model, tokenizer = build(family)
    model.requires_grad_(False)
    place_embedding(model, placement, CPU)
    embedding = model.get_input_embeddings()
    last = embedding.num_embeddings - 1
    before = read_rows(embedding, last, last + 1).clone()
    batch = encode(tokenizer, tokenizer_texts)
    seen = []
    embedding.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with TokenMasker.attach(model.train(), tokenizer, TokenMaskConfig(p=0.4, seed=3)) as masker:
        logits = model(**batch).logits
        during = read_rows(embedding, last, last + 1).clone()
        expected = UsedRows.of(embedding, tokenizer).typical() if masker.mask_token.kind == "spare" else before
        torch.testing.assert_close(during.flatten(), expected.flatten(), rtol=0, atol=expected.abs().max() / 220)
    assert masker.observed_rate > 0.2
    torch.testing.assert_close(read_rows(embedding, last, last + 1), before, atol=1e-6, rtol=0)
    return seen[0][0], seen[0][1].detach(), during, logits.detach()


@pytest.mark.parametrize("placement", PLACED)
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_masking_is_that_of_a_resident_embedding(family, placement):
    ids, rows, spare, logits = found(family, "resident")
    placed_ids, placed_rows, placed_spare, placed_logits = found(family, placement)
    assert torch.equal(ids, placed_ids)
    # a typical row has the errors of all rows, whose mean is small, and is scaled up
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=0.4) * torch.where(ids == ids.max(), 2, 1).unsqueeze(-1)
    assert ((rows - placed_rows).abs() <= TOLERANCE[placement] * largest).all()
    assert ((spare - placed_spare).abs() <= 2 * TOLERANCE[placement] * spare.abs().max().clamp(min=0.4)).all()
    if placement == "offload":
        assert torch.equal(logits, placed_logits)
    else:
        assert not torch.equal(rows, placed_rows)


@pytest.mark.parametrize("placement", PLACED)
def test_the_matrix_is_not_a_parameter_of_full_size(load, placement):
    backbone = load("qwen2", embedding=placement)
    embedding = backbone.model.get_input_embeddings()
    assert backbone.decisions[-1].what == "embedding"
    floats = [p for p in embedding.parameters() if p.is_floating_point()]
    assert not floats
    backbone.model.to(CPU).to(torch.float32)  # moved as a Trainer moves it
    rows = read_rows(embedding, 0, 5)
    assert torch.equal(embedding(torch.arange(5)), rows)
    model, _ = add_adapter(backbone, AdapterConfig(), "sequence")
    assert find_embedding(model) is embedding is not None
    assert type(embedding) is not nn.Embedding


@pytest.mark.parametrize("placement", PLACED)
def test_the_adapter_holds_no_embedding_and_loads_with_stock_peft(load, placement, tmp_path):
    from peft import AutoPeftModelForSequenceClassification

    backbone = load("qwen2", embedding=placement)
    model, _ = add_adapter(backbone, AdapterConfig(r=4), "sequence")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = encode(backbone.tokenizer)
    with TokenMasker.attach(model.train(), backbone.tokenizer, TokenMaskConfig(p=0.2)):
        for _ in range(3):
            model(**batch).logits.square().sum().backward()
            optimizer.step()
    save_adapter(model, tmp_path, backbone.model.name_or_path)
    model.save_pretrained(tmp_path / "as-a-checkpoint")  # as the Trainer saves one
    for folder in (tmp_path, tmp_path / "as-a-checkpoint"):
        assert not [name for name in load_file(folder / "adapter_model.safetensors") if "embed" in name]
    model.eval()
    stock = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    stock.config.pad_token_id = backbone.tokenizer.pad_token_id
    stock.base_model.model.config.pad_token_id = backbone.tokenizer.pad_token_id
    with torch.no_grad():
        difference = (stock(**batch).logits - model(**batch).logits).abs().max()
    assert difference < (1e-5 if placement == "offload" else 0.5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(("family", "why"), [("gemma3", "ScaledWordEmbedding"), ("t5", "shared with the decoder")])
def test_a_scaled_or_shared_lookup_stays_where_it_is(family, why):
    model, _ = build(family)
    with pytest.raises(ModelError, match=rf"{why}: use resident") as caught:
        place_embedding(model, "offload", CPU)
    assert (caught.value.code, caught.value.fields) == ("embedding-not-movable", {"wanted": "offload"})


def test_a_trained_mask_row_needs_a_resident_embedding():
    overrides = ["model.embedding=8bit", "masking.trainable_mask=true"]
    with pytest.raises(RecipeError, match=r"model.embedding=8bit: set model.embedding=resident"):
        load_recipe("quickstart", overrides)


def test_the_lookup_on_a_device_sends_distinct_rows(monkeypatch):
    # the meta device stands for one whose memory is not the host's
    embedding = HostEmbedding(torch.randn(20, 4))
    sent = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.tensor([1, 4, 7]))
    monkeypatch.setattr(
        torch, "unique", lambda ids, return_inverse: (torch.empty(3, device="meta"), torch.zeros_like(ids))
    )
    real = nn.functional.embedding
    monkeypatch.setattr(nn.functional, "embedding", lambda ids, rows: sent.append(rows.shape) or real(ids, rows))
    out = embedding(torch.empty(2, 9, dtype=torch.long, device="meta"))
    assert out.shape == (2, 9, 4)
    assert out.device.type == "meta"
    assert sent == [(3, 4)]

"""Models inside other things: PEFT, a trained mask row, 4-bit layers, DDP, NEFTune."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import TEXTS, assert_typical, build, encode, seen_ids
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.embedding import is_trainable, prepare_mask_row
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import choose_mask_token
from tokmask_peft.recipe import TokenMaskConfig

LABELS = torch.arange(len(TEXTS)) % 3


def lora(model, **settings):
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", **settings))


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_a_peft_model_is_masked_and_only_the_adapter_learns(family):
    model, tokenizer = build(family)
    model = lora(model)
    batch = encode(tokenizer)
    with (
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker,
        seen_ids(model.get_base_model()) as seen,
    ):
        model.train()(**batch, labels=LABELS).loss.backward()
        assert (seen[0] == masker.mask_token.id).sum() > 5
    assert model.get_base_model().get_input_embeddings().weight.grad is None
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("peft", [False, True])
def test_a_ddp_model_is_masked(gloo, peft):
    model, tokenizer = build("qwen2")
    wrapped = DistributedDataParallel(lora(model) if peft else model)
    batch = encode(tokenizer)
    with TokenMasker.attach(wrapped, tokenizer, TokenMaskConfig(p=0.5)) as masker, seen_ids(model) as seen:
        wrapped.train()(**batch, labels=LABELS).loss.backward()
        assert (masker.rank, masker.step) == (0, 1)
    assert not torch.equal(seen[0], batch["input_ids"])


@pytest.mark.parametrize("family", ["bert", "qwen2", "gemma3"])
def test_a_trained_mask_row_moves_is_saved_alone_and_reloads(family, tmp_path):
    model, tokenizer = build(family)
    batch = encode(tokenizer)
    base_weight = model.get_input_embeddings().weight
    token = choose_mask_token(tokenizer, base_weight.shape[0])
    prepare_mask_row(model.get_input_embeddings(), token, tokenizer)
    before = base_weight.detach().clone()
    config = TokenMaskConfig(p=0.5, trainable_mask=True)
    with pytest.raises(MaskTokenError, match=rf"trainable_token_indices=\[{token.id}\]") as refused:
        TokenMasker.attach(model.requires_grad_(False), tokenizer, config)
    assert refused.value.code == "mask-row-frozen"

    peft_model = lora(model, trainable_token_indices=[token.id]).train()
    embedding = peft_model.get_base_model().get_input_embeddings()
    assert is_trainable(embedding, token.id)
    assert not is_trainable(embedding, token.id - 1)
    optimizer = torch.optim.SGD([w for w in peft_model.parameters() if w.requires_grad], lr=1.0)
    with TokenMasker.attach(peft_model, tokenizer, config) as masker:
        peft_model(**batch, labels=LABELS).loss.backward()
        optimizer.step()
        masker.step = 0
        trained = peft_model(**batch).logits
    assert torch.equal(base_weight, before)
    row = embedding.weight[token.id].detach()
    assert not torch.allclose(row, before[token.id], atol=1e-4)

    peft_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(t.shape) for name, t in saved.items() if "trainable_tokens" in name] == [(1, before.shape[1])]
    assert not any(tensor.shape[0] == before.shape[0] for tensor in saved.values())
    fresh, _ = build(family)
    with torch.no_grad():
        fresh.get_input_embeddings().weight.copy_(before)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True).train()
    torch.testing.assert_close(reloaded.get_base_model().get_input_embeddings().weight[token.id], row)
    with TokenMasker.attach(reloaded, tokenizer, config):
        torch.testing.assert_close(reloaded(**batch).logits, trained)


def test_the_spare_row_is_written_below_peft_for_other_trained_rows():
    """PEFT's wrapper hands out a merged copy as `weight`; writing into it would be lost."""
    model, tokenizer = build("qwen2")
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    with TokenMasker.attach(lora(model, trainable_token_indices=[7]), tokenizer, TokenMaskConfig(p=0.5)):
        assert_typical(weight[-1].detach(), before[: len(tokenizer)])
    assert torch.equal(weight, before)


def four_bit(folder):
    """Save a tiny model and load it in NF4, as a user would."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (it has no macOS wheels)")
    import bitsandbytes as bnb

    shape = {"hidden_size": 64, "intermediate_size": 64}
    model, tokenizer = build("qwen2", **shape)
    model.save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu"
    )
    quantized = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(quantized) == 14
    for module in quantized:
        # Otherwise an eval forward repacks the weights for avx512_bf16, and later gradients are lost.
        module.support_avx512bf16_for_cpu = False
    return model, tokenizer


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_4_bit_model_is_masked(checkpointing, tmp_path):
    model, tokenizer = four_bit(tmp_path)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    model = lora(model).train()
    batch = encode(tokenizer)
    with (
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker,
        seen_ids(model.get_base_model()) as seen,
    ):
        output = model(**batch, labels=LABELS)
        output.loss.backward()
        with masker.paused():
            # Ids that pool at the same place: the mask token is no padding token.
            torch.testing.assert_close(model(**{**batch, "input_ids": seen[0]}).logits, output.logits)
            assert not torch.allclose(model(**batch).logits, output.logits, atol=1e-3)
    gradients = [weight.grad for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("masker_first", [True, False])
def test_neftune_and_masking_go_together(masker_first):
    """Both hook the embedding; each must survive the other."""
    model, tokenizer = build("qwen2")
    embedding = model.train().get_input_embeddings()
    ids = encode(tokenizer)["input_ids"]
    steps = [lambda: TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)), lambda: activate_neftune(model, 1.0)]
    made = [step() for step in (steps if masker_first else steps[::-1])]
    masker, noise = made if masker_first else made[::-1]
    with seen_ids(model) as seen:
        noisy = embedding(ids)
    clean = torch.nn.functional.embedding(seen[0], embedding.weight)
    assert (seen[0] == masker.mask_token.id).any()
    # The noise is on top of the masked embedding, and no larger than NEFTune says.
    assert 0 < (noisy - clean).abs().max() <= 1.0 / (ids.shape[1] * 32) ** 0.5
    deactivate_neftune(model, noise)
    masker.step = 0
    assert torch.equal(embedding(ids), clean)
    masker.detach()
    assert torch.equal(embedding(ids), torch.nn.functional.embedding(ids, embedding.weight))

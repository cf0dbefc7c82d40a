"""Backbones whose answer depends on the padding, or whose ids reach the lookup in another way than those of most."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import TEXTS, seen_ids, tiny_tokenizer

from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import ModelError
from tokmask_peft.inference.forward import Forward
from tokmask_peft.masking.embedding import Occlusion
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.pattern import maskable_table, masked_positions
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import ModelConfig

CPU = torch.device("cpu")
SIZE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
SIZES = {
    "XLNet": {"n_layer": 2, "n_head": 4, "d_model": 32, "d_inner": 48},
    "T5": {"num_layers": 1, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48, "is_encoder_decoder": False},
    "Canine": {**SIZE, "local_transformer_stride": 8},
}


def build(name, head="SequenceClassification", **more):
    tokenizer = tiny_tokenizer("wordpiece")
    sizes = {**SIZES.get(name, SIZE), **more, "vocab_size": len(tokenizer), "pad_token_id": 0, "num_labels": 3}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}For{head}")(getattr(transformers, f"{name}Config")(**sizes))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model, tokenizer


@pytest.fixture
def load(tmp_path):
    def make(name, task="sequence", precision="fp32", **more):
        model, tokenizer = build(name, **more)
        model.base_model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        config = ModelConfig(backbone=str(tmp_path), precision=precision, quantization="none")
        return load_backbone(config, task, ("a", "b", "c"), CPU)

    return make


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_model_that_pools_the_last_position_is_padded_on_the_left(load, precision, tolerance):
    backbone = load("XLNet", precision=precision)
    assert backbone.tokenizer.padding_side == "left"
    assert "left" in {decision.choice for decision in backbone.decisions if decision.what == "padding"}
    windows = list(Encoder(backbone.tokenizer, "sequence", 64).windows(TEXTS))
    forward = Forward(backbone.model.eval(), backbone.tokenizer.pad_token_id, "sequence", backbone.dtype, "left")
    together, alone = forward.logits(windows, 8), forward.logits(windows, 1)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(*map(torch.tensor, (one, other)), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("name", "task"), [("FNet", "sequence"), ("FNet", "token"), ("ConvBert", "token"), ("Canine", "sequence")]
)
def test_a_model_that_reads_its_padding_is_refused(load, name, task):
    with pytest.raises(ModelError, match="use another backbone") as caught:
        load(name, task)
    assert caught.value.code == "reads-padding"
    assert caught.value.fields["model"].startswith(f"{name}For")


@pytest.mark.parametrize(
    "config", [{"conv_kernel_size": 64}, {"num_landmarks": 4, "segment_means_seq_len": 16}, {"num_landmarks": 0}]
)
def test_a_model_that_cannot_read_a_text_is_refused(load, config):
    with pytest.raises(ModelError, match="use another backbone") as caught:
        load("Nystromformer", **config)
    assert caught.value.code == "cannot-read"
    assert type(caught.value.__cause__).__name__ in str(caught.value)


def test_no_random_numbers_are_drawn_and_words_are_padded_on_the_right(load):
    torch.manual_seed(5)
    backbone = load("XLNet", "token")
    assert backbone.tokenizer.padding_side == "right"
    drawn = torch.rand(1)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokmask_peft.model.backbone.padding_side", lambda *_: "right")
        load("XLNet", "token")
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_a_model_that_takes_packed_rows_is_not_asked(load, monkeypatch, name):
    monkeypatch.setattr(f"transformers.{name}ForSequenceClassification.forward", lambda *_: pytest.fail("asked"))
    assert load(name).tokenizer.padding_side == "right"


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_ids_that_reach_the_lookup_transposed_are_masked_as_texts(unit):
    model, tokenizer = build("XLNet")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    ids = batch["input_ids"]
    config = TokenMaskConfig(p=0.5, unit=unit, span_length=2)
    with TokenMasker.attach(model.train(), tokenizer, config) as masker:
        with seen_ids(model) as seen:
            model(**batch)
        mask = masker.mask_token.id
    maskable = maskable_table(tokenizer, len(tokenizer), set())[ids]
    starts = torch.tensor(
        [not token.startswith("##") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    )
    expected = masked_positions(ids, 0.5, 0, 0, 0, maskable, starts[ids], unit, config.span_length)
    assert expected.any()
    assert torch.equal(seen[0], torch.where(expected, mask, ids).T)
    with Occlusion(model, tokenizer).at(expected), seen_ids(model) as seen:
        model(**batch)
    assert torch.equal(seen[0], torch.where(expected, mask, ids).T)


@pytest.mark.parametrize("trained_row", [False, True])
def test_an_encoder_with_a_lookup_of_its_own_is_masked(tmp_path, trained_row):
    model, tokenizer = build("T5", "TokenClassification")
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path).train()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    if trained_row:
        model = get_peft_model(model, LoraConfig(trainable_token_indices={"embed_tokens": [4]})).train()
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5, trainable_mask=trained_row)) as masker:
        masked = model(**batch).logits
        assert 0.3 < masker.observed_rate < 0.7
    assert not torch.allclose(masked, model(**batch).logits)

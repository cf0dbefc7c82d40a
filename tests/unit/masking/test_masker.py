"""What a model computes while its input is masked, for each architecture."""

import pytest
import torch
from scipy import stats
from tiny_models import TEXTS, build, causal_families, encode, families, seen_ids, token_families
from transformers import AddedToken

from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.recipe import TokenMaskConfig

BOTH = ["bert", "qwen2"]  # an encoder and a decoder
TOKENIZERS = ["bert", "xlm-r", "modernbert", "qwen2", "llama"]  # a family for each kind


def special(tokenizer, ids):
    return torch.isin(ids, torch.tensor(tokenizer.all_special_ids))


def masked_ids(model, tokenizer, batch, masker):
    """Run a training forward; return the output and the ids that the embedding saw."""
    model.train()
    with seen_ids(model) as seen:
        output = model(**batch)
    assert len(seen) == 1
    return output, seen[0]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_share_is_the_rate_and_specials_stay(family):
    model, tokenizer = build(family)
    rate = 0.3
    model.train()
    batch = encode(tokenizer)
    fixed = special(tokenizer, batch["input_ids"])
    changed = count = 0
    # Only the lookup is run: the share needs many forwards, the rest of the model none.
    embedding = model.get_input_embeddings()
    for seed in range(4):
        with (
            TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=rate), seed=seed) as masker,
            seen_ids(model) as seen,
        ):
            for _ in range(20):
                embedding(batch["input_ids"])
        for ids in seen:
            swapped = ids == masker.mask_token.id
            assert not (swapped & fixed & (batch["input_ids"] != masker.mask_token.id)).any()
            assert torch.equal(ids[~swapped], batch["input_ids"][~swapped])
            changed += int((swapped & ~fixed).sum())
            count += int((~fixed).sum())
        assert masker.observed_rate == pytest.approx(rate, abs=0.1)
    assert stats.binomtest(changed, count, rate).pvalue > 1e-4


@pytest.mark.parametrize(
    ("family", "unit"), [("bert", "word"), ("xlm-r", "span"), ("qwen2", "span"), ("llama", "word")]
)
def test_words_are_masked_whole(family, unit):
    model, tokenizer = build(family)
    batch = encode(tokenizer)
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5, unit=unit, span_length=2)) as masker:
        _, ids = masked_ids(model, tokenizer, batch, masker)
    fixed = special(tokenizer, batch["input_ids"])
    swapped = (ids != batch["input_ids"]) & ~fixed
    begins = [
        not token.startswith("##") if family == "bert" else token[0] in "Ġ▁"
        for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ]
    goes_on = ~torch.tensor(begins)[batch["input_ids"]][:, 1:] & ~fixed[:, 1:] & ~fixed[:, :-1]
    assert goes_on.sum() > 10
    assert swapped.any()
    assert torch.equal(swapped[:, 1:][goes_on], swapped[:, :-1][goes_on])


@pytest.mark.parametrize("family", token_families)
def test_token_logits_equal_those_of_the_masked_ids(family):
    model, tokenizer = build(family, task="token")
    batch = encode(tokenizer)
    labels = torch.where(special(tokenizer, batch["input_ids"]), -100, batch["input_ids"] % 3)
    before = batch["input_ids"].clone()
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.4)) as masker:
        output, ids = masked_ids(model, tokenizer, {**batch, "labels": labels}, masker)
        with masker.paused():
            expected = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels)
            unmasked = model(**batch)
    assert torch.equal(batch["input_ids"], before)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert not torch.allclose(output.logits, unmasked.logits, atol=1e-3)


@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_sequence_logits_pool_where_the_real_text_ends(family, padding_side):
    model, tokenizer = build(family)
    batch = encode(tokenizer, padding_side=padding_side)
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.4)) as masker:
        output, ids = masked_ids(model, tokenizer, batch, masker)
        with masker.paused():
            expected = reference_logits(family, model, ids, batch)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-6)


def reference_logits(family, model, ids, batch):
    """Feed the masked ids, but pool at the last real token (causal) as the attention mask knows it."""
    if family not in causal_families:
        return model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    columns = torch.arange(ids.shape[1])
    last = (columns * batch["attention_mask"]).argmax(dim=1)
    hidden = model.base_model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
    return model.score(hidden)[torch.arange(len(ids)), last]


@pytest.mark.parametrize("family", causal_families)
def test_pooling_survives_a_mask_token_that_is_the_padding_token(family):
    """In the authors' code masked positions move the pooled one; here even mask = pad does no harm."""
    model, tokenizer = build(family)
    batch = encode(tokenizer)
    token = MaskToken(tokenizer.pad_token_id, "id", "on purpose")
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.7), mask_token=token) as masker:
        output, ids = masked_ids(model, tokenizer, batch, masker)
        with masker.paused():
            expected = reference_logits(family, model, ids, batch)
            moved = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(output.logits, moved, atol=1e-3)


@pytest.mark.parametrize("family", BOTH)
def test_eval_mode_and_pause_mask_nothing(family):
    model, tokenizer = build(family)
    batch = encode(tokenizer)
    expected = model(**batch).logits
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.9)) as masker:
        assert torch.equal(model.eval()(**batch).logits, expected)
        with masker.paused():
            assert torch.equal(model.train()(**batch).logits, expected)
        assert masker.step == 0
        assert not torch.equal(model.train()(**batch).logits, expected)
        assert masker.step == 1


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(family, use_reentrant):
    """The embedding is looked up once, so that the recomputed layers see the same masked text."""
    gradients = []
    for checkpointing in (False, True):
        model, tokenizer = build(family)
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
            assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker:
            model(**encode(tokenizer), labels=torch.arange(len(TEXTS)) % 3).loss.backward()
            assert masker.step == 1
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_int32_ids_a_single_text_and_the_keyword_argument():
    model, tokenizer = build("bert")
    embedding = model.train().get_input_embeddings()
    ids = encode(tokenizer)["input_ids"]
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker:
        outputs = []
        for call in (lambda: embedding(ids), lambda: embedding(ids.to(torch.int32)), lambda: embedding(input=ids)):
            masker.step = 0
            outputs.append(call())
        masker.step = 0
        outputs.append(torch.stack([embedding(ids[0]), *outputs[0][1:]]))
    assert not torch.equal(outputs[0], embedding(ids))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_left_padding_is_masked_as_right_padding(unit):
    model, tokenizer = build("qwen2")
    seen = {}
    for side in ("right", "left"):
        batch = encode(tokenizer, padding_side=side)
        with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5, unit=unit)) as masker:
            _, ids = masked_ids(model, tokenizer, batch, masker)
        seen[side] = [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"], strict=True)]
    assert seen["left"] == seen["right"]


def test_protected_ids_stay_and_break_words():
    model, tokenizer = build("llama")
    batch = encode(tokenizer)
    frequent = batch["input_ids"].flatten().mode().values.item()
    frequent = tokenizer.convert_tokens_to_ids("sta") if frequent in tokenizer.all_special_ids else frequent
    config = TokenMaskConfig(p=0.9, unit="word", protect=(frequent,))
    with TokenMasker.attach(model, tokenizer, config) as masker:
        _, ids = masked_ids(model, tokenizer, batch, masker)
    kept = batch["input_ids"] == frequent
    assert kept.any()
    assert (ids[kept] == frequent).all()


def test_specials_that_only_the_backend_knows_and_padding_that_only_the_model_knows_stay():
    model, tokenizer = build("qwen2")
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    tokenizer.pad_token = None
    model.config.pad_token_id = 40
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    embedding = model.train().get_input_embeddings()
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.9)) as masker, seen_ids(model) as seen:
        embedding(torch.tensor([[tool, 40, 41] * 30]))
    assert (seen[0].reshape(30, 3)[:, :2] == torch.tensor([tool, 40])).all()
    assert (seen[0].reshape(30, 3)[:, 2] == masker.mask_token.id).any()

"""Attaching, detaching, the mask row, saved state, and what is refused."""

import json
import math
import warnings

import pytest
import torch
from tiny_models import assert_typical, build, encode, seen_ids, tiny_tokenizer
from transformers import CanineConfig, CanineForSequenceClassification

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe import TokenMaskConfig


def hooks(model):
    return len(model.get_input_embeddings()._forward_pre_hooks)


def test_detach_takes_the_hook_off_and_may_be_repeated():
    model, tokenizer = build("bert")
    masker = TokenMasker.attach(model, tokenizer)
    assert (hooks(model), masker.attached) == (1, True)
    masker.detach()
    masker.detach()
    assert (hooks(model), masker.attached) == (0, False)


def test_the_context_manager_detaches_when_training_raises():
    model, tokenizer = build("bert")
    with pytest.raises(KeyboardInterrupt), TokenMasker.attach(model, tokenizer):
        raise KeyboardInterrupt
    assert hooks(model) == 0


def test_pause_and_layout_end_when_their_body_raises():
    model, tokenizer = build("bert")
    embedding, ids = model.train().get_input_embeddings(), encode(tokenizer)["input_ids"]
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker, seen_ids(model) as seen:
        embedding(ids)
        one = torch.zeros(1, 1, dtype=torch.int64)
        with pytest.raises(ZeroDivisionError), masker.paused(), masker.layout(one, one):
            raise ZeroDivisionError
        masker.step = 0
        embedding(ids)
    assert not torch.equal(seen[0], ids)
    assert torch.equal(seen[0], seen[1])


def test_attaching_twice_is_refused_and_after_detach_allowed():
    model, tokenizer = build("bert")
    with TokenMasker.attach(model, tokenizer), pytest.raises(MaskTokenError, match=r"detach\(\) it first") as refused:
        TokenMasker.attach(model, tokenizer)
    assert refused.value.code == "masker-attached"
    first = TokenMasker.attach(model, tokenizer, replaceable=True)
    with TokenMasker.attach(model, tokenizer) as second:
        assert (hooks(model), first.attached, second.attached) == (1, False, True)


def test_the_rate_is_checked_and_read_back():
    model, tokenizer = build("bert")
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3, schedule="linear", p_start=0.1)) as masker:
        assert masker.rate == 0.1
        masker.rate = 0.25
        assert masker.rate == 0.25
        for wrong in (-0.1, 1.0, float("nan")):
            with pytest.raises(MaskTokenError) as refused:
                masker.rate = wrong
            assert refused.value.code == "rate-outside"


def test_the_spare_row_is_prepared_when_the_masker_is_attached_and_restored():
    model, tokenizer = build("qwen2")
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    before = weight.clone()
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.2, schedule="linear")) as masker:
        assert_typical(weight[-1], before[: len(tokenizer)])
        prepared = weight.clone()
        masker.rate = 0.3
        assert torch.equal(weight, prepared)
        assert torch.equal(weight[:-1], before[:-1])
    assert torch.equal(weight, before)


def test_a_config_that_never_masks_leaves_the_spare_row_and_lets_no_rate_use_it():
    model, tokenizer = build("qwen2")
    weight = model.get_input_embeddings().weight
    before = weight.clone()
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.0)) as masker:
        masker.rate = 0.0
        with pytest.raises(MaskTokenError, match="attach with p above 0") as refused:
            masker.rate = 0.2
        assert refused.value.code == "mask-row-not-prepared"
        assert torch.equal(weight, before)


def test_only_training_forwards_with_gradients_are_masked_and_counted():
    model, tokenizer = build("bert")
    embedding, ids = model.train().get_input_embeddings(), encode(tokenizer)["input_ids"]
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)) as masker, seen_ids(model) as seen:
        with torch.no_grad():
            embedding(ids)
        with torch.inference_mode():
            embedding(ids)
        masker.enabled = False
        embedding(ids)
        assert all(torch.equal(one, ids) for one in seen)
        assert masker.step == 0
        assert math.isnan(masker.observed_rate)


def test_a_row_that_full_fine_tuning_trains_is_kept():
    model, tokenizer = build("qwen2")
    weight = model.get_input_embeddings().weight
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3)), torch.no_grad():
        weight[-1] += 1
        trained = weight[-1].clone()
    assert torch.equal(weight[-1], trained)
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3), resumed=True):
        assert torch.equal(weight[-1], trained)


def test_the_masker_follows_a_model_that_moves():
    model, tokenizer = build("bert")
    masker = TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.3, unit="word"))
    model.train().to("meta")
    ids = encode(tokenizer)["input_ids"].to("meta")
    assert model.get_input_embeddings()(ids).device.type == "meta"
    assert {masker._step.device.type, masker._maskable.device.type, masker._word_starts.device.type} == {"meta"}


def test_state_is_json_and_goes_on_where_it_was_taken():
    model, tokenizer = build("bert")
    batch, config = encode(tokenizer), TokenMaskConfig(p=0.4)
    model.train()
    with TokenMasker.attach(model, tokenizer, config, seed=5) as masker:
        model(**batch)
        masker.rate = 0.5
        state = json.loads(json.dumps(masker.state_dict()))
        with seen_ids(model) as expected:
            model(**batch)
    with TokenMasker.attach(model, tokenizer, config, seed=5) as masker:
        masker.load_state_dict(state)
        assert (masker.step, masker.rate) == (1, 0.5)
        with seen_ids(model) as seen:
            model(**batch)
    assert torch.equal(seen[0], expected[0])
    with TokenMasker.attach(model, tokenizer, config, seed=6) as masker:
        with pytest.raises(MaskTokenError, match="seed was 5, is 6") as refused:
            masker.load_state_dict(state)
        assert (refused.value.code, refused.value.fields) == ("resume-differs", {"differing": ["seed"]})
        assert masker.step == 0


def test_a_state_saved_before_a_key_existed_is_loaded():
    model, tokenizer = build("bert")
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.4)) as masker:
        state = masker.state_dict()
        del state["config"]["replace"]
        masker.load_state_dict({**state, "step": 7})
        assert masker.step == 7


def test_the_seed_of_the_config_wins_even_if_zero():
    model, tokenizer = build("bert")
    for config, seed, expected in (
        (TokenMaskConfig(seed=0), 9, 0),
        (TokenMaskConfig(), 9, 9),
        (TokenMaskConfig(), None, 0),
    ):
        with TokenMasker.attach(model, tokenizer, config, seed=seed) as masker:
            assert masker.seed == expected


def test_a_masker_that_saw_no_training_forward_says_why():
    model, tokenizer = build("bert")  # in eval mode, as from_pretrained returns it
    with pytest.warns(UserWarning, match=r"call model.train\(\)"), TokenMasker.attach(model, tokenizer):
        model(**encode(tokenizer))
    with warnings.catch_warnings(action="error"), TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.0)):
        model(**encode(tokenizer))
    with warnings.catch_warnings(action="error"), TokenMasker.attach(model, tokenizer):
        model.train()(**encode(tokenizer))


def test_models_that_cannot_be_masked_are_refused():
    model, tokenizer = build("bert")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    letters = CanineForSequenceClassification(CanineConfig(**shape))  # it hashes them
    for wrong, code in (
        (torch.nn.Linear(2, 2), "no-embedding"),
        (letters, "no-embedding"),
        (torch.nn.DataParallel(model), "data-parallel"),
    ):
        with pytest.raises(MaskTokenError) as refused:
            TokenMasker.attach(wrong, tokenizer)
        assert refused.value.code == code
    with pytest.raises(MaskTokenError, match="remove these ids") as refused:
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(protect=(4, 999)))
    assert (refused.value.code, refused.value.fields["ids"]) == ("protect-outside", [999])
    with pytest.raises(MaskTokenError) as refused:
        TokenMasker.attach(model.requires_grad_(False), tokenizer, TokenMaskConfig(trainable_mask=True))
    assert refused.value.code == "mask-row-frozen"
    assert hooks(model) == 0
    model.bert.embed_tokens_per_layer = torch.nn.Embedding(150, 4)
    with pytest.raises(MaskTokenError, match="use a") as refused:
        TokenMasker.attach(model, tokenizer)
    assert refused.value.code == "per-layer-embeddings"


@pytest.mark.parametrize(("p", "replace"), [(0.0, "token"), (0.0, "drop"), (0.5, "drop"), (0.5, "random")])
def test_a_mask_token_is_needed_only_where_it_would_stand(p, replace):
    model, tokenizer = build("gpt2", vocab_size=len(tiny_tokenizer("bytelevel")))
    tokenizer.unk_token = tokenizer.eos_token
    batch = encode(tokenizer)
    with pytest.raises(MaskTokenError) as refused:
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5))
    assert refused.value.code == "no-mask-token"
    with TokenMasker.attach(model.train(), tokenizer, TokenMaskConfig(p=p, replace=replace)) as masker:
        with seen_ids(model) as seen:
            model(**batch)
        assert torch.equal(seen[0], batch["input_ids"]) == (replace != "random")
        assert (masker.observed_rate > 0.2) == (p > 0)
        masker.load_state_dict(json.loads(json.dumps(masker.state_dict())))
        if p > 0 or replace == "drop":
            masker.rate = 0.4
        else:
            with pytest.raises(MaskTokenError) as refused:
                masker.rate = 0.4
            assert refused.value.code == "no-mask-token"


def test_what_could_not_drop_is_refused_once_it_is_asked_to():
    model, tokenizer = build("t5")
    with TokenMasker.attach(model.train(), tokenizer, TokenMaskConfig(p=0.0, replace="drop")) as masker:
        with seen_ids(model.get_encoder()) as seen:
            model(**encode(tokenizer))
        assert torch.equal(seen[0], encode(tokenizer)["input_ids"])
        with pytest.raises(MaskTokenError) as refused:
            masker.rate = 0.5
        assert (refused.value.code, masker.rate) == ("cannot-drop", 0.0)

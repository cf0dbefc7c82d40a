"""A decoder that sees the whole text: packed is padded is alone, as far as its windows go; others are refused."""

import pytest
import torch
from test_padding_free import adapted, alone, assert_same, pack, texts_of
from tiny_models import build, causal_families, encode
from transformers import BloomConfig, BloomForTokenClassification

from tokmask_peft.errors import ModelError
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model import packed
from tokmask_peft.model.families import family_of
from tokmask_peft.model.layers import choose_label_on, see_both_ways
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig

_QWEN = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0}
_GEMMA = {"sliding_window": 3, "layer_types": ["sliding_attention"] * 2}
WINDOWS = {"mistral": {"sliding_window": 3}, "qwen2": _QWEN, "qwen3": _QWEN, "gemma3": _GEMMA}
CASES = [*((family, {}) for family in causal_families), *WINDOWS.items()]


def both_ways(family, **settings):
    model, _ = build(family, **settings)
    see_both_ways(model)
    return model


def bent(model):
    """Return [seq, seq]: which position a layer takes into account at which."""
    states = torch.randn(1, 9, model.config.hidden_size, requires_grad=True)
    found = model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
    gradients = [torch.autograd.grad(found[0, at].sum(), states, retain_graph=True)[0][0] for at in range(9)]
    return torch.stack([gradient.abs().sum(-1) > 0 for gradient in gradients])


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_packed_is_padded_is_alone(family, settings):
    tokenizer, reference = build(family)[1], adapted(both_ways(family, **settings))
    ids, causal = texts_of(tokenizer), alone(adapted(build(family, **settings)[0]), texts_of(tokenizer))
    expected = alone(reference, ids)
    assert (expected - causal).abs().max() > 0.01
    torch.testing.assert_close(reference(**encode(tokenizer)).logits, expected, atol=1e-5, rtol=0)
    model = both_ways(family, **settings)
    if family_of(model) is not None:
        enable_padding_free(model)
        model = adapted(model)
        assert_same(model(**pack(ids)).logits, model, expected, reference)
        masking = TokenMaskConfig(p=0.5)
        with TokenMasker.attach(model, tokenizer, masking), TokenMasker.attach(reference, tokenizer, masking):
            logits, masked = model(**pack(ids)).logits, reference(**encode(tokenizer)).logits
        assert (masked - expected).abs().max() > 0.01
        torch.testing.assert_close(logits, masked, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_sub_token_sees_what_is_after_it_as_far_as_what_is_before(family, settings):
    if "layer_types" in settings:
        settings = {**settings, "layer_types": ["sliding_attention"]}
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    reached = torch.ones(9, 9, dtype=torch.bool) if not settings else distance <= settings["sliding_window"]
    assert torch.equal(bent(both_ways(family, num_hidden_layers=1, **settings)), reached)
    before = bent(build(family, num_hidden_layers=1, **settings)[0])
    assert torch.equal(before, (reached if not settings else distance < settings["sliding_window"]).tril())


@pytest.mark.parametrize("family", WINDOWS)
def test_the_kernel_of_a_gpu_gets_the_same_window(family, monkeypatch):
    """In one bucket, as on a GPU without a kernel for packed rows, and by the bounds that such a kernel gets."""
    model, tokenizer = both_ways(family, **WINDOWS[family]), build(family)[1]
    if family_of(model) is None:
        pytest.skip("no packed rows")
    ids, sides = texts_of(tokenizer), set()
    expected = alone(model, ids)
    enable_padding_free(model)

    def bounded(rows, packing, causal, window, *rest):
        packed._varlen_attention(lambda *_, window_size, **__: sides.add(window_size), rows, packing, causal, window, 1)
        return in_buckets(rows, packing, causal, window, *rest)

    in_buckets = packed.attend_in_buckets
    monkeypatch.setattr(packed, "attend_in_buckets", bounded)
    monkeypatch.setattr(packed, "_buckets", lambda lengths: [(None, max(lengths), True)])
    torch.testing.assert_close(model(**pack(ids)).logits, expected, atol=1e-5, rtol=0)
    assert sides == {(3, 3)}


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "bart"])
def test_others_are_refused(family):
    model, _ = build(family)
    with pytest.raises(ModelError, match="set it to causal") as caught:
        see_both_ways(model)
    assert (caught.value.code, caught.value.fields) == ("attention", {"model": type(model).__name__})


@pytest.mark.parametrize(("family", "expected"), [("bert", "first"), ("t5", "first"), ("qwen2", "last")])
def test_which_sub_token_carries_a_label(family, expected):
    model, _ = build(family, task="token")
    assert choose_label_on("auto", model).choice == expected
    if expected == "last":
        see_both_ways(model)
        assert choose_label_on("auto", model).choice == expected
    assert choose_label_on("first", model).choice == "first"


def test_a_decoder_without_causal_modules_labels_the_last_sub_token():
    config = BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)
    assert choose_label_on("auto", BloomForTokenClassification(config)).choice == "last"

"""T5, mT5 and BART: which of encoder and decoder is masked, where, and what cannot be done."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TEXTS, build, encode, encoder_decoders, tiny_tokenizer

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.embedding import Occlusion, find_decoder_embedding, find_embedding
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import choose_mask_token
from tokmask_peft.recipe import TokenMaskConfig

LABELS = torch.arange(len(TEXTS)) % 3


def looked_up(model):
    """Collect the ids of every lookup as (part, ids)."""
    seen = []
    for part, lookup in (("encoder", find_embedding(model)), ("decoder", find_decoder_embedding(model))):
        lookup.register_forward_pre_hook(lambda _, args, part=part: seen.append((part, args[0].clone())))
    return seen


def generating(family, **settings):
    """Return a model that generates, its tokenizer, and a batch whose labels are texts, the first word a prompt."""
    model, tokenizer = build(family, "text")
    batch = encode(tokenizer)
    labels = encode(tokenizer, TEXTS[::-1])["input_ids"]
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    labels[:, :3] = -100
    return (
        get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear")).train(),
        (tokenizer),
        {**batch, "labels": labels, **settings},
    )


@pytest.mark.parametrize("family", encoder_decoders)
@pytest.mark.parametrize("decoder_p", [0.0, 0.5])
def test_the_encoder_alone_is_masked_unless_the_decoder_has_a_rate(family, decoder_p):
    model, tokenizer, batch = generating(family)
    config = TokenMaskConfig(p=0.5, decoder_p=decoder_p)
    with TokenMasker.attach(model, tokenizer, config) as masker:
        seen = looked_up(model)
        model(**batch)
        assert masker.step == 1
        with masker.paused():
            model(**batch)
    share = [(ids == tokenizer.mask_token_id).float().mean().item() for _, ids in seen]
    assert [part for part, _ in seen] == ["encoder", "decoder"] * 2
    assert share[0] > 0.1
    assert (share[1] > 0.1) == (decoder_p > 0)
    assert share[2:] == [0, 0]
    (_, encoder), (_, decoder), (_, clean), (_, clean_decoder) = seen
    fixed = torch.tensor([*tokenizer.all_special_ids])
    for masked, before in ((encoder, clean), (decoder, clean_decoder)):
        assert torch.equal(masked[torch.isin(before, fixed)], before[torch.isin(before, fixed)])
    width = min(encoder.shape[1], decoder.shape[1])
    if decoder_p:  # drawn apart
        assert not torch.equal(*((ids == tokenizer.mask_token_id)[:, :width] for ids in (encoder, decoder)))


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(("where", "masked"), [("prompt", (True, False)), ("completion", (False, True))])
def test_prompt_and_completion_are_encoder_and_scored_part_of_the_decoder(family, where, masked):
    model, tokenizer, batch = generating(family)
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5, decoder_p=0.9, where=where)):
        seen = looked_up(model)
        model(**batch)
    (_, encoder), (_, decoder) = seen
    mask = tokenizer.mask_token_id
    assert ((encoder == mask).any().item(), (decoder == mask).any().item()) == masked
    if where == "completion":  # BOS, then what stands for the three labels that are -100
        assert not (decoder[:, :4] == mask).any()
        assert (decoder[:, 4] == mask).any()


@pytest.mark.parametrize("family", encoder_decoders)
@pytest.mark.parametrize("replace", ["token", "random"])
def test_a_classifier_whose_decoder_reads_the_text_again_does_not_see_it_there(family, replace):
    model, tokenizer = build(family)
    batch = encode(tokenizer)
    with TokenMasker.attach(model.train(), tokenizer, TokenMaskConfig(p=0.5, replace=replace)):
        seen = looked_up(model)
        model(**batch, labels=LABELS).loss.backward()
    (_, encoder), (_, decoder) = seen
    assert (encoder != batch["input_ids"]).float().mean() > 0.1
    assert torch.equal(decoder[:, 1:], encoder[:, :-1])
    with Occlusion(model, tokenizer).at(batch["input_ids"] == 7):
        seen = looked_up(model)
        model.eval()(**batch)
    (_, encoder), (_, decoder) = seen
    assert (batch["input_ids"] == 7).any()
    assert not (encoder == 7).any()
    assert torch.equal(decoder[:, 1:], encoder[:, :-1])


@pytest.mark.parametrize(
    ("family", "task", "config", "code"),
    [
        ("bart", "text", {"replace": "drop"}, "cannot-drop"),
        ("t5", "sequence", {"replace": "drop"}, "cannot-drop"),
        ("t5", "sequence", {"decoder_p": 0.1}, "no-decoder"),
        ("bert", "sequence", {"decoder_p": 0.1}, "no-decoder"),
        ("t5", "text", {"where": "completion"}, "masked-nothing"),
    ],
)
def test_what_cannot_be_masked_is_refused(family, task, config, code):
    model, tokenizer = build(family, task)
    with pytest.raises(MaskTokenError) as refused:
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(**config))
    assert refused.value.code == code
    assert not find_embedding(model)._forward_pre_hooks


def test_one_lookup_for_both_parts_is_refused():
    model, tokenizer = build("bart", "text")
    model.set_input_embeddings(torch.nn.Embedding(*model.get_input_embeddings().weight.shape))
    with pytest.raises(MaskTokenError, match="use a") as refused:
        TokenMasker.attach(model, tokenizer)
    assert refused.value.code == "encoder-decoder"


def test_labels_that_do_not_reach_the_model_decide_nothing():
    model, tokenizer = build("qwen2")
    config = TokenMaskConfig(p=0.5, where="prompt")
    with TokenMasker.attach(model.train(), tokenizer, config), pytest.raises(MaskTokenError) as refused:
        model(**encode(tokenizer), labels=LABELS)
    assert (refused.value.code, refused.value.fields) == ("no-labels", {"where": "prompt"})
    for where in ("prompt", "completion"):  # of nothing
        with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0, where=where)) as masker:
            assert model(**encode(tokenizer), labels=LABELS).loss.isfinite()
            assert masker.observed_rate == 0


@pytest.mark.parametrize(("sentinel", "special"), [("<extra_id_0>", True), ("▁<extra_id_0>", False)])
def test_the_sentinel_of_t5_is_a_mask_token(sentinel, special):
    tokenizer = tiny_tokenizer("unigram")
    tokenizer.mask_token = None
    tokenizer.add_special_tokens({"extra_special_tokens": [sentinel]}) if special else tokenizer.add_tokens([sentinel])
    found = choose_mask_token(tokenizer, len(tokenizer))
    assert choose_mask_token(tokenizer, len(tokenizer), found.id).id == found.id, "as adapters and checkpoints name it"
    assert (found.id, found.kind) == (len(tokenizer) - 1, "mask")
    assert choose_mask_token(tokenizer, len(tokenizer) - 1).kind == "unk"

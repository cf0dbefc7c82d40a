"""`replace: drop`: the model computes the text without the dropped sub-tokens; packed, padded, and by itself."""

import pytest
import torch
from test_padding_free import adapted, alone, assert_same, pack, texts_of
from tiny_models import build, encode
from transformers import OPTConfig, OPTForSequenceClassification, TrainingArguments

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.layers import pool_texts
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig

DROP = TokenMaskConfig(p=0.5, replace="drop")
CASES = [("bert", "sequence"), ("bert", "token"), ("xlm-r", "sequence"), ("qwen2", "sequence"), ("llama", "token")]


def dropped(masker, ids):
    """Return which sub-tokens of each text the first training forward drops."""
    longest = max(map(len, ids))
    pad = masker._pad_id
    batch = torch.tensor([text + [pad] * (longest - len(text)) for text in ids])
    found = masker.pattern(batch, None, torch.arange(longest)[None], step=0)
    return [row[: len(text)] for row, text in zip(found, ids, strict=True)]


def rest_alone(model, family, ids, gone):
    """Run what is left of each text by itself, at its old positions."""
    offset = model.config.pad_token_id + 1 if family == "xlm-r" else 0
    logits = []
    for text, out in zip(ids, gone, strict=True):
        kept = (~out).nonzero().flatten()
        logits.append(model(input_ids=torch.tensor(text)[kept][None], position_ids=kept[None] + offset).logits)
    return torch.cat(logits, dim=0 if logits[0].dim() == 2 else 1)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_packed_is_what_is_left_of_each_text_by_itself(family, task):
    model, tokenizer = build(family, task=task)
    reference = adapted(build(family, task=task)[0], task)
    enable_padding_free(model)
    model, ids = adapted(model, task), texts_of(tokenizer)
    with TokenMasker.attach(model, tokenizer, DROP) as masker:
        gone = dropped(masker, ids)
        logits = model(**pack(ids)).logits
    assert sum(int(row.sum()) for row in gone) > 20
    kept = ~torch.cat(gone)
    if task == "token":
        assert (logits[0, ~kept] == 0).all()
        logits = logits[:, kept]
    assert_same(logits, model, rest_alone(reference, family, ids, gone), reference)


@pytest.mark.parametrize(
    ("family", "task", "pooling"),
    [
        *((*case, "auto") for case in CASES),
        ("distilbert", "sequence", "auto"),
        ("bert", "sequence", "mean"),
        ("qwen2", "sequence", "max"),
        ("xlm-r", "sequence", "ends"),
    ],
)
def test_padded_is_packed(family, task, pooling):
    model, tokenizer = build(family, task=task)
    pool_texts(model, pooling)
    enable_padding_free(model)
    model, ids, batch = adapted(model, task), texts_of(tokenizer), encode(tokenizer)
    with TokenMasker.attach(model, tokenizer, DROP) as masker:
        gone = dropped(masker, ids)
        packed = model(**pack(ids)).logits
        masker.step = 0
        padded = model(**batch).logits
        assert masker.observed_rate == pytest.approx(0.5, abs=0.15)
    if task == "token":
        real = torch.cat([padded[row, : len(text)] for row, text in enumerate(ids)])
        kept = ~torch.cat(gone)
        padded, packed = real[kept], packed[0, kept]
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)


def test_a_head_that_would_pool_what_is_dropped_is_refused():
    model, tokenizer = build("modernbert", classifier_pooling="mean")
    with pytest.raises(MaskTokenError) as caught:
        TokenMasker.attach(model, tokenizer, DROP)
    assert caught.value.code == "cannot-drop"
    pool_texts(model, "mean")  # ours leaves them out
    TokenMasker.attach(model, tokenizer, DROP).detach()


def test_a_model_whose_positions_follow_the_attention_mask_is_refused():
    _, tokenizer = build("qwen2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    model = OPTForSequenceClassification(OPTConfig(vocab_size=len(tokenizer) + 8, word_embed_proj_dim=16, **sizes))
    with pytest.raises(MaskTokenError) as caught:
        TokenMasker.attach(model, tokenizer, DROP)
    assert caught.value.code == "cannot-drop"
    TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)).detach()


def test_a_model_with_recurrent_layers_is_refused():
    """In Qwen3.5, logits differed from those of the rest of the text by two thirds of what dropping changes."""
    model, tokenizer = build("qwen2")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(MaskTokenError) as caught:
        TokenMasker.attach(model, tokenizer, DROP)
    assert caught.value.code == "cannot-drop"
    TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.5)).detach()


def test_a_row_that_transformers_packs_is_refused():
    """With an attention mask, which dropping needs, transformers no longer tells the texts of such a row apart."""
    model, tokenizer = build("qwen2", task="token")
    ids = texts_of(tokenizer)
    places = torch.cat([torch.arange(len(text)) for text in ids])[None]
    row = {"input_ids": pack(ids)["input_ids"], "position_ids": places, "use_cache": False}
    masker = TokenMasker.attach(model.train(), tokenizer, DROP)
    with pytest.raises(MaskTokenError) as caught:
        model(**row)
    assert caught.value.code == "cannot-drop"
    masker.detach()
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0, replace="drop")):
        torch.testing.assert_close(model(**row).logits, alone(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_a_step_computes_only_what_is_left(family):
    model, tokenizer = build(family)
    enable_padding_free(model)
    ids = texts_of(tokenizer) * 8
    seen = []
    layer = next(module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with TokenMasker.attach(model.train(), tokenizer, DROP):
        model(**pack(ids))
        model.eval()(**pack(ids))
    assert seen[0] < 0.75 * seen[1]


@pytest.mark.parametrize("family", ["bert", "qwen2", "llama"])
def test_first_last_and_one_maskable_token_of_each_text_stay(family):
    model, tokenizer = build(family)
    ids = texts_of(tokenizer)
    special = set(tokenizer.all_special_ids)
    with TokenMasker.attach(model, tokenizer, TokenMaskConfig(p=0.95, replace="drop", unit="token")) as masker:
        for seed in range(20):
            masker.seed = seed
            for text, gone in zip(ids, dropped(masker, ids), strict=True):
                assert not gone[0]
                assert not gone[-1]
                assert any(token not in special and not out for token, out in zip(text, gone, strict=True))


@pytest.mark.parametrize("settings", [{"replace": "drop"}, {"score_masked": False}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_masked_words_carry_no_loss_and_the_rest_is_divided_by_its_number(settings, accumulation, tmp_path):
    from tokmask_peft.tasks import get_task
    from tokmask_peft.training.losses import ClassificationLoss
    from tokmask_peft.training.trainer import OrderedEvalTrainer

    model, tokenizer = build("bert", task="token")
    ids = texts_of(tokenizer)
    rows = [{"input_ids": text, "labels": [-100, *(number % 3 for number in text[1:-1]), -100]} for text in ids]
    asked = []

    class Recording(ClassificationLoss):
        def __call__(self, outputs, labels, num_items_in_batch=None):
            asked.append((labels.clone(), num_items_in_batch))
            return super().__call__(outputs, labels, num_items_in_batch)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows) // accumulation,
        max_steps=1,
        report_to="none",
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        save_strategy="no",
        seed=3,
        disable_tqdm=True,
    )
    trainer = OrderedEvalTrainer(
        model=adapted(model, "token"),
        args=arguments,
        train_dataset=rows,
        compute_loss_func=Recording(),
        data_collator=get_task("token").collator(tokenizer),
        processing_class=tokenizer,
    )
    TokenMaskCallback(TokenMaskConfig(p=0.5, **settings), announce=False).add_to(trainer)
    trainer.train()
    scored = sum(int((labels != -100).sum()) for labels, _ in asked)
    labelled = sum(len(text) - 2 for text in ids)
    assert len(asked) == accumulation
    assert 0.2 * labelled < scored < 0.8 * labelled
    assert {int(items) for _, items in asked} == {scored}

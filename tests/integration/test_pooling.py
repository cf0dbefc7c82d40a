"""`model.pooling` in whole runs: packed as padded, saved, loaded with stock PEFT by the card's lines, not exported."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build, encode

from tokmask_peft import Recipe, load, train
from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.errors import MaskTokenError, ModelError
from tokmask_peft.inference.export import export_merged
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.layers import pool_texts, pooled
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig


@pytest.mark.parametrize("how", ["mean", "max", "ends"])
@pytest.mark.parametrize("family", ["bert", "xlm-r", "distilbert", "modernbert", "qwen2", "gemma3"])
def test_the_head_reads_all_states_packed_or_padded_alone_or_not(family, how):
    model, tokenizer = build(family, task="sequence", labels=3)
    before = model(**encode(tokenizer, TEXTS)).logits
    pool_texts(model, how)
    alone = torch.cat([model(**encode(tokenizer, [text])).logits for text in TEXTS])
    together = model(**encode(tokenizer, TEXTS)).logits
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    assert (together - before).abs().max() > 1e-3
    enable_padding_free(model)
    rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": 0} for text in TEXTS]
    packed = model(**PackedCollator("sequence")(rows)).logits
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)


def test_threads_do_not_pool_with_each_others_padding():
    model, tokenizer = build("distilbert", task="sequence", labels=3)
    pool_texts(model.eval(), "mean")
    batches = [encode(tokenizer, TEXTS[:4]), encode(tokenizer, TEXTS[4:])]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda at: model(**batches[at % 2]).logits, range(80)))
        finally:
            sys.setswitchinterval(before)
    for at, logits in enumerate(found):
        torch.testing.assert_close(logits, expected[at % 2])


def test_padding_is_left_out():
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    torch.testing.assert_close(pooled(states, mask, "mean")[1, 0], states[1, :2].mean(0))
    torch.testing.assert_close(pooled(states, mask, "max")[1, 0], states[1, :2].amax(0))
    for padded, real in ((mask, states[1, :2]), (mask.flip(1), states[1, 3:])):
        torch.testing.assert_close(pooled(states, padded, "ends")[1, 0], real.mean(0))
    torch.testing.assert_close(pooled(states, None, "ends")[0, 0], (states[0, 0] + states[0, 4]) / 2)


@pytest.mark.parametrize(("family", "how"), [("bert", "mean"), ("xlm-r", "max"), ("qwen2", "ends")])
def test_a_run_is_saved_and_loads_with_stock_peft_and_the_lines_of_its_card(write_recipe, tmp_path, family, how):
    both_ways = ["model.attention=bidirectional"] if how == "ends" else []
    changes = [f"model.pooling={how}", "training.max_steps=3", "training.baseline=false", *both_ways]
    run = train(Recipe.load(write_recipe(family), changes), quiet=True)
    adapter = run.folder.adapter
    assert json.loads((adapter / "tokmask.json").read_text())["loading"]["pooling"] == how
    moved = adapter.rename(tmp_path / "moved")  # without the run's recipe
    classifier = load(moved, backbone=run.recipe.model.backbone)
    expected = [list(one.probabilities.values()) for one in classifier.predict(TEXTS)]
    code = (moved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("PATH_OR_HUB_ID", str(moved)).replace('["This phone is bien bonito"]', repr(TEXTS))
    exec(code, made := {})
    stock = made["probabilities"].log().numpy() / classifier.temperature
    stock = np.exp(stock) / np.exp(stock).sum(-1, keepdims=True)
    np.testing.assert_allclose(stock, expected, atol=1e-4)
    with pytest.raises(ModelError) as caught:
        export_merged(moved, tmp_path / "merged", backbone=run.recipe.model.backbone)
    assert caught.value.code == "pooling-not-exportable"


def test_a_head_that_averages_logits_reads_the_first_state_if_asked():
    """EuroBERT keeps what its config says when it is made, and averages all logits by default."""
    pytest.importorskip("transformers.models.eurobert")
    from transformers import EuroBertConfig, EuroBertForSequenceClassification

    _, tokenizer = build("xlm-r")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": len(tokenizer), "num_labels": 3, "pad_token_id": tokenizer.pad_token_id}
    model = EuroBertForSequenceClassification(EuroBertConfig(**sizes))
    with pytest.raises(MaskTokenError) as caught:
        TokenMasker.attach(model, tokenizer, TokenMaskConfig(replace="drop"))
    assert caught.value.code == "cannot-drop"
    pool_texts(model, "cls")
    TokenMasker.attach(model, tokenizer, TokenMaskConfig(replace="drop")).detach()
    batch = encode(tokenizer, TEXTS)
    first = model.base_model(**batch).last_hidden_state[:, 0]
    torch.testing.assert_close(model(**batch).logits, model.classifier(model.activation(model.dense(first))))
    assert type(model)(model.config)(**batch).logits.shape == (len(TEXTS), 3), "as it is exported"


def test_words_are_not_pooled(write_recipe):
    recipe = Recipe.load(write_recipe("bert", "token"), ["model.pooling=mean"])
    loaded = load_backbone(recipe.model, "token", ("a", "b"), torch.device("cpu"))
    assert not hasattr(loaded.model, "text_pooling")
    assert "pooling" not in {one.what for one in loaded.decisions}


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_both_ends_of_a_causal_decoder_name_the_key_that_gives_the_first_one_sight(write_recipe, attention):
    recipe = Recipe.load(write_recipe("qwen2"), ["model.pooling=ends", f"model.attention={attention}"])
    decisions = load_backbone(recipe.model, "sequence", ("a", "b"), torch.device("cpu")).decisions
    (reason,) = (one.reason for one in decisions if one.what == "pooling")
    assert ("model.attention" in reason) == (attention == "causal")

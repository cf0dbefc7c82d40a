"""Decoders that see the whole text, and the last sub-token of a word: through a run and whatever is made of it."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build
from transformers import ModernBertDecoderConfig, ModernBertDecoderForSequenceClassification

import tokmask_peft.training.train as training
from tokmask_peft import Recipe, evaluate, load, train
from tokmask_peft.errors import ModelError, RunInterruptedError
from tokmask_peft.inference.export import export_merged
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.layers import pool_texts
from tokmask_peft.tasks import get_task
from tokmask_peft.training.callbacks import StopOnSignal

BOTH_WAYS = ["model.attention=bidirectional", "training.max_steps=6", "training.baseline=false"]
LOW = ["model.quantization=nf4"]
SHORT = ["training.max_steps=2", "training.baseline=false"]
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")


@pytest.mark.parametrize(
    ("family", "task", "changes"),
    [
        pytest.param("qwen2-wide", "token", LOW, marks=needs_bitsandbytes),
        ("mistral", "token", ["training.batching=padded"]),
        ("llama", "token", ["data.label_on=mean"]),
        ("gemma3", "sequence", ["model.pooling=last"]),
    ],
)
def test_stock_peft_and_the_merged_model_answer_as_the_run(write_recipe, tmp_path, family, task, changes):
    run = train(Recipe.load(write_recipe(family, task), [*BOTH_WAYS, *changes]), quiet=True)
    made = {one["what"]: one["choice"] for one in run.result.decisions}
    assert made["attention"] == "bidirectional"
    carrier = "mean" if "data.label_on=mean" in changes else "last"
    assert made.get("label on") == (carrier if task == "token" else None)
    loading = json.loads((run.folder.adapter / "tokmask.json").read_text())["loading"]
    assert (loading["attention"], loading["label_on"]) == ("bidirectional", carrier if task == "token" else "last")
    assert evaluate(run.folder.root)["confusion"] == run.result.test["confusion"]
    moved = run.folder.adapter.rename(tmp_path / "moved")  # without the run's recipe
    classifier = load(moved, backbone=run.recipe.model.backbone, quantization="none", precision="fp32")
    (answer,) = classifier.predict(["This phone is bien bonito"])  # alone, without padding

    found, snippet = {}, (moved / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("PATH_OR_HUB_ID", str(moved)), found)
    stock = found["model"](**found["inputs"]).logits.detach()
    rows = torch.stack([*found["mean"].values()]) if carrier == "mean" else stock[0, found.get("last", slice(None))]
    rows = rows if task == "token" else stock
    chances = (rows / classifier.temperature).softmax(-1)
    given = answer.probabilities if task == "token" else [answer.probabilities]
    torch.testing.assert_close(chances, torch.tensor([list(row.values()) for row in given]), atol=1e-4, rtol=0)

    export = export_merged(moved, tmp_path / "merged", backbone=run.recipe.model.backbone)
    assert [carrier in note for note in export.notes if "sub-token" in note] == [True] * (task == "token")
    merged = get_task(task).auto_model().from_pretrained(export.folder).eval()
    logits = merged(**found["inputs"]).logits
    torch.testing.assert_close(logits, stock, atol=1e-4, rtol=0)
    merged.config.is_causal = True
    assert (merged(**found["inputs"]).logits - logits).abs().max() > 1e-3
    assert any("is_causal" in note for note in export.notes)
    assert any("sub-tokens" in note for note in export.notes) == (carrier == "mean")


def test_an_end_token_that_pads_is_reported_in_training_and_prediction(tmp_path, data_folder):
    model, tokenizer = build("llama")
    tokenizer.pad_token = None
    model.base_model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    recipe = {
        "name": "ends",
        "output_dir": str(tmp_path),
        "model": {"backbone": str(tmp_path / "backbone"), "quantization": "none", "precision": "fp32"},
        "data": {"task": "sequence", "path": str(data_folder), "format": "tsv", "max_length": 62},
        "training": {"max_steps": 2, "batch_size": 8, "baseline": False},
    }
    run = train(Recipe.model_validate(recipe), quiet=True)
    classifier = load(run.folder.root)
    for decisions in (run.result.decisions, [asdict(one) for one in classifier.decisions]):
        assert {one["what"]: one["choice"] for one in decisions}["pad token"] == "</s>"
    assert evaluate(run.folder.root)["confusion"] == run.result.test["confusion"]


def test_a_resumed_run_still_sees_the_whole_text(write_recipe, monkeypatch):
    path = write_recipe("llama", "token")
    stopped, whole, causal = (
        Recipe.load(path, [*BOTH_WAYS, f"name={name}", f"model.attention={how}"])
        for name, how in (("stopped", "bidirectional"), ("whole", "bidirectional"), ("causal", "causal"))
    )
    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_end", lambda self, *_, **__: self._ask(), raising=False)
        with pytest.raises(RunInterruptedError):
            train(stopped, quiet=True)
    weights = [
        load_file(run.folder.adapter / training.WEIGHTS)
        for run in (train(stopped, resume=True, quiet=True), train(whole, quiet=True), train(causal, quiet=True))
    ]
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, atol=1e-6, rtol=0)
    assert any((weights[2][name] - weight).abs().max() > 1e-4 for name, weight in weights[1].items())


def test_an_encoder_is_labelled_on_the_first_sub_token_and_a_recipe_may_say_otherwise(write_recipe):
    for family, change, expected in (("bert", [], "first"), ("llama", ["data.label_on=first"], "first")):
        run = train(Recipe.load(write_recipe(family, "token"), [*change, *SHORT, f"name={family}"]), quiet=True)
        assert "label on" not in {one["what"] for one in run.result.decisions}
        assert json.loads((run.folder.adapter / "tokmask.json").read_text())["loading"]["label_on"] == expected
        assert f"{expected} = [" in (run.folder.adapter / "README.md").read_text()


def test_last_is_how_a_stock_decoder_pools():
    for family in ("qwen2", "gemma3"):
        model, _ = build(family)
        pool_texts(model, "last")
        assert not hasattr(model, "text_pooling")
        assert not model.base_model._forward_hooks
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ettin = ModernBertDecoderForSequenceClassification(ModernBertDecoderConfig(vocab_size=9, pad_token_id=0, **sizes))
    pool_texts(ettin, "last")
    for model, how in ((build("bert")[0], "last"), (build("bart")[0], "last"), (ettin, "cls")):
        with pytest.raises(ModelError) as caught:
            pool_texts(model, how)
        assert caught.value.code == "pooling"

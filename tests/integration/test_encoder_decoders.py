"""Classification heads of T5, mT5 and BART, trained from a recipe: adapter, head, masks, and what stock PEFT loads."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import tokmask_peft
from tokmask_peft import Recipe, train

HEADS = {"sequence": "classification_head", "token": "classifier"}
AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
SHORT = ("training.max_steps=8", "training.baseline=false", "masking.p=0.4")


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("mt5", "token", ()),
        ("bart", "sequence", ()),
        ("t5", "sequence", ("masking.trainable_mask=true", "training.views=2", "model.precision=bf16")),
        ("bart", "sequence", ("adapter.layers=1", "model.gradient_checkpointing=true", "masking.unit=word")),
        ("t5", "token", ("adapter.layers=1", "masking.replace=drop", "masking.share=0.5")),
        ("mt5", "sequence", ("model.quantization=nf4", "model.precision=bf16")),
    ],
)
def test_a_recipe_trains_and_stock_peft_loads_what_it_leaves(write_recipe, family, task, options):
    recipe = Recipe.load(write_recipe(family, task), [*SHORT, *options])
    if "model.quantization=nf4" in options:
        pytest.importorskip("bitsandbytes")
    run = train(recipe, quiet=True)
    config = PeftConfig.from_pretrained(run.folder.adapter)
    assert config.modules_to_save == [HEADS[task]]
    weights = load_file(run.folder.adapter / "adapter_model.safetensors")
    layers = {name.split(".lora_")[0] for name in weights if ".lora_B" in name}
    parts = {part for part in ("encoder", "decoder") if any(f".{part}." in name for name in layers)}
    assert parts == ({"encoder"} if task == "token" else {"encoder", "decoder"})
    if "adapter.layers=1" in options:
        assert not any(f".{layer}.0." in name for name in layers for layer in ("block", "layers"))
        assert family != "t5" or {name.split(".layer.")[1][0] for name in layers} == {"0", "1"}, "attention and MLP"
    moved = [weight.abs().sum() > 0 for name, weight in weights.items() if ".lora_B" in name]
    assert sum(moved) > 0.8 * len(moved)

    labels = run.result.labels
    backbone = AUTO[task].from_pretrained(recipe.model.backbone, num_labels=len(labels))
    stock = PeftModel.from_pretrained(backbone, str(run.folder.adapter)).eval()
    classifier = tokmask_peft.load(run.folder.adapter, precision="fp32")
    text = "great hoy la casa" if task == "sequence" else ["great", "hoy", "la", "casa"]
    if task == "sequence":
        whole, odd = (answer.probabilities for answer in classifier.predict(["great <unk> casa", "great </s> casa"]))
        assert odd == pytest.approx(whole, abs=1e-4), "a text may spell an end token"
    if "model.quantization=nf4" in options:
        return
    inputs = classifier.tokenizer(text, is_split_into_words=task == "token", return_tensors="pt")
    with torch.no_grad():
        logits = stock(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    found = classifier.predict([text])[0]
    if task == "sequence":
        assert found.label == labels[logits.argmax().item()]
    else:
        words = inputs.word_ids()
        assert list(found.labels) == [labels[logits[0, words.index(word)].argmax()] for word in range(4)]
    lines = [json.loads(line) for line in run.folder.log.read_text().splitlines()]
    assert any(line.get("masking_rate", 0) > 0 for line in lines)
    assert classifier.explain([text])

"""Merged models: plain transformers, the same function, nothing lost."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import TEXTS
from transformers import AutoModelForSequenceClassification, pipeline

from tokmask_peft.errors import ModelError
from tokmask_peft.inference.classifier import load
from tokmask_peft.inference.export import export_merged
from tokmask_peft.model import adapter
from tokmask_peft.model.decisions import DTYPES, bitsandbytes_problem

SHORT = [text for text in TEXTS if len(text) < 30]
PLACEMENTS = [
    "offload",
    pytest.param("8bit", marks=pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="bitsandbytes")),
]


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_a_pipeline_gives_the_labels_of_the_classifier(saved_adapter, tmp_path, family):
    done = export_merged(saved_adapter(family), tmp_path / "merged")
    assert done.difference <= 1e-4
    classify = pipeline("text-classification", model=str(tmp_path / "merged"), top_k=None)
    assert type(classify.model.get_input_embeddings()) is torch.nn.Embedding
    model = load(saved_adapter(family))
    model.temperature = 1.0
    for row, answer in zip(classify(SHORT), model.predict(SHORT), strict=True):
        assert row[0]["label"] == answer.label
        assert {part["label"]: part["score"] for part in row} == pytest.approx(answer.probabilities, abs=1e-4)
    assert any("temperature" in note for note in done.notes)


def test_a_token_pipeline_gives_the_labels_of_the_classifier(saved_adapter, tmp_path):
    export_merged(saved_adapter("xlm-r", "token"), tmp_path / "merged")
    tag = pipeline("token-classification", model=str(tmp_path / "merged"), ignore_labels=[])
    answers = load(saved_adapter("xlm-r", "token")).predict(SHORT)
    for text, answer in zip(SHORT, answers, strict=True):
        found = {part["start"]: part["entity"] for part in reversed(tag(text))}
        start = 0
        for word, label in zip(answer.words, answer.labels, strict=True):
            start = text.index(word, start)
            # SentencePiece counts the space before a word as its own
            assert found.get(start - 1, found.get(start)) == label
            start += len(word)
    assert len({label for answer in answers for label in answer.labels}) > 1


def test_the_saved_model_is_plain_in_every_precision(saved_adapter, tmp_path):
    for precision, dtype in DTYPES.items():
        done = export_merged(saved_adapter("llama"), tmp_path / precision, precision=precision)
        weights = load_file(tmp_path / precision / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {dtype}
        assert not any("lora" in name or "modules_to_save" in name for name in weights)
        config = json.loads((tmp_path / precision / "config.json").read_text())
        assert list(config["id2label"].values()) == ["bad [x]", "good", "so-so"]
        assert str(saved_adapter("llama").parent) not in (tmp_path / precision / "config.json").read_text()
        assert (f"rounded to {precision}" in str(done.notes)) == (precision != "fp32")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / precision)
        assert type(model.score) is torch.nn.Linear
        assert (done.rounding > 1e-4) == (precision != "fp32")


def test_a_4_bit_run_is_merged_into_the_unquantized_backbone_and_says_so(saved_adapter, tmp_path):
    done = export_merged(saved_adapter(quantization="nf4"), tmp_path / "merged")
    assert done.difference <= 1e-4
    assert any("trained on the nf4 backbone" in note and "unquantized" in note for note in done.notes)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_run_is_merged_wherever_its_embedding_lay(saved_adapter, tmp_path, placement):
    adapter = shutil.copytree(saved_adapter(), tmp_path / "run" / "adapter")
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = {"backbone": named, "quantization": "none", "precision": "fp32", "embedding": placement}
    recipe = {"name": "run", "model": model, "data": {"task": "sequence", "builtin": True}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = export_merged(tmp_path / "run", tmp_path / "merged")
    assert done.difference <= 1e-4
    classify = pipeline("text-classification", model=str(tmp_path / "merged"))
    assert [row["label"] for row in classify(SHORT)] == [answer.label for answer in load(adapter).predict(SHORT)]
    assert any("8-bit embedding" in note for note in done.notes) == (placement == "8bit")


def test_a_merge_that_changes_the_logits_is_refused(saved_adapter, tmp_path, monkeypatch):
    original = adapter.load_adapter

    def spoiled(backbone, folder, **trained):
        model = original(backbone, folder, **trained)
        merge = model.merge_and_unload

        def merge_wrongly(**options):
            merged = merge(**options)
            merged.classifier.bias.data += 0.001
            return merged

        model.merge_and_unload = merge_wrongly
        return model

    monkeypatch.setattr(adapter, "load_adapter", spoiled)
    with pytest.raises(ModelError) as caught:
        export_merged(saved_adapter(), tmp_path / "merged")
    assert caught.value.code == "merged-logits-differ"
    assert caught.value.fields["difference"] == pytest.approx(0.001, rel=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_and_left_alone(saved_adapter, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    for folder, precision, code in ((tmp_path, "fp32", "folder-taken"), (tmp_path / "new", "fp8", "unknown-format")):
        with pytest.raises(ModelError) as caught:
            export_merged(saved_adapter(), folder, precision=precision)
        assert caught.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

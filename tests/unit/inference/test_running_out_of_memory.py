"""Running out of memory in predicting, explaining and exporting ends in one message that says what helps."""

import pytest
import torch
from tiny_models import TEXTS

from tokmask_peft.errors import ModelError
from tokmask_peft.inference import classifier as classifier_module
from tokmask_peft.inference import export
from tokmask_peft.model.packed import enable_padding_free

ALLOCATOR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 4 GiB in all."


def refuse(*_, **__):
    raise torch.OutOfMemoryError(ALLOCATOR)


@pytest.mark.parametrize(("what", "packed"), [("predict", False), ("explain", True)])
def test_fewer_texts_are_suggested_and_help(classifier, monkeypatch, what, packed):
    model = classifier(max_length=64)
    if packed:
        enable_padding_free(model.model)
        model = type(model)(model.model, model.tokenizer, model.task, model.labels, max_length=64)
    ask, forward = getattr(model, what), model.forward._model.forward

    def limited(*args, **inputs):
        return forward(*args, **inputs) if texts_in(inputs) == 1 else refuse()

    def texts_in(inputs):
        return len(inputs["cu_seqlens"]) - 1 if packed else len(inputs["input_ids"])

    monkeypatch.setattr(model.forward._model, "forward", limited)
    with pytest.raises(ModelError, match=r"out of memory in prediction \(CUDA out of memory\)") as caught:
        ask(TEXTS[:5], batch_size=4)
    assert "--batch-size 1 (batch_size=1)" in str(caught.value)
    assert len(ask(TEXTS[:5], batch_size=1)) == 5
    monkeypatch.setattr(model.forward._model, "forward", refuse)
    with pytest.raises(ModelError, match="other programs closed") as caught:
        ask(TEXTS[:1], batch_size=1)
    assert caught.value.code == "out-of-memory"
    assert "batch" not in str(caught.value)


def test_an_adapter_that_does_not_fit(saved_adapter, monkeypatch):
    monkeypatch.setattr(classifier_module, "load_merged", refuse)
    with pytest.raises(ModelError, match=r"out of memory while the model was loaded \(CUDA .*other programs closed"):
        classifier_module.load(saved_adapter())


@pytest.mark.parametrize("part", ["model.backbone.load_backbone", "inference.export.export_onnx"])  # first and last
def test_an_export_that_runs_out_of_memory_leaves_nothing(saved_adapter, monkeypatch, tmp_path, part):
    monkeypatch.setattr(f"tokmask_peft.{part}", refuse)
    monkeypatch.setattr(export, "check_onnx_installed", lambda: None)
    with pytest.raises(ModelError, match=r"out of memory while the model was merged \(CUDA .*other programs closed"):
        export.export_merged(saved_adapter(), tmp_path / "merged", onnx=True)
    assert list(tmp_path.iterdir()) == []

"""ONNX beside a merged model: the same logits at sizes the exporter never saw, or nothing."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tokmask_peft.errors import ModelError
from tokmask_peft.inference import export

runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def test_onnxruntime_gives_the_logits_of_the_merged_model(saved_adapter, tmp_path, monkeypatch):
    done = export.export_merged(saved_adapter("qwen2"), tmp_path / "merged", onnx=True)
    assert done.onnx < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    session = runtime.InferenceSession(tmp_path / "merged" / "model.onnx")
    for texts in (["ok"], ["mañana tengo un meeting con mi boss", "ok", "i love this"], ["so much " * 12] * 5):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        (found,) = session.run(None, {name: values.numpy() for name, values in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(**given).logits, atol=1e-4, rtol=1e-4)

    class Wrong:
        def __init__(self, *_, **__): ...

        def run(self, names, given):
            (found,) = session.run(names, given)
            return [found + 0.01 * (given["input_ids"].shape[1] == 40)]

    monkeypatch.setattr(runtime, "InferenceSession", Wrong)
    with pytest.raises(ModelError, match="7 texts of 40 sub-tokens") as caught:
        export.compare_onnx(model, tokenizer, tmp_path / "merged" / "model.onnx")
    assert caught.value.code == "onnx-logits-differ"
    assert caught.value.fields["difference"] == pytest.approx(0.01, rel=0.01)


def test_what_cannot_be_done_is_reported(saved_adapter, tmp_path, monkeypatch):
    def refused(model, **options):
        with pytest.raises(ModelError) as caught:
            export.export_merged(model, tmp_path / "merged", onnx=True, **options)
        return caught.value

    assert refused(saved_adapter("distilbert"), precision="bf16").code == "onnx-precision"

    def fail(*_, **__):
        raise RuntimeError("\nno such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    error = refused(saved_adapter("distilbert"))
    assert (error.code, error.fields) == ("onnx-export-failed", {"model": "DistilBertForSequenceClassification"})
    assert "(no such operator)" in str(error)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    error = refused("no/such")
    assert error.fields == {"missing": ["onnx", "onnxscript", "onnxruntime"]}
    assert "pip install 'tokmask-peft[onnx]'" in str(error)
    assert list(tmp_path.iterdir()) == []

"""ONNX beside a merged model: the same logits at sizes the exporter never saw, or nothing."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tokmask_peft.errors import ModelError
from tokmask_peft.inference import export as onnx
from tokmask_peft.inference.export import export_merged

runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.mark.parametrize("family", ["distilbert", "qwen2"])
def test_onnxruntime_gives_the_logits_of_the_merged_model(saved_adapter, tmp_path, monkeypatch, family):
    done = export_merged(saved_adapter(family), tmp_path / "merged", onnx=True)
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
    with pytest.raises(ModelError, match=r"differ from the model's by 0\.01 .* on 7 texts of 40"):
        onnx._compare(model, tokenizer, tmp_path / "merged" / "model.onnx", 1e-4)


def test_what_cannot_be_done_is_said(saved_adapter, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="fp32 only"):
        export_merged(saved_adapter("distilbert"), tmp_path / "merged", onnx=True, precision="bf16")

    def fail(*_, **__):
        raise RuntimeError("\nno such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot export DistilBert.* \(no such operator\)"):
        export_merged(saved_adapter("distilbert"), tmp_path / "merged", onnx=True)
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"onnx, onnxscript, onnxruntime: pip install 'tokmask-peft\[onnx\]'"):
        export_merged("no/such", tmp_path / "merged", onnx=True)
    assert list(tmp_path.iterdir()) == []

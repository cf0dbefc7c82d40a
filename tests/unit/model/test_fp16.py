"""fp16 on the CPU's own fp16, as far as that goes: the losses of fp32, and room for what flows between the layers."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TEXTS, build

from tokmask_peft.console import Decision
from tokmask_peft.errors import ModelError
from tokmask_peft.model import backbone as loading
from tokmask_peft.model import decisions
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

CPU, LABELS = torch.device("cpu"), ("a", "b", "c")


def load(config, precision, monkeypatch):
    """Load a backbone in a precision that this device is not asked for."""
    monkeypatch.setattr(loading, "choose_precision", lambda *_: Decision("precision", precision, "a test"))
    torch.manual_seed(0)
    return loading.load_backbone(config, "sequence", LABELS, CPU)


def losses(config, precision, monkeypatch):
    """Return the losses of 10 steps with autocast and, in fp16, a scaled loss, as accelerate takes them on a GPU."""
    backbone = load(config, precision, monkeypatch)
    torch.manual_seed(1)
    model, _ = add_adapter(backbone, AdapterConfig(r=4), "sequence")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    batch = backbone.tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels, found, low = torch.arange(len(TEXTS)) % 3, [], precision != "fp32"
    for _ in range(10):
        with inputs_as_they_come(model, low), torch.autocast("cpu", decisions.DTYPES[precision], enabled=low):
            loss = F.cross_entropy(model(**batch).logits.float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_the_loss_curve_is_that_of_fp32_more_closely_than_in_bf16(family, model_config, monkeypatch):
    curves = {name: losses(model_config(family), name, monkeypatch) for name in decisions.DTYPES}
    gaps = {name: (curve - curves["fp32"]).abs() for name, curve in curves.items()}
    assert curves["fp32"][-1] < 0.9 * curves["fp32"][0]  # it learns
    assert gaps["fp16"].mean() < gaps["bf16"].mean()
    assert gaps["fp16"].max() < 5e-3


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_weights_are_in_fp16_and_norms_head_and_stream_in_fp32(family, model_config, monkeypatch):
    backbone = load(model_config(family), "fp16", monkeypatch)
    model, _ = add_adapter(backbone, AdapterConfig(r=4), "sequence")
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            assert module.weight.dtype == torch.float16
        if "Norm" in type(module).__name__:
            assert module.weight.dtype == torch.float32
            module.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    with torch.autocast("cpu", torch.float16):
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3))
    assert seen == {torch.float32}


@pytest.mark.parametrize("held", [True, False])
def test_sums_over_the_layers_may_exceed_the_largest_number_of_fp16(held, tmp_path, monkeypatch):
    if not held:
        monkeypatch.setattr(loading, "hold_stream_in_fp32", lambda model: None)
    model, tokenizer = build("qwen2")
    with torch.no_grad():
        model.base_model.embed_tokens.weight.fill_(60_000.0)
        for layer in model.base_model.layers:
            layer.mlp.down_proj.weight.fill_(1e4)
    model.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    logits = []
    for precision in ("fp32", "fp16"):
        loaded = load(ModelConfig(backbone=str(tmp_path), quantization="none"), precision, monkeypatch).model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            logits.append(loaded(torch.tensor([[5, 6, 7]])).logits.float())
    assert bool(logits[1].isfinite().all()) is held
    if held:
        torch.testing.assert_close(logits[1], logits[0], atol=0.05, rtol=0.05)


def test_fp16_is_for_nvidia_gpus():
    asked = ModelConfig(backbone="x", precision="fp16")
    with pytest.raises(ModelError, match=r"model\.precision=auto") as caught:
        decisions.choose_precision(asked, CPU)
    assert (caught.value.code, caught.value.fields) == ("no-fp16", {"device": "cpu"})
    assert decisions.choose_precision(asked, torch.device("cuda")).choice == "fp16"


def test_an_adapter_of_fp16_is_used_in_fp16_on_a_gpu_and_otherwise_in_fp32():
    trained = ModelConfig(backbone="x", precision="fp16", quantization="none")
    on_gpu = decisions.plan_loading(trained, torch.device("cuda"))
    assert (on_gpu.model.precision, on_gpu.deviations) == ("fp16", ())
    here = decisions.plan_loading(trained, CPU)
    assert here.model.precision == "fp32"
    assert "trained in fp16" in here.reasons["precision"]
    assert len(here.deviations) == 1
    assert decisions.plan_loading(trained, CPU, precision="bf16").deviations == ()

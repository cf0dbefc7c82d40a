import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import build
from transformers import AutoModelForSequenceClassification

from tokmask_peft.errors import ModelError
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import choose_mask_token
from tokmask_peft.model.adapter import (
    adapted_layers,
    add_adapter,
    inputs_as_they_come,
    linear_layers,
    load_adapter,
    load_merged,
    save_adapter,
    target_names,
)
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import bitsandbytes_problem, enable_checkpointing
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

CPU = torch.device("cpu")
LABELS = ("negative", "neutral", "positive")
TEXTS = ["mañana tengo un meeting", "ok", "i love this canción so much"]
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")


def gradients(model, batch):
    model.train().zero_grad()
    model(**batch).logits.square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def away_from_zero(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("family", ["bert", "xlm-r", "distilbert", "modernbert", "qwen2"])
def test_every_linear_layer_of_the_backbone_is_adapted_and_the_head_is_trained_in_full(load, family, tmp_path):
    backbone = load(family)
    expected = set(linear_layers(backbone.model, backbone.new_modules))
    model, _ = add_adapter(backbone, AdapterConfig(r=2), "sequence")
    adapted = {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == expected
    assert expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    save_adapter(model, tmp_path, "hub/backbone")
    names = " ".join(load_file(tmp_path / "adapter_model.safetensors"))
    assert "embed" not in names
    assert all(f".{head}." in names for head in backbone.new_modules)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "hub/backbone"


@pytest.mark.parametrize(("family", "task"), [("bert", "token"), ("qwen2", "sequence")])
def test_saved_adapter_gives_the_same_logits_on_a_fresh_backbone(load, family, task, tmp_path):
    backbone = load(family, task)
    model = away_from_zero(add_adapter(backbone, AdapterConfig(r=2), task)[0]).eval()
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        before = model(**batch).logits
        save_adapter(model, tmp_path, "any/name")
        torch.manual_seed(2)  # another head is drawn, and must be replaced by the saved one
        after = load_adapter(load(family, task), tmp_path)(**batch).logits
    assert before.abs().max() > 0.01
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [("none", "fp32"), *(pytest.param("nf4", precision, marks=needs_bitsandbytes) for precision in ("fp32", "bf16"))],
)
def test_layers_of_gpt2_are_trained_saved_loaded_by_peft_alone_and_merged(load, quantization, precision, tmp_path):
    """They keep their matrices transposed, but not in 4 bits, in whatever form the adapter is trained or used."""
    backbone = load("gpt2", quantization=quantization, precision=precision)
    warnings.filterwarnings("error", "fan_in_fan_out")  # until the test ends
    model, _ = add_adapter(backbone, AdapterConfig(r=2), "sequence")
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    found = gradients(model, batch)
    assert len(found) == 2 * 4 * 2 + 1
    assert all(gradient.any() for name, gradient in found.items() if "lora_A" not in name)
    save_adapter(away_from_zero(model), tmp_path, "any/name")
    stock = AutoModelForSequenceClassification.from_pretrained(backbone.model.name_or_path, num_labels=3)
    stock.config.pad_token_id = backbone.tokenizer.pad_token_id
    with torch.no_grad():
        expected = PeftModel.from_pretrained(stock, str(tmp_path)).eval()(**batch).logits
        for settings, tolerance in (({}, 1e-5), ({"precision": "bf16"}, 0.1)):
            merged, decision = load_merged(load("gpt2", **settings), tmp_path, backbone.weights, 16.0)
            assert decision.choice == "merged"
            assert not any("lora_" in name for name, _ in merged.named_parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings)):
                torch.testing.assert_close(merged(**batch).logits.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def saved_once(load, tmp_path_factory):
    backbone, folder = load("bert"), tmp_path_factory.mktemp("adapter")
    save_adapter(add_adapter(backbone, AdapterConfig(r=2), "sequence")[0], folder, "any/name")
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "adapter")


def refusal(backbone, folder, *trained):
    with pytest.raises(ModelError) as caught:
        load_adapter(backbone, folder, *trained)
    assert caught.value.fields["folder"] == folder
    return caught.value


@pytest.mark.parametrize(
    ("quantization", "part", "kind"),
    [
        ("none", "query", "linear"),
        ("none", "word_embeddings", "others"),
        pytest.param("nf4", "LayerNorm", "others", marks=needs_bitsandbytes),
        pytest.param("nf4", "query", None, marks=needs_bitsandbytes),  # cannot be seen
    ],
)
def test_a_backbone_with_other_weights_is_refused(load, saved, quantization, part, kind):
    trained = load("bert").weights
    settings = {"quantization": quantization, "precision": "bf16"}
    backbone = load("bert", **settings)
    file = Path(backbone.model.name_or_path) / "model.safetensors"
    load_adapter(backbone, saved, trained, 16.0)
    before = file.read_bytes()
    weights = {name: value * 1.01 if part in name else value for name, value in load_file(file).items()}
    try:
        save_file(weights, file, {"format": "pt"})
        changed = load("bert", **settings)
    finally:
        file.write_bytes(before)
    if kind is None:
        assert "linear" not in changed.weights
    else:
        error = refusal(changed, saved, trained)
        assert (error.code, error.fields["weights"]) == ("another-backbone", [kind])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"lora_alpha": 4}, "another-scaling"),
        ({"use_rslora": True}, "another-scaling"),
        ({"alpha_pattern": {"query": 1}}, "another-scaling"),
        ({"rank_pattern": {"query": 10_000_000}}, "adapter-does-not-fit"),
        ({"use_dora": True}, "adapter-does-not-fit"),
        ({"target_modules": ["query"]}, "adapter-does-not-fit"),
        ({"layers_to_transform": [0]}, "adapter-does-not-fit"),
    ],
)
def test_a_changed_adapter_config_is_refused(load, saved, changes, code):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert refusal(load("bert"), saved, None, 16.0).code == code


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file_is_refused(model_config, tmp_path):
    config = model_config("bert")
    folder = shutil.copytree(config.backbone, tmp_path / "backbone")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_backbone(config.model_copy(update={"backbone": str(folder)}), "sequence", LABELS, CPU)
    assert caught.value.code == "not-a-file"


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda name, value: {name.removeprefix("base_model."): value}, {"missing", "unexpected"}),
        (lambda name, value: {name: value} if "lora_" not in name else {}, {"missing"}),
        (lambda name, value: {name: value} if "classifier" not in name else {}, {"missing"}),
        (lambda name, value: {name: value, "base_model.model.somewhere.lora_A.weight": value}, {"unexpected"}),
        (lambda name, value: {name: value[:1] if "lora_A" in name else value}, {"shapes"}),
        (lambda name, value: {name: value.int() if "lora_A" in name else value}, {"integers"}),
    ],
)
def test_weights_that_are_not_those_of_the_adapter_are_named(load, saved, change, kinds):
    file, weights = saved / "adapter_model.safetensors", {}
    for name, value in load_file(file).items():
        weights |= change(name, value)
    save_file({name: value.clone() for name, value in weights.items()}, file)
    error = refusal(load("bert"), saved)
    assert error.code == "adapter-does-not-fit"
    assert {kind for kind in ("missing", "unexpected", "shapes", "integers") if error.fields[kind]} == kinds
    assert all(error.fields[kind][0] in str(error) for kind in kinds)


@pytest.mark.parametrize("content", ["[1", "{}"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named(load, saved, name, content):
    (saved / name).write_text(content)
    error = refusal(load("bert"), saved)
    assert (error.code, error.fields) == ("damaged-adapter", {"folder": saved})
    assert name.partition(".")[0] in str(error)


def test_other_labels_and_a_folder_without_weights_are_refused(model_config, load, saved):
    two = load_backbone(model_config("bert"), "sequence", LABELS[:2], CPU)
    assert refusal(two, saved).code == "adapter-does-not-fit"
    (saved / "adapter_model.safetensors").unlink()
    assert refusal(load("bert"), saved).code == "no-adapter"


@pytest.mark.parametrize(("family", "layers"), [("xlm-r", 2), ("bert", 3)])
def test_an_adapter_of_another_backbone_is_refused(saved, tmp_path, family, layers):
    model, tokenizer = build(family, num_hidden_layers=layers)
    model.base_model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    config = ModelConfig(backbone=str(tmp_path / "other"), precision="fp32", quantization="none")
    assert refusal(load_backbone(config, "sequence", LABELS, CPU), saved).code == "adapter-does-not-fit"


def permuted(tokenizer):
    first, second = tokenizer["model"]["vocab"].pop("a"), tokenizer["model"]["vocab"].pop("b")
    tokenizer["model"]["vocab"] |= {"a": second, "b": first}


def lower_case(tokenizer):
    tokenizer["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(("change", "tokens"), [(permuted, ["a", "b"]), (lower_case, [])])
def test_a_tokenizer_other_than_the_saved_one_is_refused(load, saved, change, tokens):
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    change(tokenizer)
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refusal(load("bert"), saved)
    assert (error.code, error.fields["tokens"]) == ("another-tokenizer", tokens)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")]
)
def test_running_out_of_memory_is_not_taken_for_another_adapter(load, saved, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("peft.get_peft_model", refuse)
    with pytest.raises(type(error), match="out of memory"):
        load_adapter(load("bert"), saved)


def test_unknown_target_names_the_nearest(load):
    backbone = load("bert")
    with pytest.raises(ModelError, match="Did you mean 'query'") as caught:
        add_adapter(backbone, AdapterConfig(targets=("querry",)), "sequence")
    assert caught.value.code == "unknown-target"
    assert caught.value.fields == {"unknown": ["querry"], "known": ["dense", "key", "query", "value"]}


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_trained_mask_row_saves_one_row_and_not_the_matrix(load, family, tmp_path):
    backbone = load(family)
    rows, width = backbone.model.get_input_embeddings().weight.shape
    mask = choose_mask_token(backbone.tokenizer, rows)
    model, _ = add_adapter(backbone, AdapterConfig(r=2), "sequence", trained_token=mask.id)
    save_adapter(model, tmp_path, "any/name")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert [list(value.shape) for name, value in weights.items() if "embed" in name] == [[1, width]]


@pytest.mark.parametrize(("family", "layers"), [("bert", 1), ("distilbert", 1), ("modernbert", 1), ("qwen2", 0.5)])
def test_the_backward_pass_ends_below_the_adapted_layers(load, family, layers, tmp_path):
    backbone = load(family)
    inside = [name for name in linear_layers(backbone.model, backbone.new_modules) if re.search(r"\.\d+\.", name)]
    model, (decision,) = add_adapter(backbone, AdapterConfig(r=2, layers=layers), "sequence")
    assert "of layers 1 to 1;" in decision.reason
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(inside) / 2
    assert all(re.search(r"\.1\.", name) for name in adapted)

    needs_gradient = []

    def note(module, args, output):
        needs_gradient.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    base = model.get_base_model()
    for name, module in base.named_modules():
        if re.search(r"layers?\.\d+$", name) or module is base.get_input_embeddings():
            module.register_forward_hook(note)
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.5)):  # fills a frozen row for Qwen
        model.train()(**batch).logits.sum().backward()
    assert needs_gradient == [False, False, True]  # embedding, lower layer, upper layer
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)

    save_adapter(model, tmp_path, "any/name")
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        again = load_adapter(load(family), tmp_path)
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-6, rtol=0)


def test_upper_layers_that_the_backbone_has(load):
    model = load("bert").model
    model.config.num_hidden_layers = 12
    assert adapted_layers(model, "all") is None
    assert adapted_layers(model, 12) == list(range(12))
    assert adapted_layers(model, 0.25) == [9, 10, 11]
    assert adapted_layers(model, 0.01) == [11]
    with pytest.raises(ModelError) as caught:
        adapted_layers(model, 13)
    assert (caught.value.code, caught.value.fields) == ("too-few-layers", {"wanted": 13, "layers": 12})


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gradients_survive_an_evaluation(load, family):
    """bitsandbytes' 4-bit layers lose every adapter gradient after an evaluation on CPUs with avx512_bf16."""
    backbone = load(family, quantization="nf4", precision="bf16")
    model, _ = add_adapter(backbone, AdapterConfig(r=2, dropout=0.0), "sequence")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    before = gradients(model, batch)
    with torch.no_grad():
        model.eval()(**batch)
    after = gradients(model, batch)
    assert all(gradient.abs().sum() > 0 for gradient in before.values())
    torch.testing.assert_close(after, before)


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_quantized_training_upcasts_nothing_and_checkpointing_needs_no_input_gradients(load, family):
    backbone = load(family, quantization="nf4", precision="bf16")
    model, _ = add_adapter(backbone, AdapterConfig(r=4, dropout=0.0, layers=1), "sequence")
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and "original_module" not in n]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16, torch.uint8}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    embedded, calls, found = [], [], []
    model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2].requires_grad))
    layers = [module for name, module in model.named_modules() if re.search(r"layers?\.\d+$", name)]
    for index, layer in enumerate(layers):
        inside = getattr(layer, "mlp", None) or layer.intermediate  # what is computed again
        inside.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)))
    assert embedded == [False, False]
    assert calls == [0, 1, 0, 1, 1]  # nothing is computed again below the adapter
    assert any("lora_B" in name and gradient.abs().sum() > 0 for name, gradient in found[0].items())
    torch.testing.assert_close(found[1], found[0])


def saved_bytes(model, batch):
    found = {}

    def keep(tensor):
        found[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).logits.float().square().sum()
    model.zero_grad()
    loss.backward()
    return sum(found.values()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_in_autocast_adapters_take_their_input_as_it_comes(load, family):
    backbone = load(family, precision="bf16")
    model, _ = add_adapter(backbone, AdapterConfig(r=2, dropout=0.0), "sequence")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = backbone.tokenizer(TEXTS, padding=True, return_tensors="pt")
    model.eval()
    usual, expected = saved_bytes(model, batch)
    with inputs_as_they_come(model, autocast=True):
        lean, found = saved_bytes(model, batch)
    assert lean < usual
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with inputs_as_they_come(model, autocast=False):  # fp32 adapters on bf16 activations need the cast
        model(**batch)
    model(**batch)


@pytest.mark.parametrize(("dora", "row"), [(True, None), (False, 4)])
def test_dora_keeps_its_fp32_norms_and_a_trained_mask_row_has_no_cast(load, dora, row):
    backbone = load("bert", precision="bf16")
    model, _ = add_adapter(backbone, AdapterConfig(r=2, dora=dora, rslora=not dora), "sequence", trained_token=row)
    assert (model.peft_config["default"].use_rslora, model.peft_config["default"].use_dora) == (not dora, dora)
    assert any("lora_magnitude" in name for name, _ in model.named_parameters()) is dora
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    with inputs_as_they_come(model, autocast=True):
        assert {module.cast_input_dtype_enabled for module in adapted} == {dora}
    assert all(module.cast_input_dtype_enabled for module in adapted)


def test_a_backbone_without_linear_layers_is_refused():
    model, _ = build("llama", num_hidden_layers=0)
    with pytest.raises(ModelError, match="use another backbone") as caught:
        target_names(model, AdapterConfig(), ("score",))
    assert caught.value.code == "no-linear-layers"

import functools
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import families, token_families
from torch import nn

from tokmask_peft.errors import ModelError
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import (
    Float32Linear,
    head_modules,
    is_quantized,
    load_backbone,
    load_tokenizer,
)
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.location import backbone_location
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

CPU = torch.device("cpu")
LABELS = ("negative", "neutral", "positive")
needs_bitsandbytes = pytest.mark.skipif(
    bitsandbytes_problem("cpu") is not None, reason=str(bitsandbytes_problem("cpu"))
)


@pytest.mark.parametrize("family", families)
def test_labels_padding_and_cache_are_set(model_config, family):
    backbone = load_backbone(model_config(family), "sequence", LABELS, CPU)
    config = backbone.model.config
    assert [config.id2label[i] for i in range(3)] == list(LABELS)
    assert config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert config.pad_token_id == backbone.tokenizer.pad_token_id is not None
    assert backbone.tokenizer.padding_side == "right"
    assert config.use_cache is False


@pytest.mark.parametrize(
    ("family", "task"), [*((f, "sequence") for f in families), *((f, "token") for f in token_families)]
)
def test_head_is_new_and_in_fp32_also_in_bf16(model_config, family, task):
    backbone = load_backbone(model_config(family, precision="bf16"), task, LABELS, CPU)
    heads = head_modules(backbone.model)
    assert set(heads) <= set(backbone.new_modules)
    assert heads
    linears = [part for module in heads.values() for part in module.modules() if isinstance(part, nn.Linear)]
    assert linears
    assert all(type(part) is Float32Linear and part.weight.dtype == torch.float32 for part in linears)
    body = next(p for n, p in backbone.model.base_model.named_parameters() if p.ndim == 2)
    assert body.dtype == torch.bfloat16
    batch = backbone.tokenizer(["hola my amigo", "ok"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert backbone.model(**batch).logits.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert backbone.model(**batch).logits.dtype == torch.float32


@pytest.fixture(scope="module")
def without_pooler(tiny_folder, tmp_path_factory):
    """A BERT checkpoint as pretraining without a sentence task leaves it."""
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("without-pooler")
    AutoModel.from_pretrained(tiny_folder("bert"), add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder("bert")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_pooler_that_the_checkpoint_lacks_is_trained_in_fp32(without_pooler, quantization, precision):
    config = ModelConfig(backbone=without_pooler, quantization=quantization, precision=precision)
    backbone = load_backbone(config, "sequence", LABELS, CPU)
    assert set(backbone.new_modules) == {"classifier", "bert.pooler.dense"}
    model, _ = add_adapter(backbone, AdapterConfig(), "sequence")
    batch = backbone.tokenizer(["hola my amigo", "ok"], return_tensors="pt", padding=True)
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and precision == "bf16"):
            model.train()(**batch).logits.sum().backward()
        pooler = {name: value for name, value in model.named_parameters() if "pooler" in name and value.requires_grad}
        assert len(pooler) == 2
        assert all(value.dtype == torch.float32 and value.grad.abs().sum() > 0 for value in pooler.values())


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen2", "llama"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_backbone_is_quantized_but_never_the_head(model_config, family, task, quantization):
    # heads with a bias (every BERT head, every token head) are quantized by default in transformers
    backbone = load_backbone(model_config(family, quantization=quantization), task, LABELS, CPU)
    body = [module for module in backbone.model.base_model.modules() if is_quantized(module)]
    head = [part for module in head_modules(backbone.model).values() for part in module.modules()]
    assert len(body) >= 12
    assert not any(is_quantized(part) for part in head)
    assert all(p.dtype == torch.float32 for part in head for p in part.parameters())


@pytest.mark.parametrize("family", ["bert", "qwen2", "distilbert"])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_attention_dropout_is_the_recipe_s(model_config, family, task):
    ids = torch.arange(5, 17).repeat(2, 1)

    def spread(dropout):
        """How far two forward passes in training differ; the tiny backbones have no other dropout."""
        model = load_backbone(model_config(family, attention_dropout=dropout), task, LABELS, CPU).model
        model.train()
        with torch.no_grad():
            return float((model(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())

    assert spread(0.5) > 1e-6
    assert spread(0.0) == 0.0
    assert spread(None) == 0.0


def test_attention_dropout_is_off_in_evaluation_and_draws_no_other_head(model_config):
    torch.manual_seed(1)
    plain = load_backbone(model_config("bert"), "sequence", LABELS, CPU).model.eval()
    torch.manual_seed(1)
    dropped = load_backbone(model_config("bert", attention_dropout=0.5), "sequence", LABELS, CPU).model.eval()
    ids = torch.arange(5, 17).repeat(2, 1)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, dropped(input_ids=ids).logits)


def test_a_backbone_without_attention_dropout_says_so(model_config, monkeypatch):
    monkeypatch.setattr("tokmask_peft.model.backbone._ATTENTION_DROPOUT", ("no_such_name",))
    with pytest.raises(ModelError, match="attention_dropout=null") as caught:
        load_backbone(model_config("bert", attention_dropout=0.1), "sequence", LABELS, CPU)
    assert caught.value.code == "no-attention-dropout"


def test_package_path_is_found_and_its_absence_explained():
    config = ModelConfig(backbone="a/b", backbone_path="package:transformers/models")
    assert backbone_location(config).endswith("transformers/models")
    with pytest.raises(ModelError, match=r"pip install no-such-thing.*backbone_path=null") as caught:
        backbone_location(ModelConfig(backbone="a/b", backbone_path="package:no_such_thing/model"))
    assert (caught.value.code, caught.value.fields) == ("backbone-package-missing", {"package": "no_such_thing"})
    with pytest.raises(ModelError) as caught:
        backbone_location(ModelConfig(backbone="a/b", backbone_path="/no/such/folder"))
    assert (caught.value.code, caught.value.fields) == ("backbone-folder-missing", {"path": "/no/such/folder"})


@pytest.mark.parametrize(("what", "load"), [("tokenizer", load_tokenizer), ("backbone", None)])
def test_a_missing_backbone_is_one_clear_error(tmp_path, tiny_folder, what, load):
    config = ModelConfig(backbone=str(tmp_path / "nothing-here"), precision="fp32", quantization="none")
    if load is None:  # past the tokenizer
        (tmp_path / "nothing-here").mkdir()
        for file in Path(tiny_folder("bert")).glob("tokenizer*"):
            shutil.copy(file, tmp_path / "nothing-here")
        load = functools.partial(load_backbone, task="sequence", labels=LABELS, device=CPU)
    with pytest.raises(ModelError, match="Hub id or a folder") as caught:
        load(config)
    assert caught.value.code == f"{what}-not-loaded"
    assert caught.value.fields == {"location": config.backbone}

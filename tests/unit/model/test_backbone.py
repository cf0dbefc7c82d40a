import functools
import logging
import shutil

import pytest
import torch
from tiny_models import TEXTS, build
from tokenizers import processors
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, AutoModel, AutoTokenizer, ByT5Tokenizer
from transformers.utils import logging as transformers_logging

from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import ModelError
from tokmask_peft.inference.forward import Forward
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import head_modules, load_backbone, load_tokenizer
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.layers import Float32Linear, is_quantized, pool_texts
from tokmask_peft.model.location import backbone_location
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig

CPU = torch.device("cpu")
LABELS = ("negative", "neutral", "positive")
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")


def head_parts(model):
    return [part for name in head_modules(model) for part in model.get_submodule(name).modules()]


HEADS = ("bert", "xlm-r", "distilbert", "modernbert", "qwen2")


@pytest.mark.parametrize(("family", "task"), [*((name, "sequence") for name in HEADS), ("bert", "token")])
def test_labels_and_padding_are_set_and_the_head_is_new_and_in_fp32_also_in_bf16(load, family, task):
    backbone = load(family, task, precision="bf16")
    config = backbone.model.config
    assert [config.id2label[i] for i in range(3)] == list(LABELS)
    assert config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert config.pad_token_id == backbone.tokenizer.pad_token_id is not None
    assert (backbone.tokenizer.padding_side, config.use_cache) == ("right", False)
    assert set(head_modules(backbone.model)) <= set(backbone.new_modules)
    linears = [part for part in head_parts(backbone.model) if isinstance(part, nn.Linear)]
    assert linears
    assert all(type(part) is Float32Linear and part.weight.dtype == torch.float32 for part in linears)
    body = next(p for n, p in backbone.model.base_model.named_parameters() if p.ndim == 2)
    assert body.dtype == torch.bfloat16
    batch = backbone.tokenizer(["hola my amigo", "ok"], return_tensors="pt", padding=True)
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert backbone.model(**batch).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("quantization", "precision"), [("none", "bf16"), pytest.param("nf4", "fp32", marks=needs_bitsandbytes)]
)
def test_pooler_that_the_checkpoint_lacks_is_trained_in_fp32(tiny_folder, tmp_path, quantization, precision):
    AutoModel.from_pretrained(tiny_folder("bert"), add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder("bert")).save_pretrained(tmp_path)
    config = ModelConfig(backbone=str(tmp_path), quantization=quantization, precision=precision)
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
@pytest.mark.parametrize(
    ("family", "task", "quantization"),
    [
        ("bert", "sequence", "nf4"),
        ("bert", "token", "int8"),
        ("distilbert", "sequence", "nf4"),
        ("qwen2", "token", "nf4"),
    ],
)
def test_backbone_is_quantized_but_never_the_head(load, family, task, quantization):
    # heads with a bias (every BERT head, every token head) are quantized by default in transformers
    backbone = load(family, task, quantization=quantization)
    assert sum(map(is_quantized, backbone.model.base_model.modules())) >= 12
    head = head_parts(backbone.model)
    assert not any(map(is_quantized, head))
    assert all(p.dtype == torch.float32 for part in head for p in part.parameters())


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence"), ("qwen2", "sequence"), ("distilbert", "token")])
def test_attention_dropout_is_the_recipe_s_and_off_in_evaluation(load, family, task):
    ids = torch.arange(5, 17).repeat(2, 1)
    evaluated = []

    def spread(dropout):
        """How far two forward passes in training differ; the tiny backbones have no other dropout."""
        torch.manual_seed(1)
        model = load(family, task, attention_dropout=dropout).model
        with torch.no_grad():
            evaluated.append(model.eval()(input_ids=ids).logits)
            model.train()
            return float((model(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())

    assert spread(0.5) > 1e-6
    assert spread(0.0) == 0.0
    assert spread(None) == 0.0
    assert torch.equal(evaluated[0], evaluated[2]), "no other head is drawn"


def test_a_backbone_without_attention_dropout_says_so(load, monkeypatch):
    monkeypatch.setattr("tokmask_peft.model.backbone._ATTENTION_DROPOUT", ("no_such_name",))
    with pytest.raises(ModelError, match="attention_dropout=null") as caught:
        load("bert", attention_dropout=0.1)
    assert caught.value.code == "no-attention-dropout"


def test_package_path_is_found_and_its_absence_explained():
    config = ModelConfig(backbone="a/b", backbone_path="package:transformers/models")
    assert backbone_location(config).endswith("transformers/models")
    for package in ("no_such_thing", "no_such_thing.inner", ""):
        with pytest.raises(ModelError, match=r"pip install .*backbone_path=null") as caught:
            backbone_location(ModelConfig(backbone="a/b", backbone_path=f"package:{package}/model"))
        assert (caught.value.code, caught.value.fields) == ("backbone-package-missing", {"package": package})
    with pytest.raises(ModelError) as caught:
        backbone_location(ModelConfig(backbone="a/b", backbone_path="/no/such/folder"))
    assert (caught.value.code, caught.value.fields) == ("backbone-folder-missing", {"path": "/no/such/folder"})


@pytest.mark.parametrize("what", ["tokenizer", "backbone"])
def test_a_missing_backbone_is_one_clear_error(tmp_path, tiny_folder, what):
    config = ModelConfig(backbone=str(tmp_path / "nothing-here"), precision="fp32", quantization="none")
    load = load_tokenizer
    if what == "backbone":  # past the tokenizer
        shutil.copytree(tiny_folder("bert"), config.backbone, ignore=shutil.ignore_patterns("config.json", "model*"))
        load = functools.partial(load_backbone, task="sequence", labels=LABELS, device=CPU)
    with pytest.raises(ModelError, match="Hub id or a folder") as caught:
        load(config)
    assert (caught.value.code, caught.value.fields) == (f"{what}-not-loaded", {"location": config.backbone})


def test_a_backbone_without_a_head_for_the_task_says_so(load):
    with pytest.raises(ModelError, match=r"no AutoModelForTokenClassification .* data\.task") as caught:
        load("gemma3", "token")
    assert (caught.value.code, "network" in str(caught.value)) == ("backbone-not-loaded", False)


def saved_with(folder, change, family="llama"):
    """Save a tiny backbone with another tokenizer, and return how it is loaded."""
    model, tokenizer = build(family)
    tokenizer = change(tokenizer) or tokenizer
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(backbone=str(folder), precision="fp32", quantization="none")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda _: ByT5Tokenizer(), "slow-tokenizer"),
        (lambda tokenizer: tokenizer.add_tokens(["extraordinario"]) and None, "tokenizer-too-large"),
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<pad>"}) and None, "tokenizer-too-large"),
        (lambda tokenizer: [setattr(tokenizer, f"{it}_token", None) for it in ("pad", "eos")] and None, "no-pad-token"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_clear_error(tmp_path, change, code):
    with pytest.raises(ModelError, match=r"use another backbone|save the backbone again") as caught:
        load_backbone(saved_with(tmp_path, change), "sequence", LABELS, CPU)
    assert caught.value.code == code


@pytest.mark.parametrize("ends", [False, True])
def test_an_end_token_that_pads_is_a_decision_and_changes_no_answer(tmp_path, ends):
    def change(tokenizer):
        tokenizer.pad_token, end = None, (tokenizer.eos_token, tokenizer.eos_token_id)
        if ends:  # each text ends in what also pads
            single, pair = f"$A {end[0]}", f"$A {end[0]} $B {end[0]}"
            form = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[end])
            tokenizer.backend_tokenizer.post_processor = form

    backbone = load_backbone(saved_with(tmp_path, change), "sequence", LABELS, CPU)
    chosen = {one.what: one.choice for one in backbone.decisions}
    assert chosen["pad token"] == backbone.tokenizer.eos_token == backbone.tokenizer.pad_token
    windows = list(Encoder(backbone.tokenizer, "sequence", 32).windows(TEXTS))
    assert all((window.ids[-1] == backbone.tokenizer.pad_token_id) == ends for window in windows)

    def logits(texts_at_once):
        found = Forward(backbone.model.eval(), backbone.tokenizer.pad_token_id, "sequence", torch.float32, "right")
        return torch.cat([torch.tensor(rows) for rows in found.logits(windows, texts_at_once)])

    alone, padded = logits(1), logits(len(windows))
    enable_padding_free(backbone.model)
    for other in (padded, logits(len(windows))):
        torch.testing.assert_close(other, alone, atol=1e-5, rtol=0)
    whole = load_backbone(saved_with(tmp_path / "pad", lambda _: None, "bert"), "sequence", LABELS, CPU)
    assert "pad token" not in {one.what for one in whole.decisions}


def test_loading_says_nothing_of_the_new_head_and_leaves_all_settings(load, capfd, caplog):
    caplog.set_level(logging.WARNING, "transformers.modeling_utils")  # the command line of other tests set another
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    said = logging.Handler()
    said.emit = lambda record: said.__dict__.setdefault("lines", []).append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(said)
    try:
        backbone = load("bert")
        assert not hasattr(said, "lines")
        assert "Loading weights" not in capfd.readouterr().err
        assert transformers_logging.is_progress_bar_enabled()
        type(backbone.model).from_pretrained(backbone.model.name_or_path)
        assert "LOAD REPORT" in said.lines[0], "other code still hears of it"
    finally:
        logger.removeHandler(said)
        (transformers_logging.enable_progress_bar if had_bars else transformers_logging.disable_progress_bar)()


def test_a_pair_is_refused_for_a_model_with_a_decoder_which_has_one_end_token(model_config):
    with pytest.raises(ModelError) as caught:
        load_backbone(model_config("t5"), "sequence", LABELS, CPU, pairs=True)
    assert (caught.value.code, "model.backbone" in str(caught.value)) == ("pairs-with-decoder", True)


@pytest.mark.parametrize(
    ("family", "how", "why"),
    [
        ("t5", "mean", "an encoder and a decoder"),
        ("qwen2", "cls", "no [CLS]"),
        ("bert", "last", "not a decoder"),
        ("albert", "mean", "is given [CLS] alone"),
    ],
)
def test_a_way_to_pool_that_does_not_fit_is_refused_with_the_reason(family, how, why):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes)) if family == "albert" else build(family)[0]
    pool_texts(model, "auto")
    with pytest.raises(ModelError) as caught:
        pool_texts(model, how)
    assert (caught.value.code, why in str(caught.value)) == ("pooling", True)

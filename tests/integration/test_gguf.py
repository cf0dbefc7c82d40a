"""A backbone from a GGUF file: the same values as from the folder it was made from, also in 4 bits."""

import importlib.util
import json

import pytest
import torch
from tiny_models import TEXTS, build, encode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tokmask_peft import Recipe, evaluate, load, train
from tokmask_peft.errors import ExtraError, MaskTokenError, ModelError
from tokmask_peft.inference.export import export_merged
from tokmask_peft.model.backbone import load_backbone, load_tokenizer
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.location import loading_source
from tokmask_peft.recipe.schema import ModelConfig
from tokmask_peft.training.memory import without_training

CPU = torch.device("cpu")
LABELS = ("a", "b", "c")
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf, which writes such files")
needs_bitsandbytes = pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")
SIZE = {"hidden_size": 64, "intermediate_size": 64}
NAMES = {  # of a Qwen2 in transformers, and in a GGUF file
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny Qwen2 in a folder, and in a GGUF file with matrices in 8 bits, whose rounded values the folder has."""
    import gguf

    folder = tmp_path_factory.mktemp("qwen2")
    model, tokenizer = build("qwen2", **SIZE)
    config, file = model.config, folder / "tiny-Q8_0.gguf"
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    spelled = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([spelled.get(index, f"<spare{index}>") for index in range(config.vocab_size)])
    special = set(tokenizer.all_special_ids)
    kinds = [3 if index in special else 1 if index in spelled else 5 for index in range(config.vocab_size)]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, value in model.base_model.state_dict().items():
        stem, ending = name.rsplit(".", 1)
        prefix, _, part = stem.removeprefix("layers.").partition(".")
        theirs = f"blk.{prefix}.{NAMES[part]}" if stem.startswith("layers.") else NAMES[stem]
        array = value.numpy()
        if value.dim() > 1:
            packed = gguf.quants.quantize(array, kind)
            value.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
            writer.add_tensor(f"{theirs}.{ending}", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{theirs}.{ending}", array)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, file


def loaded(path, seed=0, **settings):
    torch.manual_seed(seed)
    config = ModelConfig(backbone=str(path), **{"precision": "fp32", "quantization": "none", **settings})
    return load_backbone(config, "sequence", LABELS, CPU)


@needs_gguf
@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "unpacked to fp32"),
        ({"precision": "bf16", "attention_dropout": 0.2}, "unpacked to bf16"),
        pytest.param(
            {"quantization": "nf4"}, "unpacked to fp32, and rounded once more, to nf4", marks=needs_bitsandbytes
        ),
    ],
)
def test_it_is_the_backbone_that_the_file_was_made_of(files, settings, reason):
    folder, file = files
    ours, expected = loaded(file, **settings), loaded(folder, **settings)
    batch = encode(expected.tokenizer)
    assert torch.equal(encode(ours.tokenizer)["input_ids"], batch["input_ids"])
    torch.testing.assert_close(ours.model(**batch).logits, expected.model(**batch).logits)
    assert (ours.weights, ours.new_modules) == (expected.weights, expected.new_modules)
    assert ours.model.config.attention_dropout == settings.get("attention_dropout", 0.0)
    assert [decision.reason for decision in ours.decisions if decision.choice == file.name] == [reason]


@needs_gguf
@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_a_run_on_it(files, write_recipe, tmp_path, quantization):
    changes = [f"model.backbone={files[1]}", f"model.quantization={quantization}", "training.max_steps=6"]
    with pytest.raises(MaskTokenError) as caught:  # llama.cpp's converter names the spare rows, so that none is left
        train(Recipe.load(write_recipe("qwen2"), changes), quiet=True)
    assert caught.value.code == "no-mask-token"
    recipe = Recipe.load(write_recipe("qwen2"), [*changes, "masking.mask_token=340"])
    assert without_training(recipe).largest.total > 0
    run = train(recipe, quiet=True)
    assert {one["what"]: one["choice"] for one in run.result.decisions}["batching"] == "padding_free"
    assert evaluate(run.folder.root)["confusion"] == run.result.test["confusion"]
    classifier = load(run.folder.adapter, quantization="none")
    (answer,) = classifier.predict(TEXTS[:1])
    folder = export_merged(run.folder.adapter, tmp_path / "merged").folder
    merged, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    chances = (merged.eval()(**encode(tokenizer, TEXTS[:1])).logits[0] / classifier.temperature).softmax(-1)
    assert list(answer.probabilities.values()) == pytest.approx(chances.tolist(), abs=1e-4)


@needs_gguf
def test_a_path_from_another_directory_and_a_file_on_the_hub(files, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    relative = f"{files[0].name}/{files[1].name}"
    assert ModelConfig(backbone=relative).backbone == str(files[1])
    config = ModelConfig(backbone="any/name", backbone_path=str(files[1]))
    assert load_tokenizer(config).pad_token == "<|endoftext|>"
    config = ModelConfig(backbone="Qwen/Qwen2.5-0.5B-GGUF/sub/q4.gguf", revision="v1")
    hub = loading_source(config, config.backbone)
    assert hub == ("Qwen/Qwen2.5-0.5B-GGUF", {"revision": "v1", "trust_remote_code": False, "gguf_file": "sub/q4.gguf"})


@needs_gguf
@pytest.mark.parametrize("name", ["missing.gguf", "./there/is/missing.gguf", "/not/there/missing.gguf"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(ModelError, match="OWNER/REPOSITORY") as caught:
        load_tokenizer(ModelConfig(backbone=name))
    assert (caught.value.code, caught.value.fields["location"]) == ("backbone-not-loaded", name)


@needs_gguf
def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "other.gguf").write_text("no weights")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(ModelConfig(backbone=str(tmp_path / "other.gguf")))
    assert caught.value.code == "tokenizer-not-loaded"


def test_without_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ExtraError, match="gguf") as caught:
        load_tokenizer(ModelConfig(backbone=str(tmp_path / "some.gguf")))
    assert caught.value.fields["extra"] == "gguf"

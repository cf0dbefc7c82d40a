"""Loading: from an adapter folder alone, as it was trained, with one clear message per mistake."""

import functools
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from tiny_models import TEXTS, build
from transformers.generation import candidate_generator
from typer.testing import CliRunner

import tokmask_peft
from tokmask_peft.artifacts import find_saved
from tokmask_peft.cli import app
from tokmask_peft.errors import ModelError, TokmaskError
from tokmask_peft.inference.classifier import _choose_batching, load
from tokmask_peft.inference.export import export_merged
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.model.packed import takes_packed_rows


@pytest.fixture
def copied(saved_adapter, tmp_path):
    """Return a function that gives a copy of a saved adapter, to be spoiled."""

    def make(**options):
        return shutil.copytree(saved_adapter(**options), tmp_path / "copy")

    return make


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_an_adapter_folder_gives_what_stock_peft_gives(saved_adapter, family):
    folder = saved_adapter(family)
    model = tokmask_peft.load(folder)
    assert model.labels == ("bad [x]", "good", "so-so")
    assert (model.max_length, model.temperature) == (24, 2.0)
    stock = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    short = [text for text in TEXTS if len(model.tokenizer(text)["input_ids"]) <= 24]
    assert len(short) > 2
    for text, answer in zip(short, model.predict(short), strict=True):
        with torch.no_grad():
            expected = (stock(**model.tokenizer(text, return_tensors="pt")).logits / 2.0).softmax(-1)[0]
        assert list(answer.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    decided = {"device", "adapter", "batching", "precision", "quantization"}
    assert {decision.what for decision in model.decisions} == decided


def test_packed_rows_are_decided_with_the_reason(saved_adapter, monkeypatch):
    decided = next(one for one in load(saved_adapter()).decisions if one.what == "batching")
    assert (decided.choice, decided.reason) == ("padding_free", "a batch is one row, with attention per text")
    monkeypatch.setattr("tokmask_peft.model.packed.padding_free_problem", lambda _: "its attention is eager")
    model = load(saved_adapter())
    decided = next(one for one in model.decisions if one.what == "batching")
    assert (decided.choice, decided.reason) == ("padded", "padding_free does not fit: its attention is eager")
    assert not takes_packed_rows(model.model)


@pytest.mark.parametrize(("device", "choice"), [("cpu", "padding_free"), ("cuda", "padded"), ("mps", "padded")])
def test_packed_rows_are_for_cpus_alone(device, choice):
    model, _ = build("bert")
    decided = _choose_batching(model, torch.device(device))
    assert decided.choice == choice
    assert device in decided.reason or choice == "padding_free"
    assert takes_packed_rows(model) == (choice == "padding_free")


def test_a_backbone_in_an_installed_package_is_found(copied, tmp_path, monkeypatch):
    folder = copied(package="package:my_backbone/model/small")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    edit(folder / "adapter_config.json", base_model_name_or_path="nobody/not-on-the-hub")
    with pytest.raises(ModelError, match="my_backbone is not installed"):
        load(folder)
    (tmp_path / "site" / "my_backbone").mkdir(parents=True)
    (tmp_path / "site" / "my_backbone" / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(named, tmp_path / "site" / "my_backbone" / "model" / "small")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert load(folder).predict(["hoy"])[0].label
    assert "my_backbone" not in sys.modules


def test_another_backbone_can_be_named(copied):
    folder = copied(package="package:not_there/model")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    edit(folder / "adapter_config.json", base_model_name_or_path="nobody/not-on-the-hub")
    assert load(folder, backbone=named).predict(["hoy"])[0].label
    config = find_saved(folder, "other/model").model
    assert (config.backbone, config.backbone_path) == ("other/model", None)


def test_an_adapter_of_fp16_answers_in_fp32_where_there_is_no_fp16(saved_adapter):
    made = load(saved_adapter(precision="fp16"))
    decided = next(one for one in made.decisions if one.what == "precision")
    assert decided.choice == "fp32"
    assert "trained in fp16" in decided.reason
    with pytest.raises(ModelError) as caught:
        load(saved_adapter(), precision="fp16")
    assert caught.value.code == "no-fp16"


def test_predict_imports_neither_peft_nor_what_only_training_needs(saved_adapter):
    needless = ["peft", "bitsandbytes", "torch._inductor.compile_fx", "datasets", "pandas", "sklearn", "optuna"]
    if "\n    from sklearn" in inspect.getsource(candidate_generator):  # it is transformers that needs it
        needless.remove("sklearn")
    report = f"print([name for name in {needless} if name in sys.modules])"
    code = f"import sys; from tokmask_peft.cli import main\ntry:\n main()\nfinally:\n {report}"
    command = [sys.executable, "-c", code, "predict", str(saved_adapter()), "hola boss"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")


def test_bf16_and_4_bit_give_nearly_the_same(saved_adapter):
    folder = saved_adapter()
    exact = load(folder).predict(TEXTS)
    for options in ({"precision": "bf16"}, {"quantization": "nf4"}, {"quantization": "nf4", "precision": "bf16"}):
        model = load(folder, **options)
        for one, other in zip(exact, model.predict(TEXTS), strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=0.25)
        found = {decision.what: decision.choice for decision in model.decisions}
        assert found["precision"] == options.get("precision", "fp32")
        assert found["quantization"] == options.get("quantization", "none")


def test_the_quantization_of_training_is_taken_where_it_runs(saved_adapter, monkeypatch):
    folder = saved_adapter(quantization="nf4")
    assert find_saved(folder).model.quantization == "nf4"
    reasons = {decision.what: decision for decision in load(folder).decisions}
    assert reasons["quantization"].choice == "nf4"
    monkeypatch.setattr("tokmask_peft.model.decisions.bitsandbytes_problem", lambda _: "it is not here")
    reasons = {decision.what: decision for decision in load(folder).decisions}
    assert reasons["quantization"].choice == "none"
    assert "trained on nf4, but it is not here" in reasons["quantization"].reason


@pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="bitsandbytes")
def test_the_embedding_of_training_is_taken_where_it_runs(saved_adapter, monkeypatch):
    folder = saved_adapter(embedding="8bit")
    model = load(folder)
    assert type(find_embedding(model.model)).__name__ == "Int8Embedding"
    assert {decision.what: decision.choice for decision in model.decisions}["embedding"] == "8bit"
    monkeypatch.setattr("tokmask_peft.model.decisions.bitsandbytes_problem", lambda _: "it is not here")
    model = load(folder)
    assert type(find_embedding(model.model)) is torch.nn.Embedding
    reasons = {decision.what: decision for decision in model.decisions}
    assert reasons["embedding"].choice == "resident"
    assert "trained on the 8-bit embedding, but it is not here" in reasons["embedding"].reason


def test_a_run_s_own_recipe_says_where_the_embedding_lay(saved_adapter, tmp_path):
    adapter = shutil.copytree(saved_adapter(), tmp_path / "run" / "adapter")
    loading = json.loads((adapter / "tokmask.json").read_text())
    for key in ("embedding", "attention", "label_on"):  # as runs were saved before they were
        del loading["loading"][key]
    (adapter / "tokmask.json").write_text(json.dumps(loading))
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = {"backbone": named, "embedding": "8bit"}
    recipe = {"name": "run", "model": model, "data": {"task": "sequence", "builtin": True}}
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    assert find_saved(tmp_path / "run").model.embedding == "8bit"
    assert find_saved(adapter).model.embedding == "resident"
    for saved in (find_saved(adapter), find_saved(tmp_path / "run")):
        assert (saved.loading.label_on, saved.model.attention) == ("first", "causal")


def test_an_embedding_on_the_host_is_an_ordinary_one_on_a_cpu(saved_adapter):
    folder = saved_adapter(embedding="offload")
    assert find_saved(folder).model.embedding == "offload"
    model = load(folder)
    assert type(find_embedding(model.model)) is torch.nn.Embedding
    assert "embedding" not in {decision.what for decision in model.decisions}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"loading": {"package": "package:../etc/x"}}, "loading.package"),
        ({"loading": {"package": "package:os/../../x"}}, "loading.package"),
        ({"loading": {"package": "/root/model"}}, "loading.package"),
        ({"loading": {"max_length": "128"}}, "loading.max_length"),
        ({"loading": {"quantization": "nf5"}}, "loading.quantization"),
        ({"loading": {"embedding": "disk"}}, "loading.embedding"),
        ({"calibration": {"temperature": 0}}, "calibration.temperature"),
        ({"calibration": {"temperature": "1"}}, "calibration.temperature"),
        ({"task": "speech"}, "task"),
        ({"task": "token", "pair": ["a", "b"]}, "pair"),
        ({"labels": ["good", "bad", "good"]}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": ["good", ""]}, "labels"),
        ({"calibration": {"temperature": 1e-320}}, "calibration.temperature"),
        ({"format": 3}, "format"),
    ],
)
def test_what_does_not_come_from_a_run_is_refused(copied, changes, key):
    folder = copied()
    edit(folder / "tokmask.json", **changes)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert (caught.value.code, caught.value.fields["key"]) == ("bad-adapter-file", key)


def test_labels_of_another_adapter_and_a_backbone_without_a_name_are_refused(copied):
    folder = copied()
    edit(folder / "tokmask.json", labels=["a", "b"])
    with pytest.raises(ModelError, match="does not fit"):
        load(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="names no base model"):
        load(folder)


def test_missing_places_are_named(copied, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: run")
    for place, expected in {
        tmp_path / "empty": "neither a run",
        tmp_path / "run": "has no adapter yet",
        tmp_path / "no" / "where": "does not exist",
        "a b": "does not exist",
    }.items():
        with pytest.raises(TokmaskError, match=expected):
            load(place)
    folder = copied()
    (folder / "tokmask.json").unlink()
    with pytest.raises(ModelError, match="not saved by tokmask_peft"):
        load(folder)


def test_wrong_options_are_named(saved_adapter):
    for options, expected in {
        ("device", "toaster"): "toaster",
        ("device", "cuda:99"): "cuda:99",
        ("quantization", "nf5"): "nf4, int8 or none",
        ("precision", "fp8"): "bf16, fp16 or fp32",
    }.items():
        with pytest.raises(ModelError, match=expected):
            load(saved_adapter(), **dict([options]))


CODE = """
import pathlib
from transformers import BertConfig, BertForSequenceClassification
pathlib.Path({mark!r}).touch()
class StrangeConfig(BertConfig):
    model_type = "strange"
class StrangeModel(BertForSequenceClassification):
    config_class = StrangeConfig
"""


def test_the_code_of_a_backbone_runs_only_if_the_caller_allows_it(copied, tmp_path, monkeypatch):
    """The recipe of a stranger's run says yes, which is not the caller's word."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    adapter, mark = copied(), tmp_path / "ran"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    backbone = shutil.copytree(named, tmp_path / "strange")
    (backbone / "strange.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "strange.StrangeConfig", "AutoModelForSequenceClassification": "strange.StrangeModel"}
    edit(backbone / "config.json", model_type="strange", auto_map=classes)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(backbone))
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "adapter")
    model = {"backbone": str(backbone), "trust_remote_code": True, "quantization": "none", "precision": "fp32"}
    recipe = {"name": "run", "model": model, "data": {"task": "sequence", "builtin": True}}
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    root = tmp_path / "run"
    (tmp_path / "texts.tsv").write_text("text\tlabel\nhoy\tgood\n")
    evaluate = functools.partial(tokmask_peft.evaluate, data=str(tmp_path / "texts.tsv"))
    for use in (load, evaluate, functools.partial(export_merged, folder=tmp_path / "merged")):
        with pytest.raises(ModelError, match="--trust-remote-code"):
            use(root)
    refused = CliRunner().invoke(app, ["predict", str(root), "hoy"])
    assert (refused.exit_code, "--trust-remote-code" in refused.stderr) == (2, True)
    assert not mark.exists()
    assert load(root, trust_remote_code=True).predict(["hoy"])[0].label
    assert mark.exists()
    allowed = CliRunner().invoke(app, ["predict", str(root), "hoy", "--trust-remote-code"])
    assert (allowed.exit_code, allowed.stdout.count("hoy")) == (0, 1)


def test_a_hub_id_is_fetched_without_pickles(saved_adapter, monkeypatch):
    asked = {}

    def fetch(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(saved_adapter())

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_saved("user/name").info.labels == ("bad [x]", "good", "so-so")
    assert not any(pattern.endswith((".bin", ".pt", "*.*", ".py")) or pattern == "*" for pattern in asked["user/name"])
    assert {"adapter_model.safetensors", "labels.json", "tokmask.json"} <= set(asked["user/name"])


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match=r"user/name is not a local folder, and as an id on the Hub it .*network"):
        find_saved("user/name")  # the tests run offline, and the cache does not hold it

    def broken(*_, **__):
        raise ConnectionError("reset by peer\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ModelError, match=r"reset by peer; check the network"):
        find_saved("user/name")
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    with pytest.raises(ModelError, match="holds no adapter"):
        find_saved("user/name")


def test_a_rank_that_the_weights_do_not_have_is_refused_before_it_takes_memory(copied):
    folder = copied()
    edit(folder / "adapter_config.json", r=10**9)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert (caught.value.code, caught.value.fields["rank"]) == ("adapter-does-not-fit", 10**9)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokmask.json"])
def test_a_pipe_among_the_files_is_refused(copied, name):
    file = copied() / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelError) as caught:
        load(file.parent)
    assert (caught.value.code, caught.value.fields["path"]) == ("not-a-file", file)


def test_a_tokenizer_larger_than_the_embedding_is_refused(copied, tmp_path):
    folder = copied()
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    backbone = shutil.copytree(named, tmp_path / "larger")
    _, tokenizer = build("bert")
    tokenizer.add_tokens(["extraordinario"])
    tokenizer.save_pretrained(backbone)
    with pytest.raises(ModelError) as caught:
        load(folder, backbone=str(backbone))
    assert caught.value.code == "tokenizer-too-large"
    assert caught.value.fields["largest"] == caught.value.fields["rows"]

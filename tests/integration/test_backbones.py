"""Two steps of each backbone family, from its real config and its real tokenizer, with random weights."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from tokmask_peft import Recipe, evaluate, train
from tokmask_peft.recipe.loading import load_recipe

NAMES = {
    "mbert": "bert-base-multilingual-cased",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "tinyllama-1.1b": "TinyLlama-1.1B-Chat-v1.0",
}
MASK = {"mbert": (103, "mask"), "qwen2.5-0.5b": (151935, "spare"), "tinyllama-1.1b": (0, "unk")}


@pytest.fixture(scope="module")
def real_shape(real_tokenizers, tmp_path_factory):
    """Return a function that saves a model of a real config (fewer and narrower layers) and gives its folder."""
    made = {}

    def make(name):
        if name not in made:
            source = real_tokenizers / NAMES[name]
            shape = json.loads((source / "config.json").read_text(encoding="utf-8"))
            smaller = {"num_hidden_layers": 2, "intermediate_size": shape["intermediate_size"] // 4}
            config = AutoConfig.for_model(**{**shape, **smaller})
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(name)
            AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.mark.parametrize(
    ("task", "name"), [("lid_spaeng", "mbert"), ("sa_spaeng", "qwen2.5-0.5b"), ("lid_spaeng", "tinyllama-1.1b")]
)
def test_two_steps_of_the_shipped_recipe(real_shape, data_folder, tmp_path, task, name):
    kind = load_recipe(f"{task}/{name}").data.task
    recipe = Recipe.load(
        f"{task}/{name}",
        [
            f"model.backbone={real_shape(name)}",
            f"output_dir={tmp_path}",
            f"data.path={data_folder}",
            f"data.format={'conll' if kind == 'token' else 'tsv'}",
            "data.max_train=24",
            "training.max_steps=2",
            "training.batch_size=4",
            "training.gradient_accumulation=1",
        ],
    )
    run = train(recipe, quiet=True)
    decided = {decision["what"]: decision for decision in run.result.decisions}
    assert decided["mask token"]["choice"] == "id {} ({})".format(*MASK[name])
    assert decided["quantization"]["choice"] in {"nf4", "none"}
    saved = json.loads((run.folder.adapter / "tokmask.json").read_text())["masking"]
    assert saved["mask_token"] == MASK[name][0]
    size = (run.folder.adapter / "adapter_model.safetensors").stat().st_size
    assert size < 4_000_000, "the adapter holds more than LoRA and the head"
    assert evaluate(run.folder.root)["confusion"] == run.result.test["confusion"]

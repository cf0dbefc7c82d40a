"""For one seed the arms of a sweep differ by what they name and by nothing else."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_models import TEXTS, build

from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.study.plan import make_plan
from tokmask_peft.training import train as training
from tokmask_peft.training.trainer import OrderedEvalTrainer

pytestmark = pytest.mark.usefixtures("counted_once")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paired")
    model, tokenizer = build("bert", dropout=0.1)
    model.base_model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        rows = [f"{TEXTS[i % 8]} {'ok ' * (i % 5)}n{i + start}\t{'ab'[i % 2]}" for i in range(24 if start == 0 else 8)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(f"""
name: paired
output_dir: {folder / "runs"}
model: {{backbone: "{folder / "backbone"}", quantization: none, precision: fp32}}
adapter: {{r: 4}}
data: {{task: sequence, path: "{folder}", format: tsv, max_length: 64, hygiene: report}}
training: {{epochs: 2, batch_size: 8, baseline: false}}
""")
    return path


@pytest.fixture
def train_arms(recipe, tmp_path, monkeypatch):
    """Return a function that trains the arms of one seed and returns what each saw."""
    step = OrderedEvalTrainer.training_step

    def watching(trainer, model, inputs, *args, **kwargs):
        if not seen.batches:
            seen.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            embedding = find_embedding(model)
            embedding.register_forward_pre_hook(lambda _, ids: seen.masked.append(ids[0].detach().clone()))
        seen.batches.append(texts_of(inputs))
        seen.random.append(torch.get_rng_state())
        return step(trainer, model, inputs, *args, **kwargs)

    seen = SimpleNamespace()
    monkeypatch.setattr(OrderedEvalTrainer, "training_step", watching)
    monkeypatch.setattr(
        training, "save_adapter_folder", lambda folder, *_: folder.mkdir()
    )  # what a run leaves does not matter here

    def train(*overrides, **axes):
        nonlocal seen
        plan = make_plan(str(recipe), [*overrides, f"output_dir={tmp_path}"], seeds="7,", name="arms", **axes)
        found = {}
        for cell in plan.cells:
            seen = found[cell.arm.label] = SimpleNamespace(batches=[], random=[], masked=[])
            training.train(plan.recipe_of(cell), quiet=True)
        return found

    return train


def texts_of(inputs):
    """Return the ids of each text of a batch, packed or padded."""
    if "cu_seqlens" in inputs:
        borders = inputs["cu_seqlens"].tolist()
        row = inputs["input_ids"].flatten()
        return [row[a:b].tolist() for a, b in itertools.pairwise(borders)]
    mask = inputs["attention_mask"].bool()
    return [row[kept].tolist() for row, kept in zip(inputs["input_ids"], mask, strict=True)]


def same_start_and_batches(one, two):
    assert one.weights.keys() == two.weights.keys()
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert len(one.batches) == 6
    assert one.batches == two.batches


def test_masking_rates_share_everything_but_the_masks_which_nest(train_arms):
    arms = train_arms(p="0,0.1,0.3")
    plain, some, more = arms["p0"], arms["p0.1"], arms["p0.3"]
    for other in (some, more):
        same_start_and_batches(plain, other)
        assert all(torch.equal(a, b) for a, b in zip(plain.random, other.random, strict=True))  # dropout's stream
    count = [0, 0]
    for clean, few, many in zip(plain.masked, some.masked, more.masked, strict=True):
        changed_few, changed_many = few != clean, many != clean
        assert not (changed_few & ~changed_many).any()
        count = [count[0] + int(changed_few.sum()), count[1] + int(changed_many.sum())]
    assert 0 < count[0] < count[1]


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_other_regularizers_share_start_and_batches(train_arms, batching):
    arms = train_arms(f"training.batching={batching}", arms="none,attention_dropout,neftune,mask+neftune", p="0,0.2")
    assert set(arms) == {"none", "attention_dropout", "neftune", "mask0.2+neftune"}
    for label in set(arms) - {"none"}:
        same_start_and_batches(arms["none"], arms[label])
    assert not torch.equal(arms["none"].random[-1], arms["neftune"].random[-1])  # they do draw differently

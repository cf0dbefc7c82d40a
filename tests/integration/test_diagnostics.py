"""Gradients and robustness of tiny trained models, against the slow and plain way to get the same numbers."""

import json

import numpy as np
import pytest
import torch

from tokmask_peft import train
from tokmask_peft.inference.classifier import load
from tokmask_peft.masking.embedding import UsedRows
from tokmask_peft.masking.pattern import maskable_table, masked_positions
from tokmask_peft.masking.schedule import Ready
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.evaluate import split_examples
from tokmask_peft.training.losses import ClassificationLoss
from tokmask_peft.training.train import observe_training

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from tokmask_peft.data.encoding import Encoder
from tokmask_peft.study.diagnostics import gradients as metering
from tokmask_peft.study.diagnostics.gradients import diagnose
from tokmask_peft.study.diagnostics.plans import GradientPlan, Perturbations, find_members
from tokmask_peft.study.diagnostics.robustness import normal, predicted, robustness, score_perturbed


def losses(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.parametrize("extra", [["masking.p=0.2"], ["masking.p=0", "training.neftune_alpha=5"]])
def test_looking_changes_nothing_of_the_training(write_recipe, tmp_path, extra):
    recipe = Recipe.load(write_recipe(), [*extra, "training.epochs=1", "training.baseline=false"])
    plan = GradientPlan(tmp_path / "look", (0.1, 0.3), 2, 4, (0.0, 0.5, 1.0))
    report = diagnose(recipe, plan, quiet=True)
    done = train(recipe, quiet=True)
    assert losses(plan.folder / "log.jsonl") == losses(done.folder.log)
    found = json.loads(report.statistics.read_text())
    assert [point["step"] for point in found["points"]] == [0, 6, 12]
    assert [row["p"] for row in found["points"][2]["groups"]["lora"]["rates"]] == [0.1, 0.3]
    first, last = (found["points"][number]["groups"]["lora"]["rates"][1] for number in (0, 2))
    assert first["mask_variance"]["value"] > 0
    assert first["mask_variance"] != last["mask_variance"]
    assert "## Cautions" in report.markdown.read_text()
    files = {"gradients.json", "gradients.md", "gradients.png", "gradients.svg", "log.jsonl"}
    assert {path.name for path in plan.folder.iterdir()} == files


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("sequence", ["masking.schedule=ready"]),
        ("token", ["masking.replace=drop"]),
        ("token", ["training.views=2", "masking.score_masked=false", "data.label_on=mean"]),
    ],
)
def test_what_is_measured_is_masked_and_scored_as_in_training(write_recipe, tmp_path, monkeypatch, task, keys):
    monkeypatch.setattr(Ready, "class_scale", lambda self: [0.0] * 8)  # the plan's rates are those of all classes
    scored, call = [], ClassificationLoss.__call__

    def noting(self, outputs, labels, num_items_in_batch=None):
        if num_items_in_batch is None:
            scored.append([int((part != -100).sum()) for part in labels.flatten().chunk(2)])
        return call(self, outputs, labels, num_items_in_batch)

    monkeypatch.setattr(ClassificationLoss, "__call__", noting)
    recipe = Recipe.load(write_recipe(task=task), ["masking.p=0.2", "training.max_steps=4", *keys])
    report = diagnose(recipe, GradientPlan(tmp_path / "look", (0.4,), 2, 3, (0.0, 0.5)), quiet=True)
    points = json.loads(report.statistics.read_text())["points"]
    assert all(point["groups"]["lora"]["rates"][0]["mask_variance"]["value"] > 0 for point in points)
    assert len(scored) == 2 * 3 * (1 + 2)
    first, second = ({*counts} for counts in zip(*scored, strict=True))
    assert len(second) > 3 or task == "sequence"
    assert len(first) <= 3 or "training.views=2" not in keys, "the first view is whole"


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_inner_products_are_those_of_gradients_of_texts_masked_by_hand(write_recipe, tmp_path, family):
    recipe = Recipe.load(write_recipe(family), ["masking.p=0.2", "adapter.dropout=0.5"])
    texts, rate, draws = [[0], [1], [2], [3]], 0.4, 3
    seen = []

    def observers(trainer, mask):
        meter = metering.GradientMeter(trainer, texts, [rate], draws, recipe.masking, mask, seed=5)
        seen.append((meter.measure(), by_hand(trainer, mask)))
        raise KeyboardInterrupt  # enough

    def by_hand(trainer, mask):
        model = trainer.model.eval()
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        rows = model.get_base_model().get_input_embeddings().weight
        tokenizer = trainer.processing_class
        table = maskable_table(tokenizer, len(rows), {tokenizer.pad_token_id})
        if mask.kind == "spare":
            rows.data[mask.id] = UsedRows.of(model.get_base_model().get_input_embeddings(), tokenizer).typical()

        def gradient(ids, label):
            model.zero_grad()
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            trainer.compute_loss_func(outputs, torch.tensor([label])).backward()
            parts = {True: [], False: []}
            for name, value in trained:
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                parts["lora_" in name].append(grad.flatten())
            return torch.cat(parts[True]), torch.cat(parts[False])

        within = {"lora": [], "head": []}
        for number, (text,) in enumerate(texts):
            row = trainer.train_dataset[text]
            ids = torch.tensor([row["input_ids"]])
            vectors = []
            for draw in range(draws):
                where = masked_positions(ids, rate, 5 + metering._SEED, number * draws + draw, 0, table[ids])
                vectors.append(gradient(ids.masked_fill(where, mask.id), row["labels"]))
            plain = gradient(ids, row["labels"])
            for place, group in enumerate(("lora", "head")):
                stack = torch.stack([*(one[place] - plain[place] for one in vectors), plain[place]])
                within[group].append((stack.double() @ stack.double().T).numpy())
        return {group: np.stack(found) for group, found in within.items()}

    with pytest.raises(KeyboardInterrupt):
        observe_training(recipe, tmp_path, observers, quiet=True)
    found, truth = seen[0]
    for group in ("lora", "head"):
        np.testing.assert_allclose(found[group][rate].within, truth[group], rtol=1e-3, atol=1e-7)
        assert (truth[group][:, 0, 0] > 0).any()
    np.testing.assert_allclose(found["all"][rate].within, truth["lora"] + truth["head"], rtol=1e-3, atol=1e-7)
    grams = found["lora"][rate]
    means = [block[:draws, :draws].mean() for block in grams.within]
    np.testing.assert_allclose(np.diagonal(grams.between)[:4], means, rtol=1e-4)
    np.testing.assert_allclose(np.diagonal(grams.between)[4:], grams.within[:, draws, draws], rtol=1e-5)


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_scores_on_masked_texts_are_those_of_ids_masked_by_hand(write_recipe, tmp_path, task):
    path = write_recipe(task=task, extra="masking: {p: 0.2, unit: word}")
    recipe = Recipe.load(path, ["training.epochs=2", "training.baseline=false"])
    done = train(recipe, quiet=True)
    classifier = load(done.folder.root, "cpu")
    examples, _ = split_examples(recipe, "test", None, done.folder.adapter)
    train_examples, _ = split_examples(recipe, "train", None, done.folder.adapter)
    what = Perturbations((0.5,), (1.0,), 2, seed=9)
    found = score_perturbed(classifier, examples, {normal(word) for one in train_examples for word in one.words}, what)
    assert found["clean"]["f1_macro"] == pytest.approx(done.result.test["f1_macro"])
    unseen = found["words"]["unseen"]["items"]  # the last word of each text is its own
    assert unseen == len(examples)
    assert found["words"]["seen"]["items"] == (0 if task == "sequence" else done.result.test["items"] - unseen)

    from tokmask_peft.masking.pattern import word_start_table

    tokenizer = classifier.tokenizer
    rows = len(classifier.occlusion.maskable)
    table, starts = maskable_table(tokenizer, rows, {tokenizer.pad_token_id}), word_start_table(tokenizer, rows)
    right = total = 0
    for number, example in enumerate(examples):
        given = example.string if task == "sequence" else list(example.words)
        (window,) = classifier.encoder.windows([given])
        ids = torch.tensor([window.ids])
        number = torch.tensor([[number]])
        where = masked_positions(ids, 0.5, 9, 1, 0, table[ids], starts[ids], "word", rows=number)
        hidden = ids.masked_fill(where, tokenizer.mask_token_id)
        with torch.no_grad():
            logits = classifier.model(input_ids=hidden, attention_mask=torch.ones_like(ids)).logits[0]
        chosen = logits[torch.as_tensor(window.positions)].argmax(-1) if task == "token" else logits.argmax(-1)[None]
        right += sum(classifier.labels[at] == tag for at, tag in zip(chosen.tolist(), example.tags, strict=True))
        total += len(example.tags)
    one = score_perturbed(classifier, examples, set(), Perturbations((0.5,), (), 1, seed=9))["mask"][0]["accuracy"]
    two = found["mask"][0]["accuracy"]
    assert 2 * two - one == pytest.approx(right / total)  # of the second draw

    # texts longer than those of training, as predict reads them
    classifier.encoder = Encoder(tokenizer, task, 8)
    given = [example.string if task == "sequence" else list(example.words) for example in examples]
    answers = classifier.predict(given)
    labels = [list(one.labels) if task == "token" else [one.label] for one in answers]
    assert max(one.windows for one in answers) > 1
    found = predicted(classifier, list(classifier.encoder.windows(given)), 16, len(classifier.labels))
    assert [[classifier.labels[at] for at in row] for row in found] == labels


def test_robustness_of_two_runs_through_the_command_line(trained, tmp_path, tokmask):
    runs = [trained("bert", "sequence", "masking.p=0").folder.root, trained().folder.root]
    said = tokmask("robustness", *runs, "--p", "0.5", "--noise", "0.5", "--draws", "2", "--out", "found").stdout
    assert "trained with p = 0, seed" in said
    assert "50% of sub-tokens masked" in said
    assert "One run per line" in said
    folder = tmp_path / "found"
    assert {path.name for path in folder.iterdir()} == {f"robustness.{end}" for end in ("json", "md", "png", "svg")}
    before = json.loads((folder / "robustness.json").read_text())
    scored = [run["clean"]["f1_macro"] for run in before["runs"]]
    for run, score in zip(runs, scored, strict=True):
        assert score == pytest.approx(json.loads((run / "result.json").read_text())["test"]["f1_macro"])
    again = robustness(find_members([str(runs[1])]), Perturbations((0.5,), (0.5,), 2), folder, quiet=True)
    assert json.loads(again.statistics.read_text())["runs"] == before["runs"][1:]

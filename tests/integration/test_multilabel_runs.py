"""Several labels for each text through every command: one training, then whatever can be done with it."""

import ast
import contextlib
import csv
import io
import json
import random

import pyarrow.parquet as pq
import pytest
from transformers import pipeline

import tokmask_peft
from tokmask_peft import Recipe, evaluate, train
from tokmask_peft.artifacts import find_saved, open_run
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.examples import Example, LabelSet
from tokmask_peft.hub.card import PLACEHOLDER, Card
from tokmask_peft.recipe.loading import to_yaml
from tokmask_peft.report.demo import answer, of_run
from tokmask_peft.report.examples import find_mistakes
from tokmask_peft.study.diagnostics.plans import Perturbations
from tokmask_peft.study.diagnostics.robustness import score_perturbed

WORDS = {"joy": ["great", "lindo", "happy"], "anger": ["awful", "malo", "bad"], "fear": ["scary", "miedo"]}
FILLER = ["today", "hoy", "casa", "work", "amigo", "the", "la", "very", "phone"]
TEXTS = ["hoy great phone scary", "the casa la phone", "muy malo happy amigo"]


def write(folder, name, count, seed):
    """Write made-up posts in which every label depends on one word."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        labels = [label for label in WORDS if draw.random() < 0.4]
        words = [*draw.choices(FILLER, k=draw.randint(2, 6)), *(draw.choice(WORDS[label]) for label in labels)]
        draw.shuffle(words)
        rows.append({"text": " ".join([*words, f"n{seed}{number}"]), "labels": "|".join(labels)})
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["text", "labels"])
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for seed, (name, count) in enumerate({"train.csv": 240, "validation.csv": 60, "test.csv": 60}.items()):
        write(folder, name, count, seed)
    return folder


def recipe(folder, root, backbone, **training):
    given = {"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, **training}
    return Recipe.model_validate(
        {
            "name": "sets",
            "output_dir": str(root),
            "model": {"backbone": str(backbone), "quantization": "none", "precision": "fp32"},
            "adapter": {"r": 4},
            "data": {"task": "multilabel", "path": str(folder), "max_length": 32},
            "training": given,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder, tiny_backbone):
    place, backbone = tmp_path_factory.mktemp("runs"), tiny_backbone("bert-wide")
    return train(recipe(folder, place, backbone, head="probe"), quiet=True)


@pytest.fixture
def classifier(run):
    return tokmask_peft.load(run.folder)


def test_the_scores_are_of_sets_and_the_thresholds_are_saved(run, folder):
    result = run.result
    assert result.labels == ["anger", "fear", "joy"]
    assert result.scored["f1_macro"] > 0.6
    for part in (result.validation, result.test, result.baseline, result.probe):
        assert {"f1_micro", "f1_samples", "accuracy", "given"} <= part.keys()
        assert part["items"] == 60
    assert "label by label" in result.baseline["method"]
    saved = find_saved(run.folder.adapter)
    assert saved.info.task == "multilabel"
    assert dict(saved.info.calibration.model_dump()["thresholds"]) == result.calibration["thresholds"]
    assert [*result.calibration["thresholds"]] == result.labels
    assert "one-label" not in {one["code"] for one in result.warnings}


def test_the_classifier_and_evaluate_repeat_the_scores(run, folder, classifier):
    again = evaluate(run.folder.root)
    assert again["f1_macro"] == pytest.approx(run.result.test["f1_macro"])
    assert again["f1_samples"] == pytest.approx(run.result.test["f1_samples"])
    test = load_corpus(run.recipe.data, run.recipe.seed).test
    answers = classifier.predict([example.string for example in test])
    right = sum(one.labels == example.tags for one, example in zip(answers, test, strict=True))
    assert right / len(test) == pytest.approx(run.result.test["accuracy"])
    assert all(0 <= one.confidence <= 1 for one in answers)
    assert () in {one.labels for one in answers}
    assert "no label" in next(one for one in answers if not one.labels)._repr_html_()


def test_predict_writes_sets_in_every_form(run, tokmask, tmp_path, folder):
    lines = [json.loads(line) for line in tokmask("predict", run.folder.root, *TEXTS, "--json").stdout.splitlines()]
    assert all(set(line) == {"text", "labels", "confidence", "probabilities"} for line in lines)
    for ending in ("csv", "tsv", "jsonl", "parquet", "xlsx"):
        out = tmp_path / f"out.{ending}"
        tokmask("predict", run.folder.root, "--file", folder / "test.csv", "--out", out)
        assert out.stat().st_size
    rows = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8")))
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"].split("|") if row["label"] else [] for row in rows] == [
        record["predicted_labels"] for record in records
    ]
    assert all(float(row["confidence"]) >= 0 for row in rows)  # also of an answer without a label
    assert pq.read_table(tmp_path / "out.parquet")["label"].to_pylist() == [row["label"] for row in rows]


def test_a_row_without_an_answer_differs_from_an_answer_without_a_label(run, tokmask, tmp_path):
    (tmp_path / "in.csv").write_text('text\nthe casa la phone\n""\n', encoding="utf-8")
    tokmask("predict", run.folder.root, "--file", tmp_path / "in.csv", "--out", tmp_path / "o.csv")
    answered, empty = csv.DictReader((tmp_path / "o.csv").open())
    assert (bool(answered["confidence"]), bool(answered["error"])) == (True, False)
    assert (bool(empty["confidence"]), bool(empty["error"])) == (False, True)


def test_an_explanation_is_of_the_likeliest_label_or_of_one_asked_for(run, tokmask, classifier):
    text = "today great la casa scary"
    (found,) = classifier.explain([text])
    (joy,), (fear,) = (classifier.explain([text], label=label) for label in ("joy", "fear"))
    assert found.label in run.result.labels
    assert (joy.label, fear.label) == ("joy", "fear")
    assert joy.probability == pytest.approx(classifier.predict([text])[0].probabilities["joy"], abs=1e-5)
    assert joy.influences != fear.influences
    record = json.loads(tokmask("explain", run.folder.root, TEXTS[0], "--label", "fear", "--json").stdout)
    assert record["label"] == "fear"
    tokmask("explain", run.folder.root, TEXTS[0], "--label", "joyy", code=2)


def test_report_mistakes_and_demo_know_sets(run, tokmask, classifier, tmp_path, monkeypatch):
    found = find_mistakes(run)
    accuracy = run.result.test["accuracy"]
    assert (found.items, found.wrong) == (60, round(60 * (1 - accuracy)))
    assert all(f"not {one.gold}" == one.predicted or f"not {one.predicted}" == one.gold for one in found.shown)
    strange = [Example("a great phone", LabelSet(["joy", "new"]), "x:1")]
    monkeypatch.setattr("tokmask_peft.report.examples.split_examples", lambda *_: (strange, ()))
    assert (found := find_mistakes(run)).wrong == 1
    assert "new" not in {one.gold for one in found.shown}
    monkeypatch.undo()
    tokmask("report", run.folder.root, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "F1 by text" in page
    assert "threshold" in page
    assert "Confusion matrix" not in page
    chances, html = answer(classifier, TEXTS[0])
    assert set(chances) == set(run.result.labels)
    assert "great" in html
    assert of_run(str(run.folder.root))[1]


@pytest.mark.parametrize("merged", [False, True])
def test_the_snippet_of_the_card_gives_the_same_labels_in_plain_peft(run, tokmask, classifier, tmp_path, merged):
    model = run.folder.adapter
    if merged:
        said = tokmask("export", run.folder.root, "--merged", tmp_path / "merged").stdout
        assert "thresholds of the labels" in said
        model = tmp_path / "merged"
    card = Card(run.recipe, run.result, merged=merged).render()
    code = card.split("```python\n")[1].split("```")[0].replace(PLACEHOLDER, str(model))
    assert ('problem_type="multi_label_classification"' in code) is not merged
    code = code.replace('["This phone is bien bonito"]', repr(TEXTS))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    lines = said.getvalue().strip().splitlines()
    found = [*map(ast.literal_eval, lines)] if merged else ast.literal_eval(lines[-1])
    assert [*map(sorted, found)] == [sorted(one.labels) for one in classifier.predict(TEXTS)]
    if merged:
        plain = pipeline("text-classification", model=str(model), top_k=None)(TEXTS)
        assert any(sum(one["score"] for one in row) > 1.05 or sum(one["score"] for one in row) < 0.95 for row in plain)


def test_scores_on_perturbed_texts(run, classifier):
    test = load_corpus(run.recipe.data, run.recipe.seed).test
    found = score_perturbed(classifier, test, {"the"}, Perturbations((0.5,), (0.2,), 1))
    assert found["clean"]["accuracy"] == pytest.approx(run.result.test["accuracy"])
    assert found["words"]["seen"]["items"] + found["words"]["unseen"]["items"] == 60
    strange = Example("a great phone", LabelSet(["joy", "new"]), "x:1")
    assert score_perturbed(classifier, [strange], {"a"}, Perturbations((), (), 1))["clean"]["accuracy"] == 0.0


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_two_views_train_in_packed_rows_and_padded(folder, tiny_backbone, tmp_path, batching):
    short = recipe(
        folder, tmp_path, tiny_backbone("bert-wide"), max_steps=4, views=2, batching=batching, baseline=False
    )
    assert train(short, quiet=True).result.steps == 4


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_with_a_decoder_gives_sets(tokmask, folder, tiny_backbone, tmp_path, family):
    """By the commands, on padded batches: the model's own loss, of one answer, is never asked for."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        to_yaml(recipe(folder, tmp_path, tiny_backbone(family), max_steps=12, baseline=False)), encoding="utf-8"
    )
    tokmask("train", path, "--quiet")
    run = open_run(tmp_path / "sets")
    assert run.result.labels == [*run.result.calibration["thresholds"]] == ["anger", "fear", "joy"]
    again = json.loads(tokmask("evaluate", run.folder.root, "--json").stdout)
    assert again["f1_samples"] == pytest.approx(run.result.test["f1_samples"])
    lines = [json.loads(line) for line in tokmask("predict", run.folder.root, *TEXTS, "--json").stdout.splitlines()]
    code = (run.folder.adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(PLACEHOLDER, str(run.folder.adapter)).replace('["This phone is bien bonito"]', repr(TEXTS))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    stock = ast.literal_eval(said.getvalue().strip().splitlines()[-1])
    assert [sorted(one) for one in stock] == [sorted(line["labels"]) for line in lines]
    assert any(len(line["labels"]) != 1 for line in lines)


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_compares_rates(tokmask, folder, tiny_backbone, tmp_path):
    path = tmp_path / "recipe.yaml"
    short = recipe(folder, tmp_path / "runs", tiny_backbone("bert-wide"), max_steps=2, baseline=False)
    path.write_text(to_yaml(short), encoding="utf-8")
    tokmask("sweep", path, "--p", "0,0.1", "--seeds", "1", "--workers", "2")
    assert open_run(next((tmp_path / "runs").rglob("result.json")).parent).result.task == "multilabel"

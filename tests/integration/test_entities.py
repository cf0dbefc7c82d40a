"""From BIO labels of words to entities: one training, and every command that shows them."""

import json
import random
import shutil

import pytest
from tiny_models import build

from tokmask_peft import Recipe, evaluate, load, train
from tokmask_peft.artifacts import AdapterInfo, find_saved
from tokmask_peft.errors import DataError
from tokmask_peft.report.demo import answer
from tokmask_peft.spans import Entity, read

NAMES = {"PER": ["ana", "juan", "maria lopez", "luis de leon"], "LOC": ["madrid", "new york", "rio"]}
FILLER = ["hoy", "the", "vive", "en", "with", "casa"]


def block(draw):
    rows = []
    for _ in range(draw.randint(2, 4)):
        rows += [(word, "O") for word in draw.choices(FILLER, k=draw.randint(1, 3))]
        kind = draw.choice(["PER", "LOC"])
        rows += [(word, f"{'I' if n else 'B'}-{kind}") for n, word in enumerate(draw.choice(NAMES[kind]).split())]
    return "\n".join(f"{word}\t{label}" for word, label in [*rows, (f"n{draw.random()}", "O")])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("entities"), random.Random(0)
    model, tokenizer = build("bert")
    model.base_model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    (folder / "data").mkdir()
    for split, count in (("train", 80), ("validation", 20), ("test", 20)):
        text = "\n\n".join(block(draw) for _ in range(count))
        (folder / f"data/{split}.conll").write_text(f"{text}\n", encoding="utf-8")
    content = {
        "name": "entities",
        "output_dir": str(folder),
        "model": {"backbone": str(folder / "backbone"), "quantization": "none", "precision": "fp32"},
        "data": {"task": "token", "path": str(folder / "data"), "max_length": 64},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "best_metric": "f1_entities"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content), encoding="utf-8")
    return train(Recipe.load(folder / "recipe.yaml"), quiet=True)


def test_entities_cannot_choose_the_checkpoint_if_the_labels_mark_none(run, tmp_path):
    changes = ["data.spans=auto", 'data.label_map={"O": "O", "*": "x"}', f"output_dir={tmp_path}"]
    recipe = Recipe.load(run.folder.recipe, changes)
    with pytest.raises(DataError) as caught:
        train(recipe, quiet=True)
    assert (caught.value.code, caught.value.fields["field"]) == ("no-entities", "training.best_metric")


def test_entities_are_scored_and_choose_the_checkpoint(run):
    test, baseline = run.result.test, run.result.baseline
    assert test["f1_entities"] == test["entities"]["f1"] > 0.5
    assert test["entities"]["interval"][0] <= test["f1_entities"] <= test["entities"]["interval"][1]
    assert list(test["entities"]["per_type"]) == ["LOC", "PER"]
    assert {"f1_entities", "entities", "gain_entities"} <= baseline.keys()
    best = max((row for row in run.log if "eval_f1_entities" in row), key=lambda row: row["eval_f1_entities"])
    assert (best["step"], best["eval_f1_entities"]) == (
        run.result.best_step,
        pytest.approx(run.result.validation["f1_entities"]),
    )
    (decision,) = [one for one in run.result.decisions if one["what"] == "spans"]
    assert decision["choice"] == "bio"
    assert "data.spans is auto" in decision["reason"]


def test_what_is_scored_is_what_a_user_gets(run):
    assert AdapterInfo.read(run.folder.adapter).loading.spans == "bio"
    assert evaluate(run.folder.root) == run.result.test
    texts = [
        part.split("\n") for part in (run.folder.root.parent / "data/test.conll").read_text().strip().split("\n\n")
    ]
    answers = load(run.folder.root).predict([[row.split("\t")[0] for row in text] for text in texts])
    gold = [{*read(row.split("\t")[1] for row in text)} for text in texts]
    found = [{(one.type, one.first, one.last) for one in answer.entities} for answer in answers]
    right = sum(len(one & two) for one, two in zip(gold, found, strict=True))
    assert 2 * right / sum(map(len, [*gold, *found])) == run.result.test["f1_entities"]
    saved = json.loads(run.folder.predictions.read_text())
    assert saved["spans"] == "bio"
    assert [tuple(saved["labels"][i] for i in ids) for ids in saved["test"]["predicted"]] == [a.labels for a in answers]


def test_a_run_whose_adapter_does_not_say_how_it_was_loaded_is_scored_by_its_recipe(run, tmp_path):
    copy = shutil.copytree(run.folder.root, tmp_path / "copy")
    file = copy / "adapter" / "tokmask.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "loading": None}))
    assert evaluate(copy) == run.result.test
    assert find_saved(copy / "adapter").loading.spans == "none"  # not known without the recipe


def test_predictions_list_entities(run, tokmask, tmp_path):
    classifier, text = load(run.folder.root), "hoy maria lopez vive en new york"
    (found,) = classifier.predict([text])
    assert found.entities
    one = found.entities[0]
    assert one == Entity(one.type, one.first, one.last, " ".join(found.words[one.first : one.last + 1]), one.confidence)
    chances = [row[f"B-{one.type}"] + row[f"I-{one.type}"] for row in found.probabilities]
    assert one.confidence == pytest.approx(min(chances[one.first : one.last + 1]))
    record = json.loads(tokmask("predict", run.folder.root, text, "--json").stdout)
    assert [entity["text"] for entity in record["entities"]] == [entity.text for entity in found.entities]
    assert {*record["entities"][0]} == {"type", "first", "last", "text", "confidence"}
    assert f"# {one.type}\t{one.text}\t{one.confidence:.4f}\n" in tokmask("predict", run.folder.root, text).stdout
    (tmp_path / "in.txt").write_text(f"{text}\n")
    tokmask("predict", run.folder.root, "--file", tmp_path / "in.txt", "--out", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["entities"] == record["entities"]
    for page in (found._repr_html_(), answer(classifier, text)[1]):
        assert f"<bdi>{one.text}</bdi>" in page
        assert ">B-" not in page.split("<table")[0]  # a word has the colour of its type
    (explained,) = classifier.explain([text])
    assert explained.labels == found.labels


def test_a_merged_model_says_that_it_repairs_no_labels(run, tokmask, tmp_path):
    said = " ".join(tokmask("export", run.folder.root, "--merged", tmp_path / "merged").stdout.split())
    assert "may break the rules of bio" in said.lower()


def test_the_report_the_card_and_evaluate_show_each_type(run, tokmask):
    tokmask("report", run.folder.root, "--no-examples")
    page = (run.folder.root / "report.html").read_text(encoding="utf-8")
    card = (run.folder.adapter / "README.md").read_text(encoding="utf-8")
    shown = tokmask("evaluate", run.folder.root).stdout
    score = f"{run.result.test['entities']['per_type']['LOC']['f1']:.4f}"
    assert '<th scope="row">LOC</th>' in page
    assert "| LOC |" in card
    assert "name: F1 of entities" in card
    for text in (page, card, shown):
        assert score in text
        assert f"{run.result.test['entities']['interval'][0]:.4f}" in text

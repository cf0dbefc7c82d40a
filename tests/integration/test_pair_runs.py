"""Pairs of texts: trained once on a small made-up file, then through every command."""

import csv
import importlib.util
import json
import random
import re

import pytest
from tiny_models import build
from transformers import AutoTokenizer, pipeline

import tokmask_peft
from tokmask_peft import Recipe, evaluate, train
from tokmask_peft.artifacts import open_run
from tokmask_peft.errors import DataError
from tokmask_peft.examples import BETWEEN, Example, Pair
from tokmask_peft.hub.card import Card
from tokmask_peft.report.demo import answer, of_run
from tokmask_peft.report.demo import build as build_demo
from tokmask_peft.study.diagnostics.faithfulness import masking_curves
from tokmask_peft.study.diagnostics.gradients import GradientMeter
from tokmask_peft.study.diagnostics.plans import Perturbations
from tokmask_peft.study.diagnostics.robustness import score_perturbed
from tokmask_peft.training.train import observe_training

PLACES, THINGS = ["casa", "playa", "beach", "office"], ["meeting", "fiesta", "phone", "canción"]


def rows(count, seed):
    """Return premise, hypothesis and label: only both together say whether the place is the same."""
    draw = random.Random(seed)
    for number in range(count):
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        same = number % 2 == 0
        other = place if same else draw.choice([one for one in PLACES if one != place])
        yield f"the {thing} {seed}{number} is in la {place}", f"la {other}, {thing}", "yes" if same else "no"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for seed, (split, count) in enumerate({"train": 120, "validation": 40, "test": 40}.items(), start=1):
        lines = ["id\tpremise\thypothesis\tlabel"]
        lines += ["\t".join([str(number), *row]) for number, row in enumerate(rows(count, seed))]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run on BERT, whose token types tell the two texts apart."""
    backbone, root = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("runs")
    model, tokenizer = build("bert")
    model.base_model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    about = backbone / "tokenizer_config.json"
    settings = json.loads(about.read_text()) | {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    about.write_text(json.dumps(settings))
    recipe = {
        "name": "pairs",
        "output_dir": str(root),
        "model": {"backbone": str(backbone), "quantization": "none", "precision": "fp32"},
        "adapter": {"r": 4},
        "data": {"task": "sequence", "path": str(data), "text_column": ["premise", "hypothesis"], "max_length": 40},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "batching": "padding_free"},
        "masking": {"p": 0.1},
    }
    return train(Recipe.model_validate(recipe), quiet=True)


@pytest.fixture(scope="module")
def classifier(run):
    return tokmask_peft.load(run.folder.root)


def test_the_run_knows_its_pairs_and_is_scored_as_it_predicts(run, classifier, data):
    about = json.loads((run.folder.adapter / "tokmask.json").read_text())
    assert about["pair"] == ["premise", "hypothesis"]
    assert AutoTokenizer.from_pretrained(run.folder.adapter)("a", "b")["token_type_ids"][-1] == 1
    texts = [line.split("\t") for line in (data / "test.tsv").read_text().splitlines()[1:]]
    answers = classifier.predict([(first, second) for _, first, second, _ in texts])
    right = sum(answer.label == label for answer, (*_, label) in zip(answers, texts, strict=True))
    assert right / len(texts) == pytest.approx(run.result.test["accuracy"])
    swapped = classifier.predict([(second, first) for _, first, second, _ in texts])
    assert all(one.probabilities != other.probabilities for one, other in zip(answers, swapped, strict=True))
    assert "of each text and of both" in run.result.baseline["method"]
    assert open_run(run.folder.root).recipe.data.pair == ("premise", "hypothesis")
    counted = run.result.data["splits"]["train"]
    assert counted["words"] == 10 * counted["texts"]  # nothing between the texts is counted


def test_the_card_s_snippet_gives_the_same_answer(run, classifier, tmp_path):
    card = (run.folder.adapter / "README.md").read_text()
    assert "premise and hypothesis" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("PATH_OR_HUB_ID", str(run.folder.adapter))
    assert 'tokenizer(["A man' in snippet
    found = {}
    exec(snippet.replace("print(", "shown = ("), found)
    (answer,) = classifier.predict([("A man plays a guitar", "Someone makes music")])
    assert found["shown"] == [answer.label]


@pytest.mark.parametrize(
    ("given", "code"),
    [*(([one], "not-a-pair") for one in ("a b", ("a", "b", "c"), ("a", 1))), ([("a", " ")], "empty-text")],
)
def test_what_is_not_a_pair_is_refused(classifier, given, code):
    with pytest.raises(DataError) as error:
        classifier.predict(given)
    assert (error.value.code, error.value.fields["index"]) == (code, 0)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_keeps_every_column(run, tokmask, classifier, tmp_path, ending):
    lines = ["id\thypothesis\tpremise\tlabel", "1\tla casa, phone\tthe phone is in la casa\tx", "2\t\tthe phone\tx"]
    (source := tmp_path / "some.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokmask("predict", run.folder.root, "--file", source, "--out", out := tmp_path / f"out.{ending}")
    (answer,) = classifier.predict([("the phone is in la casa", "la casa, phone")])
    if ending == "csv":
        found = list(csv.DictReader(out.open(encoding="utf-8")))
        assert list(found[0]) == ["id", "hypothesis", "premise", "label", "predicted_label", "confidence", "error"]
    else:
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert "text" not in found[0]
    assert [row["id"] for row in found] == ["1", "2"]
    assert (found[0]["premise"], found[0]["predicted_label"]) == ("the phone is in la casa", answer.label)
    assert "a text of the pair is empty" in found[1]["error"]


def test_texts_and_columns_on_the_command_line(run, tokmask, data, tmp_path):
    root = run.folder.root
    (other := tmp_path / "other.csv").write_text("a,b,c\nthe phone is in la casa,z,la casa\n", encoding="utf-8")
    direct = tokmask("predict", root, "the phone is in la casa", "la casa", "--json")
    assert json.loads(direct.stdout)["text"] == ["the phone is in la casa", "la casa"]
    named = tokmask("predict", root, "--file", other, "--column", "a", "--column", "c")
    label, _, text = named.stdout.rstrip("\n").split("\t")
    assert (label, text) == (json.loads(direct.stdout)["label"], "the phone is in la casa ‖ la casa")
    for arguments, remedy in {
        ("one", "two", "three"): "two texts for each answer",
        ("--file", other, "--column", "a"): "--column",
        ("--file", other): "no column 'premise'",
        ("--file", other, "--column", "a", "--column", "0"): "both of column 'a'",
        ("-",): "--format",
    }.items():
        refused = tokmask("predict", root, *arguments, code=2, input="a text\n")
        assert remedy in " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused.output + refused.stderr).split())


def test_explain_demo_and_report_show_both_texts(run, tokmask, classifier, data, tmp_path):
    (found,) = classifier.explain([("the phone", "la casa")])
    assert found.words == ("the", "phone", BETWEEN, "la", "casa")
    assert (found.influences[2], found.unmasked) == (0.0, (2,))
    assert all(value != 0 for at, value in enumerate(found.influences) if at != 2)
    done = tokmask("explain", run.folder.root, "the phone", "la casa", "--html", page := tmp_path / "page.html")
    assert f"{BETWEEN}\tcannot be masked" in done.stdout
    assert BETWEEN in page.read_text(encoding="utf-8")
    chances, shown = answer(classifier, Pair("the phone", "la casa"))
    assert chances == classifier.predict([("the phone", "la casa")])[0].probabilities
    assert BETWEEN in shown
    assert "is empty in &#39;hypothesis&#39;" in answer(classifier, Pair("the phone", ""))[1]
    assert all(isinstance(text, Pair) for text in of_run(str(run.folder.root))[1])
    done = tokmask("report", run.folder.root, "--out", page := tmp_path / "report.html")
    assert run.result.scored["accuracy"] == 1 or BETWEEN in page.read_text(encoding="utf-8")
    assert "windows" not in page.read_text(encoding="utf-8")  # pairs are cut


def test_the_demo_has_two_boxes(run, classifier):
    pytest.importorskip("gradio")
    config = build_demo(classifier, "pairs", *of_run(str(run.folder.root))).config
    boxes = [part["props"]["label"] for part in config["components"] if part["type"] == "textbox"]
    assert boxes == ["premise", "hypothesis"]


def test_scored_again_and_on_other_columns(run, tokmask, data, tmp_path):
    assert evaluate(run.folder.root)["accuracy"] == pytest.approx(run.result.test["accuracy"])
    renamed = (data / "test.tsv").read_text(encoding="utf-8").replace("premise\thypothesis", "a\tb", 1)
    (other := tmp_path / "other.tsv").write_text(renamed, encoding="utf-8")
    done = tokmask("evaluate", run.folder.root, "--data", other, "--text-column", "a", "--text-column", "b", "--json")
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(run.result.test["accuracy"])
    refused = tokmask("evaluate", run.folder.root, "--data", other, "--text-column", "a", code=2)
    assert "name two columns" in refused.output
    with pytest.raises(DataError) as error:
        evaluate(run.folder.root, data=str(other), text_column="a")
    assert error.value.code == "pair-columns"


def test_diagnostics_perturb_both_texts(run, classifier, data):
    texts = [Example(Pair(first, second), label, "x") for first, second, label in rows(8, 9)]
    what = Perturbations(rates=(0.5,), noise=(0.0, 1.0), draws=1)
    found = score_perturbed(classifier, texts, {"la"}, what)
    assert found["noise"][0]["f1_macro"] == found["clean"]["f1_macro"]
    assert set(masking_curves(classifier, [example.text for example in texts[:2]])) == {0, 1}


def test_the_merged_model_answers_in_a_pipeline(run, tokmask, classifier, tmp_path):
    onnx = ["--onnx"] if all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))) else []
    tokmask("export", run.folder.root, "--merged", tmp_path / "merged", *onnx)
    if onnx:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "merged" / "model.onnx")
        assert "token_type_ids" in [given.name for given in session.get_inputs()]
    classify = pipeline("text-classification", model=str(tmp_path / "merged"))
    (found,) = classify([{"text": "the phone is in la casa", "text_pair": "la casa, phone"}])
    (every,) = classify([{"text": "the phone is in la casa", "text_pair": "la casa, phone"}], top_k=None)
    (expected,) = classifier.predict([("the phone is in la casa", "la casa, phone")])
    assert (found["label"], every[0]["label"]) == (expected.label, expected.label)
    use = Card(run.recipe, run.result, merged=True).render()
    assert 'classify([{"text": "A man plays a guitar", "text_pair": "Someone makes music"}])' in use


def test_init_finds_the_pair_and_what_reads_it_counts_it_whole(run, tokmask, data, tmp_path):
    backbone = f"model.backbone={run.recipe.model.backbone}"
    tokmask("init", data, "--out", "mine.yaml", "--yes", backbone)
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert (recipe.data.pair, recipe.data.label_column) == (("premise", "hypothesis"), "label")
    checked = tokmask("validate", "mine.yaml", "--data")
    lengths = [len(AutoTokenizer.from_pretrained(run.folder.adapter)(*row[:2])["input_ids"]) for row in rows(120, 1)]
    assert f"the longest has {max(lengths)}" in " ".join(checked.stdout.split())
    estimated = tokmask("estimate", run.folder.recipe, "--json")
    assert json.loads(estimated.stdout)["shapes"]["from_texts"]
    tokmask("init", data, "--out", "other.yaml", "--yes", backbone, "data.text_column=[hypothesis,premise]")
    assert Recipe.load(tmp_path / "other.yaml").data.pair == ("hypothesis", "premise")


def test_gradients_are_those_of_texts_with_token_types(run, tmp_path):
    seen = []

    def observers(trainer, mask):
        meter, collate = (
            GradientMeter(trainer, [[0], [1]], [0.2], 1, run.recipe.masking, mask, 0),
            trainer.train_collator,
        )
        trainer.train_collator = lambda rows: seen.extend(rows) or collate(rows)
        meter.measure()
        raise KeyboardInterrupt  # enough

    with pytest.raises(KeyboardInterrupt):
        observe_training(run.recipe, tmp_path, observers, quiet=True)
    assert [set(row["token_type_ids"]) for row in seen] == [{0, 1}, {0, 1}]

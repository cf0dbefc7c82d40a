"""The main job through the command line: a recipe and text in, an adapter out."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tokmask_peft import Recipe, TokmaskError, evaluate, load, train
from tokmask_peft.artifacts import RunFolder
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.training.evaluate import split_examples

ALONE = """
import contextlib, io, json, sys
sys.modules["tokmask_peft"] = None  # the snippets have to run where this package is not installed
found = []
for snippet in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(snippet, made := {"__name__": "__main__"})
    found.append([said.getvalue().strip(), made["model"](**made["inputs"]).logits.tolist()])
print(json.dumps(found))
"""
SHORT = ("training.max_steps=3", "training.baseline=false")


@pytest.mark.parametrize(("family", "task"), [("bert", "token"), ("qwen2", "sequence")])
def test_recipe_in_adapter_out(write_recipe, tokmask, tmp_path, family, task):
    recipe = write_recipe(family, task)
    said = tokmask("train", recipe).stdout
    run = RunFolder(tmp_path / "runs" / "tiny")
    labels = ["negative", "positive"] if task == "sequence" else ["lang1", "lang2", "other"]

    adapter_files = {path.name for path in run.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= adapter_files
    assert {name for name in adapter_files if name.startswith(("tokmask", "labels", "calib"))} == {"tokmask.json"}
    about = json.loads((run.adapter / "tokmask.json").read_text())
    assert (about["format"], about["task"], about["labels"]) == (2, task, labels)
    assert about["masking"]["p"] == 0.1
    result = json.loads(run.result.read_text())
    assert {"validation", "test", "baseline", "data", "decisions", "speed"} <= set(result)
    assert result["test"]["items"] == result["baseline"]["items"] > 0
    assert sum(map(sum, result["test"]["confusion"]["matrix"])) == result["test"]["items"]
    assert Recipe.load(run.recipe) == Recipe.load(recipe)

    log = [json.loads(line) for line in run.log.read_text().splitlines()]
    assert all({"loss", "learning_rate", "grad_norm", "masking_rate"} <= set(line) for line in log if "loss" in line)
    assert {line["masking_rate"] for line in log if "loss" in line} == {0.1}
    # the saved adapter is that of the best epoch
    best = max(line["eval_f1_macro"] for line in log if "eval_f1_macro" in line)
    assert result["validation"]["f1_macro"] == pytest.approx(best)

    assert "mask token" in said
    assert str(run.adapter.name) in said
    assert f"{result['test']['f1_macro']:.4f}" in said


def test_the_card_s_snippet_answers_as_the_classifier_without_this_package_and_the_run(trained, tmp_path):
    adapters, snippets, text = [], [], "This phone is bien bonito"
    for given in ((), ("bert", "token"), ("qwen2", "token", *SHORT), ("gpt2", "sequence", *SHORT)):
        adapters.append(shutil.copytree(trained(*given).folder.adapter, tmp_path / str(len(adapters))))
        card = (adapters[-1] / "README.md").read_text()
        assert ("spaced = " in card) == ("qwen2" in given), "words must be spaced as the encoder did"
        snippets.append(card.split("```python\n")[1].split("```")[0].replace("PATH_OR_HUB_ID", str(adapters[-1])))
    command = [sys.executable, "-c", ALONE, json.dumps(snippets)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for adapter, (said, logits) in zip(adapters, json.loads(done.stdout.splitlines()[-1]), strict=True):
        classifier = load(adapter)
        (answer,) = classifier.predict([text])
        if classifier.task == "token":
            assert said == str(list(zip(answer.words, answer.labels, strict=True)))
            continue
        assert said == str([answer.label])
        chances = (torch.tensor(logits[0]) / classifier.temperature).softmax(-1)
        assert chances.tolist() == pytest.approx(list(answer.probabilities.values()), abs=1e-5)


def test_evaluate_repeats_the_scores_of_the_run(trained, tokmask, data_folder):
    run = trained("bert", "token")
    for split in ("validation", "test"):
        assert evaluate(run.folder.root, split=split)["confusion"] == getattr(run.result, split)["confusion"]
    options = ("--data", data_folder, "--split", "test", "--json", "--batch-size", 7)
    found = json.loads(tokmask("evaluate", run.folder.root, *options).stdout)
    assert found["confusion"] == run.result.test["confusion"]
    wrong = tokmask("evaluate", run.folder.root, "--split", "dev2", code=2)
    assert "it has train, validation, test" in wrong.stderr


def test_evaluate_holds_the_backbone_as_in_training_and_says_where_it_cannot(write_recipe, monkeypatch):
    run = train(Recipe.load(write_recipe(), ["model.quantization=auto", *SHORT]), quiet=True).folder
    asked = []

    def load(config, *rest):
        asked.append((config.quantization, config.precision))
        return load_backbone(config, *rest)

    monkeypatch.setattr("tokmask_peft.training.evaluate.load_backbone", load)
    shutil.rmtree(run.checkpoints)
    assert "not_as_trained" not in evaluate(run.root)
    assert asked[-1][0] == json.loads((run.adapter / "tokmask.json").read_text())["loading"]["quantization"] != "auto"
    assert not run.checkpoints.exists(), "the run folder may be read-only"

    found = json.loads((run.adapter / "tokmask.json").read_text())
    found["loading"]["quantization"] = "nf4"  # as from a GPU
    (run.adapter / "tokmask.json").write_text(json.dumps(found))
    monkeypatch.setattr("tokmask_peft.model.decisions.bitsandbytes_problem", lambda _: "it is not here")
    (reason,) = evaluate(run.root)["not_as_trained"]
    assert reason == "trained on nf4, but it is not here: results differ slightly"
    assert asked[-1][0] == "none"


def test_a_finished_run_is_never_overwritten(trained, tokmask):
    run = trained().folder
    before = run.result.read_bytes()
    for flags in ([], ["--resume"]):
        assert "finished" in tokmask("train", run.recipe, *flags, code=2).stderr
    assert run.result.read_bytes() == before


def test_a_recipe_written_by_a_run_repeats_it_to_the_bit(trained, tmp_path):
    first = trained()
    torch.manual_seed(1)  # each test starts from the state from which the first was trained, in whatever test
    second = train(Recipe.load(first.folder.recipe, ["name=again", f"output_dir={tmp_path}"]), quiet=True)
    one, two = (load_file(run.folder.adapter / "adapter_model.safetensors") for run in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert first.result.test == second.result.test


def test_the_masking_rate_changes_neither_the_initial_head_nor_the_adapter(write_recipe, tmp_path):
    recipe = write_recipe()
    learned, still = {}, {}
    for p in (0.0, 0.3):
        for rate, found in ((3e-3, learned), (1e-30, still)):
            options = [f"name=p{p}-{rate}", f"masking.p={p}", f"training.learning_rate={rate}"]
            run = train(Recipe.load(recipe, [*options, *SHORT]), quiet=True)
            found[p] = load_file(run.folder.adapter / "adapter_model.safetensors")
            first = json.loads(run.folder.log.read_text().splitlines()[0])
            assert first.get("masking_rate", 0.0) == p
    # not equal to the bit: a step of 1e-30 from zero is a number
    assert all(torch.allclose(still[0.0][name], still[0.3][name], rtol=0, atol=1e-20) for name in still[0.0])
    assert any(not torch.equal(learned[0.0][name], learned[0.3][name]) for name in learned[0.0])


def test_mistakes_end_in_one_message_and_leave_nothing(write_recipe, tokmask, tmp_path):
    recipe = write_recipe()
    mistakes = ["data.path=/no/such/folder", "model.backbone=/no/such/backbone", "data.label_column=colour"]
    mistakes += ["adapter.targets=[querry]", "masking.mask_token=0", "masking.protect=[99999]"]
    for override in [*mistakes, "training.report_to=[foo]"]:
        with pytest.raises(TokmaskError):
            train(Recipe.load(recipe, [override]), quiet=True)
        assert not (tmp_path / "runs" / "tiny").exists(), f"{override} left a run folder behind"
    assert "/no/such/backbone" in tokmask("train", recipe, "model.backbone=/no/such/backbone", code=2).stderr


def test_trained_mask_row_is_saved_and_reloads(write_recipe, tmp_path):
    recipe = Recipe.load(write_recipe("qwen2"), ["masking.trainable_mask=true", "masking.p=0.3", *SHORT])
    run = train(recipe, quiet=True)
    saved = load_file(run.folder.adapter / "adapter_model.safetensors")
    rows = {name: value for name, value in saved.items() if "embed" in name}
    assert [tuple(value.shape) for value in rows.values()] == [(1, 32)]
    backbone = load_backbone(recipe.model, "sequence", ("negative", "positive"), torch.device("cpu"))
    mean = backbone.model.get_input_embeddings().weight[: len(backbone.tokenizer)].mean(0)
    assert not torch.allclose(next(iter(rows.values()))[0], mean, atol=1e-4), "the row was not trained"
    assert evaluate(run.folder.root)["confusion"] == run.result.test["confusion"]


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_long_texts_are_scored_in_the_windows_that_predict_reads(write_recipe, data_folder, task):
    recipe = Recipe.load(write_recipe("bert", task), ["data.max_length=8", *SHORT])
    run = train(recipe, quiet=True)
    result, cut = run.result, run.result.data["truncation"]
    assert cut["train"]["texts_cut"] > 0
    assert (cut["train"]["words_cut"] > 0, "test" in cut) == (True, False)
    assert result.test["without_prediction"] == 0
    examples, labels = split_examples(recipe, "test", None, run.folder.adapter)
    answers = load(run.folder.root).predict([example.text for example in examples])
    assert max(answer.windows for answer in answers) > 1
    found = [answer.labels if task == "token" else [answer.label] for answer in answers]
    saved = json.loads(run.folder.predictions.read_text())["test"]["predicted"]
    assert [[labels[i] for i in row] for row in saved] == [list(row) for row in found]
    assert evaluate(run.folder.root)["confusion"] == result.test["confusion"]
    assert result.calibration["test"]["items"] == result.test["items"]


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_label_that_training_lacks_counts_as_an_error_and_stops_nothing(
    write_recipe, tokmask, data_folder, tmp_path, task
):
    copy = tmp_path / "data"
    shutil.copytree(data_folder, copy)
    for split in ("validation", "test"):
        file = copy / f"{split}.{'tsv' if task == 'sequence' else 'conll'}"
        old = "\tpositive\n" if task == "sequence" else "\tlang2\n"
        file.write_text(file.read_text().replace(old, "\tnew\n", 1))
    said = tokmask("train", write_recipe("bert", task), f"data.path={copy}", "training.epochs=1").stdout
    run = RunFolder(tmp_path / "runs" / "tiny")
    result, log = json.loads(run.result.read_text()), [json.loads(line) for line in run.log.read_text().splitlines()]
    assert said.index("'new': 1 times") < said.index("step 1/"), "the warning comes before training"
    assert "new" not in result["labels"]
    for part in (result["validation"], result["test"], result["baseline"]):
        scores = part["per_class"]
        assert (scores["new"]["support"], scores["new"]["f1"]) == (1, 0.0)
        assert part["f1_macro"] == pytest.approx(sum(row["f1"] for row in scores.values()) / len(scores))
    assert result["calibration"]["test"]["items"] == result["test"]["items"] - 1
    assert all(line["eval_loss"] is not None for line in log if "eval_f1_macro" in line)
    found = evaluate(run.root)
    assert found["confusion"] == result["test"]["confusion"]
    assert "data.label_map" in found["warnings"][0]


def test_other_texts_are_read_as_the_command_says(trained, tokmask, data_folder, tmp_path):
    run = trained("bert", "token")
    rows, number = [], 0
    for line in (data_folder / "test.conll").read_text().splitlines():
        word, _, tag = line.partition("\t")
        number = number + 1 if line else 0
        rows.append("\t".join([str(number), word, "_", tag, *"______"]) if line else "")
    (tmp_path / "other.conllu").write_text("\n".join(rows) + "\n")
    refused = tokmask("evaluate", run.folder.root, "--data", tmp_path / "other.conllu", code=2)
    assert "--label-column" in refused.stderr
    given = ("--format", "conllu", "--label-column", 3, "--json")
    found = json.loads(tokmask("evaluate", run.folder.root, "--data", tmp_path / "other.conllu", *given).stdout)
    assert found["confusion"] == run.result.test["confusion"]
    with pytest.raises(TokmaskError) as caught:
        evaluate(run.folder.root, label_column=3)
    assert caught.value.code == "no-data"


def test_any_labelled_file_is_scored_whatever_its_name_and_ending(trained, tokmask, data_folder, tmp_path):
    run = trained()
    rows = [line.split("\t") for line in (data_folder / "test.tsv").read_text().splitlines()[1:]]
    path = tmp_path / "my posts, final.csv"
    path.write_text("n;mood;tweet\n" + "".join(f"{n};{label};{text}\n" for n, (text, label) in enumerate(rows)))
    done = tokmask("evaluate", run.folder.root, "--data", path, "--text-column", "tweet", "--label-column", "1")
    lines = [line.split() for line in done.stdout.splitlines()]
    scored = run.result.test
    assert ["my", "posts,", "final.csv", *(f"{scored[key]:.4f}" for key in ("f1_macro", "f1_weighted", "accuracy")),
            "40"] in lines  # fmt: skip
    classes = {label: found["support"] for label, found in scored["per_class"].items()}
    assert {line[0]: int(line[-1]) for line in lines if line and line[0] in classes} == classes
    refused = tokmask("evaluate", run.folder.root, "--data", path, code=2)
    assert ("--label-column" in refused.stderr, "data.l" in refused.stderr) == (True, False)


def test_longer_texts_than_the_backbone_has_positions_for_are_refused_before_training(write_recipe, tokmask, tmp_path):
    recipe = write_recipe("xlm-r")
    for command in ("validate", "estimate", "train"):
        assert "set data.max_length=62" in tokmask(command, recipe, "data.max_length=64", code=2).stderr, command
    assert not (tmp_path / "runs").exists()
    tokmask("validate", recipe, "data.max_length=62")

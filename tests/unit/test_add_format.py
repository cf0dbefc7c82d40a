"""A file format of somebody else's: one entry of the table, and training and prediction read it."""

import pytest

from tokmask_peft import Recipe
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.readers import READERS, TextFile
from tokmask_peft.examples import Unreadable


# -- the example of CONTRIBUTING --
def read_fasttext(file, columns):
    """Read fastText's format: `__label__positive what a day` is a line."""
    for number, line in enumerate(file.lines(), start=1):
        where = f"{file.name}:{number}"
        if not columns.labelled:
            yield columns.task.example(line, None, where)
            continue
        label, _, text = line.partition(" ")
        if label.startswith("__label__"):
            yield columns.task.example(text, label.removeprefix("__label__"), where)
        else:
            yield Unreadable(where, "the line does not begin with __label__", "no-label")


# -- end of the example --


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(READERS, ".ft", read_fasttext)


def test_a_recipe_reads_an_added_format(added, tmp_path):
    lines = "".join(f"__label__{'good' if n % 2 else 'bad'} text {n}\n" for n in range(20))
    (tmp_path / "train.ft").write_text(lines)
    (tmp_path / "train.tsv").write_text("of another format, so that data.format decides\n")
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"backbone": "b"},
            "data": {"task": "sequence", "path": str(tmp_path), "format": "ft", "validation": 0.2, "test": None},
        }
    )
    corpus = load_corpus(recipe.data, seed=1)
    assert corpus.labels == ("bad", "good")
    assert (len(corpus.train), len(corpus.validation)) == (16, 4)


def test_predictions_read_it_and_go_on_after_a_bad_line(added, tmp_path):
    (tmp_path / "in.ft").write_text("a text\n\nanother\n")
    found = list(TextFile(tmp_path / "in.ft", "sequence"))
    assert [getattr(one, "text", None) for one in found] == ["a text", None, "another"]

"""The built-in corpus: the same posts for both tasks, and no easier than it says."""

import hashlib
from collections import Counter

import pytest

from tokmask_peft.data.cleaning import normalise
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.hub import builtin_examples
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.data import DataConfig

SPLITS = {"train": 3000, "validation": 500, "test": 1000}


@pytest.fixture(scope="module")
def texts():
    return {split: builtin_examples("sequence", split) for split in SPLITS}


@pytest.fixture(scope="module")
def words():
    return {split: builtin_examples("token", split) for split in SPLITS}


def test_sizes_aliases_and_places(words):
    assert {split: len(found) for split, found in words.items()} == SPLITS
    assert builtin_examples("token", "dev") == words["validation"]
    assert words["test"][7].where == "built-in test[7]"
    with pytest.raises(DataError) as caught:
        builtin_examples("token", "tset")
    assert (caught.value.code, caught.value.fields["split"]) == ("no-split", "tset")


def test_the_posts_never_change(texts, words):
    """Published scores are of exactly these posts; their labels, shares and ambiguous words follow from them."""
    rows = [(e.text, e.label) for found in (texts, words) for split in SPLITS for e in found[split]]
    assert (
        hashlib.sha256(repr(rows).encode()).hexdigest()
        == "802e1f8df4807f6b9009658827a2019645f2d26bfff88e9e49227f69c01c37f8"
    )


def test_no_post_is_there_twice(texts):
    assert max(Counter(normalise(e.text) for found in texts.values() for e in found).values()) == 1


def test_neither_one_word_nor_n_grams_settle_the_sentiment(texts):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    train, test = texts["train"], texts["test"]
    model = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=2), LinearSVC(C=0.2))
    model.fit([e.text for e in train], [e.label for e in train])
    score = f1_score([e.label for e in test], model.predict([e.text for e in test]), average="macro")
    assert 0.5 < score < 0.8


def test_it_loads_as_a_corpus():
    corpus = load_corpus(DataConfig(builtin=True, task="token", max_train=200), seed=1)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (200, 500, 1000)
    assert corpus.labels == ("lang1", "lang2", "ne", "other")
    assert corpus.report.hygiene.removed_from_train == 0

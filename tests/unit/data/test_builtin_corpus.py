"""The built-in corpus: the same posts for both tasks, and no easier than it says."""

import hashlib
from collections import Counter, defaultdict

import pytest

from tokmask_peft.data.cleaning import normalise
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.readers import builtin_examples
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.schema import DataConfig

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
    """Published scores are of exactly these posts."""
    rows = [(e.text, e.label) for found in (texts, words) for split in SPLITS for e in found[split]]
    assert (
        hashlib.sha256(repr(rows).encode()).hexdigest()
        == "802e1f8df4807f6b9009658827a2019645f2d26bfff88e9e49227f69c01c37f8"
    )


def test_both_tasks_show_the_same_posts_and_none_twice(texts, words):
    for split in SPLITS:
        assert [e.text for e in texts[split]] == [" ".join(e.text) for e in words[split]]
        assert all(len(e.text) == len(e.label) and all(e.text) for e in words[split])
    assert max(Counter(normalise(e.text) for found in texts.values() for e in found).values()) == 1


def test_labels_and_their_shares(texts, words):
    for split in SPLITS:
        tags = Counter(tag for e in words[split] for tag in e.label)
        assert set(tags) == {"lang1", "lang2", "other", "ne"}
        assert min(tags["lang1"], tags["lang2"]) / tags.total() > 0.35
        assert tags["ne"] / tags.total() > 0.015
        moods = Counter(e.label for e in texts[split])
        assert set(moods) == {"positive", "negative", "neutral"}
        assert min(moods.values()) / moods.total() > 0.2
    switched = sum({"lang1", "lang2"} <= set(e.label) for e in words["train"])
    assert 0.6 < switched / len(words["train"]) < 0.95


def test_words_that_only_context_can_tag(words):
    seen = defaultdict(Counter)
    for example in (e for found in words.values() for e in found):
        for word, tag in zip(example.text, example.label, strict=True):
            seen[word.lower()][tag] += 1
    both = "no me a he come once pan pie red son van sale sea dice ten tan has real normal final hotel"
    for word in both.split():
        assert {"lang1", "lang2"} <= {tag for tag, count in seen[word].items() if count >= 3}, (word, seen[word])
    assert set(seen["stalkear"]) == {"lang2"}


def test_the_test_split_has_words_that_train_lacks(words):
    train = {word.lower() for e in words["train"] for word in e.text}
    test = [word.lower() for e in words["test"] for word in e.text]
    assert 0.05 < sum(word not in train for word in test) / len(test) < 0.25


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

"""The built-in corpus: repeatable, well formed, and no easier than it says."""

import re
from collections import Counter, defaultdict
from random import Random

import pytest
from tokmask_peft.data.builtin.grammar import Writer
from tokmask_peft.data.builtin.noise import roughen
from tokmask_peft.data.builtin.posts import NAMES, SIZES

from tokmask_peft.data.builtin import builtin_examples
from tokmask_peft.data.builtin import nouns as noun_lists
from tokmask_peft.data.builtin import templates as patterns
from tokmask_peft.data.builtin import words as word_lists
from tokmask_peft.data.cleaning import normalise
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.schema import DataConfig

SPLITS = ("train", "validation", "test")
POOLS = ("SAME", "TURNED", "FLIPPED", "NEUTRAL_WITH_CUES", "PLAIN", "GLAD", "UPSET", "MISHAP")


def test_sizes_and_aliases():
    assert {split: len(builtin_examples("token", split)) for split in SPLITS} == SIZES
    assert builtin_examples("token", "dev") == builtin_examples("token", "validation")
    with pytest.raises(DataError, match=r"no split 'tset'.*Did you mean 'test'"):
        builtin_examples("token", "tset")


def test_the_seed_decides():
    first = builtin_examples("sequence", "train", seed=11)
    assert first == builtin_examples("sequence", "train", seed=11)
    assert first != builtin_examples("sequence", "train", seed=12)


def test_it_does_not_touch_the_global_random_state():
    import random

    state = random.getstate()
    builtin_examples("sequence", "train", seed=13)
    assert random.getstate() == state


def test_both_tasks_show_the_same_posts():
    texts, words = builtin_examples("sequence", "test"), builtin_examples("token", "test")
    assert [e.text for e in texts] == [" ".join(e.text) for e in words]
    assert all(len(e.text) == len(e.label) and all(e.text) for e in words)


@pytest.mark.parametrize("seed", [7, 15])  # 15 writes a post twice, once in two splits, when nobody looks
def test_no_post_twice(seed):
    keys = Counter(normalise(e.text) for split in SPLITS for e in builtin_examples("sequence", split, seed))
    assert max(keys.values()) == 1


def test_labels_and_their_shares():
    for split in SPLITS:
        tags = Counter(tag for e in builtin_examples("token", split) for tag in e.label)
        total = sum(tags.values())
        assert set(tags) == {"lang1", "lang2", "other", "ne"}
        assert tags["lang1"] / total > 0.35
        assert tags["lang2"] / total > 0.35
        assert tags["ne"] / total > 0.015
        moods = Counter(e.label for e in builtin_examples("sequence", split))
        assert set(moods) == set(NAMES.values())
        assert min(moods.values()) / sum(moods.values()) > 0.2


def test_most_posts_switch_language():
    posts = builtin_examples("token", "train")
    switched = sum({"lang1", "lang2"} <= set(e.label) for e in posts)
    assert 0.6 < switched / len(posts) < 0.95


def test_words_that_only_context_can_tag():
    seen = defaultdict(Counter)
    for split in SPLITS:
        for example in builtin_examples("token", split):
            for word, tag in zip(example.text, example.label, strict=True):
                seen[word.lower()][tag] += 1
    for word in [
        "no",
        "me",
        "a",
        "he",
        "come",
        "once",
        "pan",
        "pie",
        "red",
        "son",
        "van",
        "sale",
        "sea",
        "dice",
        "ten",
        "tan",
        "has",
        "real",
        "normal",
        "final",
        "hotel",
    ]:
        tags = {tag for tag, count in seen[word].items() if count >= 3}
        assert {"lang1", "lang2"} <= tags, (word, seen[word])
    assert set(seen["stalkear"]) == {"lang2"}


def test_the_test_split_has_words_and_patterns_that_train_lacks():
    train = {w.lower() for e in builtin_examples("token", "train") for w in e.text}
    unseen = [w for e in builtin_examples("token", "test") for w in e.text if w.lower() not in train]
    words = sum(len(e.text) for e in builtin_examples("token", "test"))
    assert 0.05 < len(unseen) / words < 0.25
    kept = [t for name in POOLS for t in getattr(patterns, name) if t.held_out]
    assert 10 <= len(kept) < sum(len(getattr(patterns, name)) for name in POOLS) / 4


def test_a_writer_without_unseen_entries_never_uses_them():
    writer = Writer(Random(1), unseen=0.0)
    drawn = {writer.pick(range(20)) for _ in range(500)}
    assert drawn == {n for n in range(20) if n % 5 != 4}
    assert not any(writer.template(patterns.SAME).held_out for _ in range(200))
    bold = Writer(Random(1), unseen=0.9)
    assert {4, 9, 14, 19} <= {bold.pick(range(20)) for _ in range(200)}


@pytest.mark.parametrize("pool", POOLS)
def test_every_pattern_can_be_written_in_both_languages(pool):
    for template in getattr(patterns, pool):
        for english, spanish in template.chunks:
            assert ("{n}" in english) == ("{n}" in spanish), english
            own_words = re.sub(r"\{\w+\}|\W", "", english)
            assert english != spanish or not own_words, f"no Spanish side: {english}"
        for language in ("lang1", "lang2"):
            for seed in range(6):
                written, _ = Writer(Random(seed), 0.3).clause(template, 1, language)
                assert written
                assert all(word and "{" not in word and "/" not in word and "|" not in word for word, _ in written)


def test_adjectives_agree():
    feminine = next(n for n in noun_lists.NOUNS["food"] if n.es == "sopa")
    masculine = next(n for n in noun_lists.NOUNS["food"] if n.es == "pan")
    by_name = {a.en: a for a in [*word_lists.ADJECTIVES[1]["*"], *word_lists.ADJECTIVES[1]["place"]]}
    assert (by_name["good"].agree(feminine), by_name["good"].agree(masculine)) == ("buena", "bueno")
    assert (by_name["great"].agree(feminine), by_name["charming"].agree(feminine)) == ("genial", "encantadora")


def test_several_hundred_entries_in_each_language():
    nouns = [n for kind in noun_lists.NOUNS.values() for n in kind]
    adjectives = [a for sign in word_lists.ADJECTIVES.values() for kind in sign.values() for a in kind]
    verbs = [v for kind in word_lists.ACTIONS.values() for v in kind]
    assert len({n.en for n in nouns}) + len({a.en for a in adjectives}) + 3 * len(verbs) > 350
    assert len({n.es for n in nouns}) + len({a.es for a in adjectives}) + 5 * len(verbs) > 400


def test_noise_keeps_the_number_of_words_and_their_tags():
    clause = [
        ("Qué", "lang2"),
        ("niño", "lang2"),
        (",", "other"),
        ("the", "lang1"),
        ("restaurant", "lang1"),
        ("Paz", "ne"),
    ]
    for seed in range(300):
        rough = roughen(clause, Random(seed))
        assert [tag for _, tag in rough] == [tag for _, tag in clause]
        assert all(word for word, _ in rough)
        assert rough[2] == (",", "other")
    spelled = {roughen([("mañanitás", "lang2")], Random(seed))[0][0].lower() for seed in range(50)}
    assert {"mañanitás", "mañanitas"} <= spelled


def test_neither_one_word_nor_n_grams_settle_the_sentiment():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    train, test = (builtin_examples("sequence", split) for split in ("train", "test"))
    model = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=2), LinearSVC(C=0.2))
    model.fit([e.text for e in train], [e.label for e in train])
    score = f1_score([e.label for e in test], model.predict([e.text for e in test]), average="macro")
    assert 0.5 < score < 0.8


def test_it_loads_as_a_corpus():
    corpus = load_corpus(DataConfig(builtin=True, task="token", max_train=200), seed=1)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (200, 500, 1000)
    assert corpus.labels == ("lang1", "lang2", "ne", "other")
    assert corpus.report.hygiene.removed_from_train == 0

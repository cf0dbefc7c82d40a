"""From the data section of a recipe to splits: the order of the steps, and what they refuse."""

import json

import pytest
import yaml

from tokmask_peft.data.corpus import (
    apply_label_map,
    check_known,
    collect_labels,
    count_labels,
    load_corpus,
    merged_labels,
    respelled,
)
from tokmask_peft.data.detect import typos
from tokmask_peft.data.readers import read_split
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example
from tokmask_peft.recipe.data import DataConfig, SourceConfig


@pytest.fixture
def folder(tmp_path):
    def write(name, rows):
        text = "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *rows])
        (tmp_path / name).write_text(text)

    write("train.tsv", [(f"train {n}", "xy"[n % 2]) for n in range(40)] + [("dev 1", "x"), ("test 2", "y")])
    write("dev.tsv", [(f"dev {n}", "xy"[n % 2]) for n in range(6)] + [("test 3", "x")])
    write("test.tsv", [(f"test {n}", "xy"[n % 2]) for n in range(8)])
    return tmp_path


def config(folder, **options):
    return DataConfig(**{"path": str(folder), "task": "sequence", **options})


def test_splits_labels_and_report(folder):
    corpus = load_corpus(config(folder), seed=1)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (40, 6, 8)
    assert corpus.labels == ("x", "y")
    counts = corpus.report.splits["train"]
    assert (counts.read, counts.texts, counts.words, counts.labels) == (42, 40, 80, {"x": 20, "y": 20})
    assert corpus.report.hygiene.removed_from_validation == 1
    assert json.loads(json.dumps(corpus.report.to_dict()))["hygiene"]["train_in_test"] == 1
    lines = "\n".join(corpus.report.lines())
    assert "train: 40 texts, 80 words" in lines
    assert "texts removed: 2 from train, 1 from validation" in lines
    assert "test 2" in lines


def test_reporting_keeps_and_says_so(folder):
    corpus = load_corpus(config(folder, hygiene="report"), seed=1)
    assert (len(corpus.train), len(corpus.validation)) == (42, 7)
    assert any("nothing removed" in line for line in corpus.report.lines())


def test_a_share_is_cut_after_cleaning(folder):
    corpus = load_corpus(config(folder, validation=0.25), seed=1)
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (31, 10, 8)
    assert not {e.text for e in corpus.validation} & {e.text for e in [*corpus.train, *corpus.test]}
    assert "a share of 0.25 of train" in "\n".join(corpus.report.lines())


def test_max_train_comes_last_and_leaves_validation_alone(folder):
    whole = load_corpus(config(folder, validation=0.25), seed=1)
    small = load_corpus(config(folder, validation=0.25, max_train=10), seed=1)
    assert len(small.train) == 10
    assert small.validation == whole.validation
    assert {e.where for e in small.train} <= {e.where for e in whole.train}
    assert small.report.splits["train"].read == 42


def test_without_a_test_there_is_none(folder):
    corpus = load_corpus(config(folder, test=None), seed=1)
    assert corpus.test == []
    assert set(corpus.report.splits) == {"train", "validation"}


def test_one_file_for_selecting_and_scoring_is_refused(folder):
    for validation, test in [("validation", "dev"), ("dev.tsv", "validation"), ("dev", "dev.tsv")]:
        with pytest.raises(DataError, match=r"dev.tsv.*share of train such as 0.1") as caught:
            load_corpus(config(folder, validation=validation, test=test), seed=1)
        assert (caught.value.code, caught.value.fields["splits"]) == ("same-texts", ("validation", "test"))
    with pytest.raises(DataError) as caught:
        load_corpus(config(folder, test="train.tsv"), seed=1)
    assert caught.value.fields["splits"] == ("train", "test")
    with pytest.raises(DataError) as caught:
        load_corpus(DataConfig(builtin=True, task="token", validation="dev", test="val"), seed=1)
    assert caught.value.code == "same-texts"


def test_label_map_effects_and_keys_without_effect(folder):
    corpus = load_corpus(config(folder, label_map={"x": "no", "z": "yes", "*": "yes"}), seed=1)
    assert corpus.labels == ("no", "yes")
    assert corpus.report.label_map["test"] == (("x", "no", 4), ("y", "yes", 4))
    assert corpus.report.to_dict()["label_map"]["test"][0] == {"from": "x", "to": "no", "count": 4}
    assert any("no label 'z'" in warning for warning in corpus.report.warnings)
    assert any(line.startswith("label_map: x -> no (") for line in corpus.report.lines())


def test_conflicts_are_found_after_merging(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\na\ty\nb\tz\nc\tx\nd\tz\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\ne\tx\nf\tz\n")
    apart = load_corpus(config(tmp_path, test=None), seed=1)
    merged = load_corpus(config(tmp_path, test=None, label_map={"y": "x"}), seed=1)
    assert [e.text for e in apart.train] == ["b", "c", "d"]
    assert [e.text for e in merged.train] == ["a", "b", "c", "d"]
    assert (apart.report.hygiene.conflicting, merged.report.hygiene.conflicting) == (1, 0)


def test_a_label_that_train_or_test_lacks_is_a_warning(folder):
    (folder / "test.tsv").write_text("text\tlabel\nq\tw\nr\tx\n")
    corpus = load_corpus(config(folder), seed=1)
    assert (corpus.labels, corpus.all_labels) == (("x", "y"), ("x", "y", "w"))
    assert any("test.tsv:2" in line and "data.label_map" in line for line in corpus.report.lines())
    (folder / "test.tsv").write_text("text\tlabel\nq\tw\nr\tv\n")
    with pytest.raises(DataError) as caught:  # as in a wrong column
        load_corpus(config(folder), seed=1)
    assert (caught.value.code, caught.value.fields) == ("unknown-labels", {"split": "test", "labels": ("v", "w")})
    (folder / "test.tsv").write_text("text\tlabel\nr\tx\n")
    assert any("test has no text with y" in line for line in load_corpus(config(folder), seed=1).report.lines())


def test_other_source_of_the_test_texts(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "dev.jsonl").write_text('{"frase": "hola", "etiqueta": "x"}\n{"frase": "train 3", "etiqueta": "y"}\n')
    columns = {"text_column": "frase", "label_column": "etiqueta"}
    whole = SourceConfig(path=str(other), **columns)
    one = SourceConfig(path=str(other / "dev.jsonl"), **columns)
    for source, test in [(whole, "dev"), (one, "test")]:
        corpus = load_corpus(config(folder, test_source=source, test=test), seed=1)
        assert [e.text for e in corpus.test] == ["hola", "train 3"]
        assert "train 3" not in {e.text for e in corpus.train}
    with pytest.raises(DataError) as caught:
        load_corpus(config(folder, test_source=one, test=None), seed=1)
    assert caught.value.code == "no-test"


def test_a_label_with_an_arrow_is_not_a_merge(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx -> y\nb\tz\nc\tx -> y\nd\tz\n")
    mapped = config(tmp_path, validation=0.5, test=None, label_map={"x -> y": "x -> y"})
    report = load_corpus(mapped, seed=1).report
    assert report.label_map["train"] == (("x -> y", "x -> y", 2),)
    assert not any(line.startswith("label_map") for line in report.lines())


def test_cleaning_that_leaves_nothing_says_so(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\nb\ty\n")
    (tmp_path / "test.tsv").write_text("text\tlabel\nb\ty\na\tx\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\nb\ty\nc\tx\n")
    with pytest.raises(DataError) as caught:
        load_corpus(config(tmp_path), seed=1)
    assert (caught.value.code, caught.value.fields["split"]) == ("nothing-left", "train")
    (tmp_path / "train.tsv").write_text("text\tlabel\nd\tx\ne\ty\n")
    (tmp_path / "dev.tsv").write_text("text\tlabel\nb\ty\n")
    with pytest.raises(DataError) as caught:
        load_corpus(config(tmp_path), seed=1)
    assert (caught.value.code, caught.value.fields["split"]) == ("nothing-left", "validation")


def test_token_corpora(tmp_path):
    posts = [f"# sent_enum = {n}\nhey{n}\tlang1\nvos{n}\tlang2\n#x\tother\n" for n in range(20)]
    (tmp_path / "train.conll").write_text("\n".join(posts))
    corpus = load_corpus(DataConfig(path=str(tmp_path), task="token", validation=0.2, test=None), seed=3)
    assert (len(corpus.train), len(corpus.validation)) == (16, 4)
    assert corpus.report.splits["train"].words == 48
    assert corpus.labels == ("lang1", "lang2", "other")


@pytest.mark.parametrize(
    ("variants", "merged"),
    [
        (("NEGATIVE", "Negative", "negative", "negative", "x"), {"negative", "x"}),
        (("p\u00f3s", "po\u0301s", "p\u00f3s", "x"), {"p\u00f3s", "x"}),
        (("1", "1.0", "0.0", "0", "1"), {"1", "0"}),
        (("very  good", "very good", "Very Good", "very good", "x"), {"very good", "x"}),
    ],
)
def test_labels_that_differ_by_spelling_only_are_a_warning_with_the_map_that_merges_them(tmp_path, variants, merged):
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(f"post {n}\t{variants[n % len(variants)]}\n" for n in range(60)))
    options = {"path": str(path), "task": "sequence", "validation": 0.2, "test": None}
    (warning,) = (w for w in load_corpus(DataConfig(**options), seed=1).report.warnings if "data.label_map=" in w)
    label_map = yaml.safe_load(warning.split("data.label_map=")[1])
    corpus = load_corpus(DataConfig(**options, label_map=label_map), seed=1)
    assert set(corpus.labels) == merged
    assert not corpus.report.warnings


def one_file(tmp_path, labels, **options):
    rows = "".join(f"post {n} {labels[n % len(labels)]}\t{labels[n % len(labels)]}\n" for n in range(60))
    (tmp_path / "train.tsv").write_text(f"text\tlabel\n{rows}")
    return load_corpus(config(tmp_path, **{"validation": 0.2, "test": None, **options}), seed=1)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (("a", "b", "None"), ["None"]),
        (("a", "nan", "b"), ["nan"]),
        (("0", "1", "2", "-1"), ["-1"]),
        (("0", "1", "-100"), ["-100"]),
        (("-1", "1"), []),
        (("-2", "-1", "0", "1", "2"), []),
        (("a", "-1"), []),
    ],
)
def test_labels_that_look_like_a_missing_value_are_a_warning_with_the_key_that_leaves_them_out(tmp_path, labels, found):
    warnings = [line for line in one_file(tmp_path, labels).report.warnings if "data.missing=" in line]
    assert len(warnings) == bool(found)
    assert one_file(tmp_path, labels, missing=()).report.warnings == ()
    for warning in warnings:
        missing = yaml.safe_load(warning.split("set data.missing=")[1].split(" to leave")[0])
        corpus = one_file(tmp_path, labels, missing=missing)
        assert set(corpus.labels) == set(labels) - set(found)
        assert corpus.report.splits["train"].missing == 60 // len(labels)
        assert f"left out as missing: {60 // len(labels)}" in corpus.report.lines()[0]


def test_texts_that_look_like_a_missing_value_are_a_warning_too(tmp_path):
    rows = [(f"la casa {at} azul", "xy"[at % 2]) for at in range(40)] + [("nan", "x"), ("NaN", "y"), ("nan", "y")]
    lines = "".join(f"{text},{label}\n" for text, label in [("text", "label"), *rows])
    (tmp_path / "train.csv").write_text(lines + "la casa 40 azul,\n")
    given = {"validation": 0.25, "test": None}
    (warning,) = load_corpus(config(tmp_path, missing=[""], **given), 1).report.warnings
    assert "'nan' (2), 'NaN' (1)" in warning
    assert 'data.missing=["", "nan", "NaN"]' in warning
    corpus = load_corpus(config(tmp_path, missing=["", "nan", "NaN"], **given), 1)
    assert (corpus.report.splits["train"].missing, corpus.report.warnings) == (4, ())


def test_a_text_is_left_out_if_it_or_one_of_its_tags_is_missing(tmp_path):
    rows = [{"words": ["a", "b"], "tags": ["x", "y"]}] * 2 + [{"words": ["c", "d"], "tags": ["x", None]}]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"task": "token", "validation": "train.jsonl", "hygiene": "report", "test": None}
    with pytest.raises(DataError) as caught:
        read_split(config(tmp_path, **options), "train", "token")
    assert caught.value.code == "empty-label"
    found = read_split(config(tmp_path, **options, missing=[None]), "train", "token")
    assert [example.label for example in found] == [("x", "y"), ("x", "y"), None]
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\n-\ty\nb\ty\n")
    found = read_split(SourceConfig(path=str(tmp_path / "train.tsv"), missing=["-"]), "train", "sequence")
    assert [example.label for example in found] == ["x", None, "y"]


@pytest.mark.parametrize(
    ("task", "row", "code"),
    [
        ("sequence", '{"text": "a", "label": NaN}', "empty-label"),
        ("sequence", '{"text": NaN, "label": "x"}', "empty-text"),
        ("token", '{"words": ["a"], "tags": [NaN]}', "empty-label"),
        ("token", '{"words": ["a"], "tags": NaN}', "empty-label"),
        ("token", '{"words": [NaN], "tags": ["x"]}', "empty-text"),
    ],
)
def test_nan_is_neither_a_class_nor_a_word(tmp_path, task, row, code):
    whole = {"sequence": '{"text": "a", "label": "x"}', "token": '{"words": ["a"], "tags": ["x"]}'}[task]
    (tmp_path / "train.jsonl").write_text(f"{row}\n{whole}\n")
    with pytest.raises(DataError) as caught:
        read_split(SourceConfig(path=str(tmp_path)), "train", task)
    assert caught.value.code == code


def test_as_many_labels_as_texts_are_refused_at_once(tmp_path):
    rows = "".join(f"post {n}\tid{n * 7919}\n" for n in range(200))
    (tmp_path / "train.tsv").write_text(f"text\tlabel\n{rows}")
    (tmp_path / "dev.tsv").write_text(f"text\tlabel\n{rows.replace('id', 'no').replace('post', 'dev')}")
    for options in ({"validation": 0.2}, {}, {"max_train": 100}):
        with pytest.raises(DataError, match=r"data.label_column") as caught:
            load_corpus(config(tmp_path, test=None, **options), seed=1)
        assert (caught.value.code, caught.value.fields["labels"]) == ("too-many-labels", 200)


def test_labels_of_thousands_of_digits_are_labels():
    labels = ["x2", f"x{'9' * 5000}", f"x1{'0' * 5000}"]
    assert list(count_labels(Example("a", label, "") for label in reversed(labels))) == labels


# -- merging, listing and checking labels --


def tagged(*labels):
    return [Example(f"text {n}", label, f"f:{n}") for n, label in enumerate(labels, start=2)]


def test_label_map_with_a_default():
    words = Example(("a", "b", "c", "d"), ("lang1", "ne", "fw", "lang2"), "f:1")
    mapped, merges = apply_label_map([words], {"lang1": "lang1", "lang2": "es", "*": "other"})
    assert mapped[0].label == ("lang1", "other", "other", "es")
    assert merges == (("lang1", "lang1", 1), ("ne", "other", 1), ("fw", "other", 1), ("lang2", "es", 1))


def test_without_a_default_other_labels_stay():
    mapped, merges = apply_label_map(tagged("a", "b", "a"), {"a": "c", "z": "c"})
    assert [e.label for e in mapped] == ["c", "b", "c"]
    assert merges == (("a", "c", 2),)
    assert apply_label_map(tagged("a"), None) == (tagged("a"), ())


@pytest.mark.parametrize(
    "stored",
    [
        {"train": [{"from": "a", "to": "b", "count": 2}, {"from": "b", "to": "b", "count": 9}]},
        {"train": {"a -> b": 2, "b -> b": 9}},  # as version 0.1 stored it
        {"train": (("a", "b", 1),), "test": (("a", "b", 1), ("b", "b", 3))},
    ],
)
def test_merges_in_every_form_that_was_ever_stored(stored):
    assert merged_labels(stored) == [("a", "b", 2)]


def test_labels_are_in_natural_order():
    assert collect_labels(tagged("class10", "class2", "class1")) == ("class1", "class2", "class10")
    assert collect_labels(tagged("1", "-1", "0", "10", "2")) == ("0", "1", "2", "10", "-1")
    assert count_labels(tagged("b", "a", "b")) == {"a": 1, "b": 2}
    assert collect_labels([Example(("x", "y"), ("b", "a"), "f:1")]) == ("a", "b")


def test_one_label_is_too_few():
    with pytest.raises(DataError) as caught:
        collect_labels(tagged("x", "x"))
    assert (caught.value.code, caught.value.fields["labels"]) == ("one-label", ("x",))


def test_labels_that_training_never_saw():
    known = ("negative", "positive")
    (text,) = check_known(tagged("positive", "possitive", "zzz", "possitive"), known, "test")
    assert "'possitive': 2 times, first at f:3. Did you mean 'positive'?" in text
    assert "data.label_map" in text
    assert not check_known(tagged("positive"), known, "test")
    with pytest.raises(DataError) as caught:
        check_known(tagged("possitive"), known, "test")
    assert (caught.value.code, caught.value.fields["labels"]) == ("unknown-labels", ("possitive",))
    (text,) = check_known(tagged("positive", *(f"label{n}" for n in range(300))), known, "test")
    assert text.count("'label") == 10
    assert "and 290 more" in text


def test_the_beginning_of_an_entity_is_never_taken_for_its_inside():
    known = ("B-LOC", "I-LOC", "I-PER", "O")
    (text,) = check_known(tagged("B-PER", "O", "B-MISC", "b-loc"), known, "test")
    assert "Did you mean 'I-PER'" not in text
    assert '"B-PER": ' not in text
    assert 'data.label_map, such as {"b-loc": "B-LOC"}' in text
    (text,) = check_known(tagged("B-PER", "O"), known, "test")
    assert "data.label_map" not in text
    assert respelled({"B-PER": 3, "I-PER": 2, "b-PER": 1}) == {"b-PER": "B-PER"}
    assert typos({"B-PERSON": 300, "I-PERSON": 2, "B-PERSOM": 2}) == {}

"""Several labels for each text, or none: read, split, learned, scored and decided."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss

from tokmask_peft import Recipe
from tokmask_peft.data.corpus import apply_label_map, load_corpus
from tokmask_peft.data.detect import detect
from tokmask_peft.data.readers import TextFile, read_split
from tokmask_peft.data.split import carve, subset
from tokmask_peft.errors import DataError, ModelError, RecipeError
from tokmask_peft.examples import Example, LabelPredictions, LabelSet
from tokmask_peft.recipe.data import DataConfig, SourceConfig
from tokmask_peft.tasks import get_task
from tokmask_peft.training.head import probe
from tokmask_peft.training.losses import ClassificationLoss
from tokmask_peft.training.metrics import Predictions, calibrate, f1_of, task_scores, text_counts, thresholds_of

TASK = get_task("multilabel")
SETS = [("anger", "joy"), (), ("joy",), ("fear",)]
JSONL = "\n".join(json.dumps({"text": f"text {at}", "labels": [*labels]}) for at, labels in enumerate(SETS))
FLAGS = "text,joy,anger,fear\n" + "\n".join(
    f"text {at},{int('joy' in labels)},{'anger' in labels},{float('fear' in labels)}" for at, labels in enumerate(SETS)
)


def table(mark, separator="\t"):
    return f"text{separator}labels\n" + "\n".join(
        f"text {at}{separator}{mark.join(reversed(labels))}" for at, labels in enumerate(SETS)
    )


def read(tmp_path, name, content, **more):
    (tmp_path / name).write_text(content + "\n", encoding="utf-8")
    return read_split(SourceConfig(path=str(tmp_path), **more), name, "multilabel")


def examples(sets):
    return [Example(f"a text {at}", LabelSet(labels), f"f:{at}") for at, labels in enumerate(sets)]


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("a.jsonl", JSONL, {}),
        ("a.tsv", table("|"), {}),
        ("a.tsv", table(" ; "), {}),
        ("a.csv", table(", ", ";"), {"separator": ";"}),
        ("a.tsv", table("/"), {"label_separator": "/"}),
        ("a.tsv", table(" "), {"label_separator": " "}),
        ("a.csv", FLAGS, {"label_column": ["joy", "anger", "fear"]}),
        ("a.tsv", "text\tlabels\n" + "\n".join(f"text {n}\t{list(one)}" for n, one in enumerate(SETS)), {}),
        ("a.txt", "joy|anger text 0\n| text 1\njoy text 2\nfear text 3", {"format": "labelled"}),
        ("a.labelled", "joy;anger text 0\n; text 1\njoy text 2\nfear text 3", {"label_separator": ";"}),
        (
            "a.conll",
            "\n\n".join(f"# label = {mark}\ntext\n{at}" for at, mark in enumerate(("joy;anger", ";", "joy", "fear"))),
            {"label_separator": ";"},
        ),
    ],
)
def test_labels_are_read_as_sets_from_every_form(tmp_path, name, content, keys):
    found = read(tmp_path, name, content, **keys)
    assert [example.tags for example in found] == SETS
    assert [example.string for example in found] == [f"text {at}" for at in range(4)]


@pytest.mark.parametrize(
    ("content", "keys", "code"),
    [
        ("text\tlabels\na b\tjoy|anger\nc d\tjoy, anger", {}, "label-separator"),
        ("text\tjoy\tanger\na b\t1\tmaybe", {"label_column": ("joy", "anger")}, "label-flag"),
        ("text\tjoy\tanger\na b\t1\t", {"label_column": ("joy", "anger")}, "label-flag"),
        ("text\tjoy\tanger\na b\t1\t0\nc d\t\t", {"label_column": ("joy", "anger")}, "empty-label"),
        ("text\tlabels\na b\t\nc d\t", {}, "no-labels"),
        ("text\tlabels\na b\t[0, 1, 0]\nc d\t[1, 0, 0]", {}, "label-repeated"),
        ("text\tlabels\na b\t0|1|0\nc d\t1|0|0", {}, "label-repeated"),
        ("text\tlabels\n" + "a b\tjoy\n" * 1200 + "c d\tjoy;fear", {}, "label-separator"),
        ("text\tlabels\na b\tjoy;fear\n" + "a b\tjoy\n" * 1200 + "c d\tjoy|fear", {}, "label-separator"),
        ("text\tlabels\na b\t{'joy', 'fear'}\nc d\t{'joy', 'anger'}", {}, "label-brackets"),
        ("text\tlabels\na b\t{joy (mild), fear}\nc d\t{joy, anger}", {"label_separator": ","}, "label-brackets"),
        ("text\tlabels\na b\t{'joy'}\nc d\t{'fear'}", {}, "label-brackets"),
        ("text\tlabels\na b\t('joy', 'fear')\nc d\t('joy',)", {}, "label-brackets"),
        ("joy;fear a b\njoy c d", {"format": "labelled"}, "label-separator"),
        ("# label = joy,fear\na\nb\n\n# label = joy\nc", {"format": "conll"}, "label-separator"),
        ("a b\t1\t0\nc d\t0\t1", {"text_column": 0, "label_column": ("1", "2")}, "column"),
    ],
)
def test_what_is_not_clear_is_refused_with_a_code(tmp_path, content, keys, code):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.tsv", content, **keys)
    assert caught.value.code == code


def test_an_empty_list_is_an_answer_and_null_is_a_missing_label(tmp_path):
    lines = [{"text": "a", "labels": ["joy"]}, {"text": "b", "labels": []}, {"text": "c", "labels": None}]
    content = "\n".join(map(json.dumps, lines))
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.jsonl", content)
    assert (caught.value.code, len(caught.value.fields["places"])) == ("empty-label", 1)
    assert caught.value.fields["places"][0].endswith("a.jsonl:3")
    found = read(tmp_path, "a.jsonl", content, missing=[""])
    assert [example.label for example in found] == [("joy",), (), None]
    assert [example.label for example in read(tmp_path, "a.tsv", table("|"), missing=["fear"])][3] is None
    for item in ("null", "NaN"):
        with pytest.raises(DataError) as caught:
            read(tmp_path, "a.jsonl", f'{{"text": "a", "labels": ["joy", {item}]}}')
        assert caught.value.code == "label-missing"


def test_a_list_of_label_columns_needs_a_task_with_several_labels(tmp_path):
    (tmp_path / "a.csv").write_text(FLAGS)
    with pytest.raises(DataError) as caught:
        read_split(SourceConfig(path=str(tmp_path), label_column=("joy", "anger")), "a.csv", "sequence")
    assert (caught.value.code, caught.value.fields["field"]) == ("column", "label_column")
    assert [one.string for one in TextFile(tmp_path / "a.csv", "multilabel")] == [f"text {at}" for at in range(4)]


def test_a_label_map_joins_and_drops_labels():
    (both, none, joy, empty), _ = apply_label_map(
        examples([("anger", "fear"), ("neutral",), ("joy",), ()]), {"anger": "bad", "fear": "bad", "neutral": ""}
    )
    assert (both.label, none.label, joy.label, empty.given) == (("bad",), (), ("joy",), ())
    assert isinstance(both.label, LabelSet)
    assert repr(both.label) == "('bad',)"  # the fingerprint of the data depends on it


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=12, max_size=40), st.integers(0, 5))
def test_splits_keep_every_label_and_every_text(sets, seed):
    texts = examples([*sets, *[tuple("abcd")] * 2])
    every = {tag for example in texts for tag in example.tags}
    rest, aside = carve(texts, 0.2, seed)
    assert sorted(one.where for one in [*rest, *aside]) == sorted(one.where for one in texts)
    assert {tag for example in rest for tag in example.tags} == every
    assert {tag for example in subset(texts, 8, seed) for tag in example.tags} == every


def test_the_same_text_with_other_labels_is_a_conflict_in_any_order_a_repeat(tmp_path):
    rows = ["text\tlabels", "a b\tjoy|anger", "a b\tanger|joy", "c d\tjoy", "c d\t", "e f\tanger", "g h\t"]
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "dev.tsv").write_text("text\tlabels\nx y\tjoy\n")
    corpus = load_corpus(DataConfig(path=str(tmp_path), task="multilabel", test=None), 0)
    assert [(one.string, one.tags) for one in corpus.train] == [
        ("a b", ("anger", "joy")),
        ("e f", ("anger",)),
        ("g h", ()),
    ]
    assert (corpus.report.hygiene.conflicting, corpus.report.hygiene.duplicates) == (1, 2)


# -- loss --


def test_the_loss_is_the_mean_of_binary_cross_entropies_and_weights_move_no_probability():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, requires_grad=True), (torch.rand(5, 4) > 0.5).float()
    out = SimpleNamespace(logits=logits)
    expected = F.binary_cross_entropy_with_logits(logits, labels[:, :3])
    torch.testing.assert_close(ClassificationLoss()(out, labels), expected)
    torch.testing.assert_close(ClassificationLoss()(out, labels, torch.tensor(40)), expected / 2)
    weighted = ClassificationLoss([0.5, 1.0, 1.5])(out, labels)
    each = F.binary_cross_entropy_with_logits(logits, labels[:, :3], reduction="none").mean(0)
    torch.testing.assert_close(weighted, (each * torch.tensor([0.5, 1.0, 1.5])).mean())
    p = torch.where(labels[:, :3] > 0, logits.sigmoid(), 1 - logits.sigmoid())
    torch.testing.assert_close(ClassificationLoss(gamma=2.0)(out, labels), ((1 - p) ** 2 * -p.log()).mean())
    smooth = labels[:, :3] * 0.9 + 0.05
    expected = F.binary_cross_entropy_with_logits(logits, smooth)
    torch.testing.assert_close(ClassificationLoss(smoothing=0.1)(out, labels), expected)


def test_consistency_is_the_symmetric_divergence_of_both_answers_to_each_label():
    torch.manual_seed(1)
    loss, logits, labels = ClassificationLoss(), torch.randn(4, 3), torch.ones(4, 3)
    plain = loss(SimpleNamespace(logits=logits), labels)
    loss.consistency = 0.7
    pairs = [torch.stack([1 - z.sigmoid(), z.sigmoid()], -1) for z in logits.chunk(2)]
    divergence = sum(F.kl_div(a.log(), b, reduction="none").sum(-1) for a, b in (pairs, pairs[::-1])) / 2
    torch.testing.assert_close(loss(SimpleNamespace(logits=logits), labels) - plain, 0.7 * divergence.mean())


# -- scores and decisions --


def predictions(gold, given):
    """Return arrays [texts, labels] as `Predictions`."""
    return Predictions(*([TASK.ids_of(row[None].astype(float)) for row in part] for part in (gold, given)))


def test_scores_are_those_of_scikit_learn_and_of_counts():
    random = np.random.default_rng(0)
    gold, given = random.random((60, 4)) > 0.6, random.random((60, 4)) > 0.5
    gold[0], given[0], given[:, 3], gold[:, 3] = False, False, False, False
    found = task_scores(TASK, predictions(gold, given), ["a", "b", "c", "d"])
    assert found["f1_macro"] == pytest.approx(f1_score(gold[:, :3], given[:, :3], average="macro"))  # d does not occur
    assert found["f1_weighted"] == pytest.approx(f1_score(gold, given, average="weighted", zero_division=0))
    assert found["f1_micro"] == pytest.approx(f1_score(gold, given, average="micro"))
    assert found["f1_samples"] == pytest.approx(f1_score(gold, given, average="samples", zero_division=1))
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, given))
    assert (found["items"], found["without_label"]) == (60, int((~gold.any(1)).sum()))
    assert TASK.counts_given(found) == dict(zip("abcd", given.sum(0).tolist(), strict=True))
    both = f1_of(text_counts(**predictions(gold, given).to_dict(), classes=4).sum(1))
    assert both["f1_macro"] == pytest.approx(found["f1_macro"])
    assert both["f1_weighted"] == pytest.approx(found["f1_weighted"])
    assert task_scores(TASK, Predictions([], []), ["a", "b"])["f1_samples"] == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_cut_gives_the_best_f1_and_too_few_texts_keep_a_half(seed):
    random = np.random.default_rng(seed)
    logits = np.round(random.normal(size=(40, 2)), 1)
    gold = random.random((40, 2)) < [0.45, 0.05]
    cuts = TASK.fit_cuts(logits, TASK.ids_of(gold.astype(float)))
    for label, cut in enumerate(cuts):
        if not 10 <= gold[:, label].sum() <= 30:
            assert cut == 0.0
            continue
        yes, ranked = gold[:, label], logits[:, label]

        def f1(at, yes=yes, ranked=ranked):
            return 2 * (yes & (ranked > at)).sum() / (yes.sum() + (ranked > at).sum())

        assert f1(cut) >= max(map(f1, [*ranked, 0])) - 1e-12
        assert cut not in logits[:, label] or cut == 0.0


def test_thresholds_are_saved_as_calibrated_probabilities_and_decide_alike():
    random = np.random.default_rng(3)
    logits, cuts, labels = random.normal(size=(50, 3)) * 3, [0.4, -1.0, 0.0], ["a", "b", "c"]
    saved = {"temperature": 1.7, "thresholds": thresholds_of(cuts, labels, 1.7)}
    assert TASK.cuts_of(labels, saved) == pytest.approx(cuts)
    above = TASK.probabilities(logits, 1.7) > [*saved["thresholds"].values()]
    assert (TASK.choose(logits, cuts).reshape(50, 3) >= 0).tolist() == above.tolist()
    assert TASK.choose(logits, cuts, 5).reshape(50, 5)[:, 3:].tolist() == [[-1, -1]] * 50
    sure = thresholds_of([-60.0, 60.0], ["a", "b"], 1.0)
    assert np.sign(TASK.cuts_of(["a", "b"], {"thresholds": sure})).tolist() == [-1, 1]
    assert TASK.use("THRESHOLDS", ["a"], {"thresholds": {"a": 1.23456789e-5}}) == "[1.23457e-05]"
    for bad in ({"a": 1.0}, {"a": "x"}, [0.5], {"A": 0.4}):
        with pytest.raises(ModelError) as caught:
            TASK.cuts_of(labels, {"thresholds": bad})
        assert caught.value.code == "bad-adapter-file"


def test_the_temperature_is_that_of_the_yes_and_no_decisions():
    random = np.random.default_rng(5)
    true = random.normal(size=(400, 3))
    gold = (random.random((400, 3)) < 1 / (1 + np.exp(-true))).astype(float)
    logits = 3.0 * true  # three times too sure
    report = calibrate({"validation": TASK.calibrated(logits, TASK.ids_of(gold))})
    assert report["temperature"] == pytest.approx(3.0, rel=0.15)
    chances = TASK.probabilities(logits, report["temperature"])
    assert report["validation"]["after"]["nll"] == pytest.approx(log_loss(gold.ravel(), chances.ravel()), abs=1e-6)


def test_the_probe_fits_each_label_and_leaves_out_what_all_or_no_texts_have():
    random = np.random.default_rng(7)
    features = random.normal(size=(200, 6))
    gold = np.stack([features[:, 0] > 0, features[:, 1] > 1, np.zeros(200, bool)], -1).astype(float)
    weight, bias = probe(features, gold, 1.0, 3, True)
    given = features @ weight.T + bias > 0
    assert (given == (gold > 0)).mean(0).min() > 0.95


def test_mistakes_are_named_apart_from_labels_and_include_those_that_training_lacks():
    answer = LabelPredictions(("joy",), {"hate": 0.2, "joy": 0.9, "not hate": 0.1})
    found = [mistake[:2] for mistake in TASK.mistakes(("hate", "new"), answer)]
    assert found == [("hate", "not “hate”"), ("not joy", "joy"), ("new", "not new")]


def test_schedules_that_count_right_answers_are_refused():
    given = {"name": "x", "model": {"backbone": "b"}, "data": {"task": "multilabel", "builtin": True}}
    Recipe.model_validate(given | {"masking": {"schedule": "linear"}})
    with pytest.raises((RecipeError, ValueError), match="linear"):
        Recipe.model_validate(given | {"masking": {"schedule": "gap", "share": 0.5}})


# -- init --

EMOTIONS = [("joy",), ("anger", "fear"), (), ("joy", "fear"), ("anger",)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (lambda labels: {"labels": [*labels]}, {"label_column": "labels"}),
        (lambda labels: {"labels": "; ".join(labels)}, {"label_column": "labels", "label_separator": ";"}),
        (
            lambda labels: {one: int(one in labels) for one in ("joy", "anger", "fear")},
            {"label_column": ["joy", "anger", "fear"]},
        ),
        (lambda labels: {"label": labels[0] if labels else "none", "likes": len(labels) % 2}, {"task": "sequence"}),
        (lambda labels: {"label": len(labels) % 2, "a": 0, "b": 1, "c": len(labels) % 2}, {"task": "sequence"}),
    ],
)
def test_init_finds_several_labels_per_text(tmp_path, row, expected):
    texts = [f"we saw {word} number {at} in the old house" for at, word in enumerate(["cats", "dogs", "birds"] * 10)]
    lines = [{"text": text, **row(EMOTIONS[at % 5])} for at, text in enumerate(texts)]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found, corpus = detect([tmp_path / "posts.jsonl"], {})
    assert found.data.items() >= ({"task": "multilabel"} | expected).items()
    assert corpus.task == found.data["task"]


@pytest.mark.parametrize("form", [list, str, lambda places: "|".join(map(str, places))])
def test_init_takes_places_for_no_labels(tmp_path, form):
    lines = [{"text": f"we saw the old house number {n}", "labels": form([n % 2, n % 3 % 2, 0])} for n in range(30)]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(DataError) as caught:
        detect([tmp_path / "posts.jsonl"], {"task": "multilabel"})
    assert caught.value.code in ("no-labels", "label-repeated")

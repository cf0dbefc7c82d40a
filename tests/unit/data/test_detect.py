"""Files that nobody described: the keys that read each kind in which corpora of this field come."""

import contextlib
import gzip
import json
import re
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokmask_peft.data.columns import Findings
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.detect import detect, find_form, find_splits, looks_english, scripts, typos
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.data import DataConfig

WORDS = "casa phone hoy really bueno work amigo very malo sad luz river papa green voy went".split()  # noqa: SIM905
TEXTS = [" ".join(WORDS[(at * step) % 16] for step in range(1, 4 + at % 5)) + f" n{at}" for at in range(40)]
MOODS = [("pos", "neg")[at % 2] for at in range(40)]
PAIRS = list(zip(TEXTS, MOODS, strict=True))
TAGS = [["es" if word in WORDS[::2] else "en" for word in text.split()] for text in TEXTS]
TAGGED = [(text.split(), tags) for text, tags in zip(TEXTS, TAGS, strict=True)]


def rows(separator, header="", quote=""):
    lines = [header] if header else []
    lines += [f"{quote}{text}{quote}{separator}{label}" for text, label in PAIRS]
    return "\n".join(lines) + "\n"


def blocks(line, before="", end="\n"):
    """Return a word a line; `line` and `before` are formats with {text}, {word} and {tag}."""
    texts = []
    for at, (words, tags) in enumerate(TAGGED):
        pairs = enumerate(zip(words, tags, strict=True), 1)
        body = "".join(line.format(at=at, word=word, tag=tag, n=n) + "\n" for n, (word, tag) in pairs)
        texts.append(before.format(at=at, mood=MOODS[at]) + body)
    return end.join(texts)


def listed(shape):
    pairs = [(shape(words), shape(tags)) for words, tags in TAGGED]
    return "words,lid\n" + "".join(f'"{words}","{tags}"\n' for words, tags in pairs)


SEQUENCE, TOKEN = {"task": "sequence"}, {"task": "token"}
NAMED = {"text_column": "text", "label_column": "label"}
KINDS = {
    "usual names": ("a.tsv", rows("\t", "text\tlabel"), SEQUENCE | NAMED),
    "own names": (
        "a.tsv", "id\tSentence\tcategory\n" + "".join(f"{at}\t{t}\t{m} \n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "Sentence", "label_column": "category"},
    ),
    "semicolons": ("a.csv", rows(";", "tweet;sentiment").replace("hoy", "1,5"), SEQUENCE | {"text_column": "tweet"}),
    "bars without an ending": ("a", rows("|", "text|label"), SEQUENCE | NAMED | {"format": "csv"}),
    "tabs in a txt": ("a.txt", rows("\t", "text\tlabel"), SEQUENCE | NAMED | {"format": "tsv"}),
    "no header, more columns": (
        "a.tsv", "".join(f"src{at % 9:02}\t{at % 2}\t{'*' * (at % 2)}\t{t}.\n" for at, t in enumerate(TEXTS)),
        SEQUENCE | {"header": False, "text_column": 3, "label_column": 1},
    ),
    "conll as tsv": ("a.tsv", blocks("{word}\t{tag}"), TOKEN | {"format": "conll", "label_column": 1}),
    "conll with blanks in a txt": ("a.txt", blocks("{word} {tag}"), TOKEN | {"format": "conll", "label_column": 1}),
    "conll without an ending": ("a", blocks("{word}\t{tag}"), TOKEN | {"format": "conll", "label_column": 1}),
    "names above the columns": ("a.conll", "Token\tTag\n" + blocks("{word}\t{tag}"), TOKEN | {"label_column": 1}),
    "labels of texts in meta lines": ("a.conll", blocks("{word}\t{tag}", "meta\t{at}\t{mood}\n"), SEQUENCE),
    "several columns": ("a.conll", blocks("{word}\t{tag}\tX{n}"), TOKEN | {"label_column": 2}),
    "conllu": (
        "a.conllu", blocks("{n}\t{word}\t_\tNOUN\t_\t_\t0\troot\t_\tAdpType=Prep|Lang={tag}", "# sent_id = {at}\n"),
        TOKEN | {"label_column": "misc.Lang"},
    ),
    "a row a word with ids": (
        "a.csv", "sent,word,tag\n" + blocks("{at},{word},{tag}", end=""),
        TOKEN | {"text_column": "word", "label_column": "tag", "group_column": "sent"},
    ),
    "a row a word, EOS": ("a.csv", blocks("{word},{tag}", end="<EOS>,<EOS>\n"), TOKEN | {"header": False}),
    "a row a word, blank rows": ("a.csv", "word,tag\n" + blocks("{word},{tag}"), TOKEN | {"label_column": "tag"}),
    "the text's start at its first word": (
        "a.csv",
        "".join(
            ("" if n else f'"T: {at}"') + f",{word},{tag}\n"
            for at, (words, tags) in enumerate(TAGGED)
            for n, (word, tag) in enumerate(zip(words, tags, strict=True))
        ),
        TOKEN | {"text_column": 1, "label_column": 2, "group_column": 0},
    ),
    "json lists in cells": (
        "a.csv", listed(lambda row: json.dumps(row).replace('"', '""')), TOKEN | {"label_column": "lid"}
    ),
    "a column without a name": (
        "a.csv", ",post,tone\n" + "".join(f"{at},{t},{m}\n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "post", "label_column": "tone", "header": None},
    ),
    "columns that pandas counted": (
        "a.csv", ",0,1\n" + "".join(f"{at},{t},{m}\n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "0", "label_column": "1", "header": None},
    ),
    "Excel's line on the separator": (
        "a.csv", "sep=;\nBeitrag;Urteil;n\n" + "".join(f"{t};{m};{at}\n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "Beitrag", "label_column": "Urteil", "separator": ";"},
    ),
    "the same without a header": ("a.csv", "sep=;\n" + rows(";"), SEQUENCE | {"header": False, "text_column": 0}),
    "python lists in cells": ("a.csv", listed(repr), TOKEN | {"text_column": "words"}),
    "numpy lists in cells": ("a.csv", listed(lambda row: repr(row).replace(",", "")), TOKEN | {"label_column": "lid"}),
    "numbers as labels": ("a.tsv", rows("\t", "text\tlabel").replace("pos", "1.0").replace("neg", "0"), SEQUENCE),
    "json lines": (
        "a.jsonl", "".join(json.dumps({"id": at, "tweet": t, "class": m}) + "\n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "tweet", "label_column": "class"},
    ),
    "tags behind a slash": (
        "a.txt", "".join(" ".join(f"{w}/{t}" for w, t in zip(*pair, strict=True)) + "\n" for pair in TAGGED),
        TOKEN | {"format": "tagged", "separator": "/"},
    ),
    "tags behind an underscore": (
        "a", "".join(" ".join(f"{w}_{t}" for w, t in zip(*pair, strict=True)) + "\n" for pair in TAGGED),
        TOKEN | {"format": "tagged", "separator": "_"},
    ),
    "labels before texts": (
        "a.txt", "".join(f"{mood} {text}\n" for text, mood in PAIRS), SEQUENCE | {"format": "labelled"}
    ),
    "words as strings": (
        "a.csv", "text,langs\n" + "".join(f"{' '.join(words)},{' '.join(tags)}\n" for words, tags in TAGGED),
        TOKEN | {"text_column": "text", "label_column": "langs"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_with_the_keys_that_are_found(tmp_path, kind):
    name, content, expected = KINDS[kind]
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    found, corpus = detect([file], {})
    assert {"header": None, **found.data}.items() >= (expected | {"path": str(file), "test": None}).items()
    assert len(corpus.train) + len(corpus.validation) == 40
    assert len(corpus.labels) == (8 if kind == "several columns" else 2)
    assert {example.string for example in corpus.train} <= {*TEXTS, *(f"{text}." for text in TEXTS)} or "1,5" in content
    assert load_corpus(DataConfig(**found.data), 42).fingerprint() == corpus.fingerprint()


def test_packed_and_in_windows_1252(tmp_path):
    content = rows(",", "tweet,category").replace("casa", "señor").encode("cp1252")
    (file := tmp_path / "a.csv.gz").write_bytes(gzip.compress(content))
    found, corpus = detect([file], {})
    assert found.data["text_column"] == "tweet"
    assert any("señor" in example.words for example in corpus.train)


def test_a_workbook(tmp_path):
    book = pytest.importorskip("openpyxl").Workbook()
    for row in [("id", "Tweet", "Class"), *((at, *pair) for at, pair in enumerate(PAIRS))]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "b.xlsx.zip", "w") as archive:
        archive.write(tmp_path / "a.xlsx", "a.xlsx")
    for name in ("a.xlsx", "b.xlsx.zip"):
        find_form(tmp_path / name, found := Findings({}))
        assert found.data.items() >= {"text_column": "Tweet", "label_column": "Class"}.items()


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (b"", "no-texts"),
            (b"\n\n", "no-texts"),
            (b"\x89PNG\r\n\x1a\n" + bytes(100) + bytes(range(255, 0, -1)), "not-text"),
            ("\n".join(TEXTS).encode(), "no-labels"),
            (("text,id\n" + "".join(f"{text},{at}\n" for at, text in enumerate(TEXTS))).encode(), "no-labels"),
            (("text,label\n" + "".join(f"{text},pos\n" for text in TEXTS)).encode(), "one-label"),
            (("text,mine\n" + "".join(f"{text},pos\n" for text in TEXTS)).encode(), "no-labels"),
            (("a,b\n" + "".join(f"{at},{at % 3}\n" for at in range(40))).encode(), "column"),
            (b"text,label\n", "no-texts"),
        ],
    )
    @pytest.mark.parametrize("ending", ["csv", "txt"])
    def test_it_is_said_with_a_code(self, tmp_path, content, code, ending):
        (tmp_path / f"a.{ending}").write_bytes(content)
        with pytest.raises(DataError) as caught:
            detect([tmp_path / f"a.{ending}"], {})
        assert caught.value.code == (code if content[:4] != b"casa" or ending == "txt" else "column")


class TestSplits:
    def found(self, folder, *names, given=None):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(rows("\t", "text\tlabel"))
        return find_splits([folder / name for name in given] if given else [folder], Findings({}))

    @pytest.mark.parametrize(
        ("names", "given", "expected"),
        [
            (["train.tsv", "dev.tsv", "test.tsv"], None, ["train.tsv", "dev.tsv", "test.tsv"]),
            (["my-train_v2.tsv", "my-dev_v2.tsv", "README.txt"], None, ["my-train_v2.tsv", "my-dev_v2.tsv"]),
            (["train.tsv", "test.tsv", "other.tsv"], ["train.tsv"], ["train.tsv", "test.tsv"]),
            (["posts.tsv", "test.tsv"], ["posts.tsv"], ["posts.tsv"]),
            (["posts.tsv", "held_test.tsv"], ["posts.tsv", "held_test.tsv"], ["posts.tsv", "held_test.tsv"]),
            (["posts.tsv", "notes.md"], None, ["posts.tsv"]),
            (["test.tsv"], ["test.tsv"], ["test.tsv"]),
            (["test.tsv"], None, ["test.tsv"]),
            (["dev.tsv", "test.tsv"], ["dev.tsv"], ["dev.tsv"]),
            (["train.dat"], ["train.dat"], ["train.dat"]),
            (["train.dat", "test.dat", "test.csv"], ["train.dat"], ["train.dat", "test.dat"]),
            (["a/train.tsv", "b/test.tsv"], ["a/train.tsv", "b/test.tsv"], ["a/train.tsv", "b/test.tsv"]),
        ],
    )
    def test_by_the_names_of_the_files(self, tmp_path, names, given, expected):
        found = self.found(tmp_path, *names, given=given)
        assert [str(path.relative_to(tmp_path)) for path in found.values()] == expected
        assert next(iter(found)) == "train"

    @pytest.mark.parametrize(
        ("names", "code"), [(["one.tsv", "two.tsv"], "no-train"), (["notes.md"], "no-data-file"), ([], "no-data-file")]
    )
    def test_a_folder_that_does_not_say(self, tmp_path, names, code):
        with pytest.raises(DataError) as caught:
            self.found(tmp_path, *names)
        assert caught.value.code == code

    @pytest.mark.parametrize("extra", ["extra.tsv", "train.lid.tsv", "test_a.tsv"])
    def test_a_named_file_is_never_left_out_in_silence(self, tmp_path, extra):
        with pytest.raises(DataError, match=f"{extra} would not be used") as caught:
            self.found(tmp_path, "train.tsv", "test.tsv", extra, given=["train.tsv", "test.tsv", extra])
        assert caught.value.code == "several-files"

    def test_the_one_of_two_sets_is_asked_for(self, tmp_path):
        self.found(tmp_path, "train.tsv", "test.tsv", "train.lid.tsv")
        asked = []
        found = find_splits([tmp_path], Findings({}, lambda *question: asked.append(question) or "train.lid.tsv"))
        assert {name: path.name for name, path in found.items()} == {"train": "train.lid.tsv"}
        assert list(asked[0][2]) == ["train.tsv", "train.lid.tsv"]

    @pytest.mark.parametrize(
        ("names", "validation", "test"),
        [
            (["train", "dev", "test"], "dev.tsv", "test.tsv"),
            (["train", "test"], 0.2, "test.tsv"),
            (["train", "dev"], 0.2, "dev.tsv"),
            (["train", "dev", "unlabelled test"], 0.2, "dev.tsv"),
        ],
    )
    def test_what_selects_does_not_score(self, tmp_path, names, validation, test):
        for at, name in enumerate(names):
            content = rows("\t", "text\tlabel").replace(" n", f" {name[:3]}{at}n")
            if name.startswith("unlabelled"):
                content = re.sub("\t(pos|neg)", "\t", content)
            (tmp_path / f"{name.split()[-1]}.tsv").write_text(content)
        found, corpus = detect([tmp_path], {"hygiene": "report"})
        assert (found.data["train"], found.data["validation"], found.data["test"]) == ("train.tsv", validation, test)
        assert corpus.test
        reasons = {decision.what: decision.reason for decision in found.decisions}
        assert ("name" in reasons["data.test"]) is (test == "test.tsv")

    @pytest.mark.parametrize(
        ("train", "test"),
        [
            (("train.csv", rows(",", "text,label")), ("test.csv", "id,text\n1,hola amigo\n")),
            (("train.conll", blocks("{word}\t{tag}")), ("test.conll", "hola\namigo\n\nok\n")),
            (("train.conll", blocks("{word}\tX\t{tag}")), ("test.conll", "hola\tX\t\namigo\tX\t\n")),
            (("train.csv", rows(",", "text,label")), ("test.jsonl", '{"text": "hola"}\n')),
        ],
    )
    def test_a_test_set_without_labels_is_left_out_and_reported(self, tmp_path, train, test):
        for name, content in (train, test):
            (tmp_path / name).write_text(content)
        files = [tmp_path / train[0], tmp_path / test[0]]
        for paths in ([tmp_path], files, files[:1]):
            found, corpus = detect(paths, {})
            assert (found.data["test"], corpus.test) == (None, [])
            reasons = " ".join(f"{one.choice} {one.reason}" for one in found.decisions if test[0] in one.reason)
            assert "not used" in reasons or (len(paths) == 1 and test[0] == "test.jsonl")

    def test_what_is_not_used_of_a_folder_is_reported_and_the_user_s_train_decides(self, tmp_path):
        for name in ("train.tsv", "dev.tsv", "train.lid.tsv", "dev.lid.tsv", "lexicon.tsv", "~$train.tsv"):
            (tmp_path / name).write_text(rows("\t", "text\tlabel").replace(" n", f" {name} n"))
        found, _ = detect([tmp_path], {"hygiene": "report"})
        (decision,) = [one for one in found.decisions if one.what == "FILE"]
        assert decision.reason.startswith("not used: dev.tsv, lexicon.tsv, train.tsv; or is it train.tsv?")
        found, _ = detect([tmp_path], {"hygiene": "report", "train": "train.tsv"})
        assert (found.data["train"], found.data["test"]) == ("train.tsv", "dev.tsv")
        found, _ = detect([tmp_path], {"hygiene": "report", "train": "train.tsv", "validation": "dev"})
        assert found.data["test"] is None


ROWS = "".join(f"{text}~{mood}~x{at}\n" for at, (text, mood) in enumerate(PAIRS))
TEXT, LABEL = {"text_column": "Beitrag"}, {"label_column": "Urteil"}


@pytest.mark.parametrize(
    ("name", "content", "given", "expected"),
    [
        ("a.jsonl", '{"text": "hola %s", "label": "%s"}\n', {"format": "auto"}, NAMED),
        ("a.txt", blocks("{word}\t{tag}"), {"format": "auto", "separator": "auto"}, TOKEN | {"format": "conll"}),
        ("a.conll", blocks("{word};{tag}"), {"separator": ";"}, TOKEN | {"label_column": 1}),
        ("a.csv", "doc,sent,word,tag\n" + blocks("{at},{at},{word},{tag}", end=""), {"group_column": "sent"}, TOKEN),
        ("a.txt", "text~label~2019\n" + ROWS, {"separator": "~"}, NAMED | {"format": "csv"}),
        ("a.csv", "Beitrag~Urteil~2019\n" + ROWS, {"separator": "~"} | LABEL, TEXT),
        ("a.csv", "Ein Korpus~~\nBeitrag~Urteil~x\n" + ROWS, {"separator": "~"} | TEXT, LABEL),
    ],
)  # fmt: skip
def test_what_the_user_says_counts_when_a_file_is_looked_at(tmp_path, name, content, given, expected):
    file = tmp_path / name
    file.write_text("".join(content % pair for pair in PAIRS) if "%s" in content else content)
    found, corpus = detect([file], given)
    assert found.data.items() >= expected.items()
    assert (len(corpus.train) + len(corpus.validation), len(corpus.labels)) == (40, 2)


def test_shards_and_a_column_of_splits(tmp_path):
    for split, at in (("train", 0), ("train", 1), ("test", 0)):
        content = rows(",", "text,label").replace("\n", f",{['train', 'dev'][at]}\n").replace(" n", f" n{split}{at}")
        file = tmp_path / f"{split}-0000{at}-of-0000{1 + (split == 'train')}.csv.gz"
        file.write_bytes(gzip.compress(content.replace(",train", ",fold", 1).encode()))
    found, corpus = detect([tmp_path], {"hygiene": "report"})
    assert (found.data["train"], found.data["test"]) == ("train", "test")
    assert len(corpus.train) + len(corpus.validation) == 80
    lines = [f"{text},{mood},{'dev' if text[-1] == '1' else 'train'}\n" for text, mood in PAIRS]
    (tmp_path / "a.csv").write_text("text,label,set\n" + "".join(lines))
    found, _ = detect([tmp_path / "a.csv"], {})
    assert found.data["label_column"] == "label"
    assert any("'set'" in decision.reason for decision in found.decisions)


def test_a_table_that_is_sorted_by_label(tmp_path):
    lines = [f"la casa {at} azul,{('pos', 'neg')[at // 3000]},{2000 + at % 3}\n" for at in range(6000)]
    (tmp_path / "a.csv").write_text("text,label,year\n" + "".join(lines))
    found = Findings({})
    find_form(tmp_path / "a.csv", found)
    assert (found.data["text_column"], found.data["label_column"]) == ("text", "label")


@pytest.mark.parametrize(
    ("names", "cells", "asked", "chosen", "others"),
    [
        ("review,stars,language", "{text},{n},{mood}", [], ("review", "stars"), "or is it language"),
        ("post_title,body,label", "la {text},el {text},{mood}", ["text_column"], ("body", "label"), "or is it post_"),
        ("text,lang,mine", "{text},{n},{mood}", ["label_column"], ("text", "lang"), "or is it mine"),
        ("text,label,label_text", "{text},{at},{mood}", [], ("text", "label_text"), ""),
        ("text,year,overall_sentiment", "{text},{n},{mood}", [], ("text", "overall_sentiment"), "or is it year"),
    ],
)
def test_other_columns_that_may_be_meant_are_shown(tmp_path, names, cells, asked, chosen, others):
    lines = [cells.format(text=t, mood=m, n=at % 3, at=at % 2) for at, (t, m) in enumerate(PAIRS)]
    (tmp_path / "a.csv").write_text("\n".join([names, *lines]) + "\n")
    questions = []
    found = Findings({}, lambda key, question, answers: questions.append(key[5:]) or next(iter(answers)))
    find_form(tmp_path / "a.csv", found)
    assert (questions, (found.data["text_column"], found.data["label_column"])) == (asked, chosen)
    assert others in " ".join(decision.reason for decision in found.decisions)


BOTH = {"text_column": ["question", "answer"]}
RATED = [f"{1 + at % 9 / 2:.1f}".replace(".", ",") for at in range(40)]


@pytest.mark.parametrize(
    ("names", "cells", "asked", "expected"),
    [
        ("text\trating", "{text}\t{rating}", [], SEQUENCE | {"label_column": "rating"}),
        ("text\tv\tr\tm\tlang", "{text}\t0\t{n}\t{n}\t{mood}", ["data.task"], SEQUENCE | {"label_column": "lang"}),
        ("text\tv\tr\tm\tmine", "{text}\t{n}\t{n}\t{n}\t{mood}", ["data.task"], SEQUENCE | {"label_column": "mine"}),
        *((f"text\t{name}", "{text}\t{mood}|n{n}|x{x}", [], {"label_column": name}) for name in ("emotions", "mine")),
        ("question\tanswer\tintent", "{text}\tthis is {mood}\t{mood}", [], {"text_column": "question"}),
        ("question\tanswer\tintent", "{text}\tsee page {half}\tp{half}", [], {"text_column": "question"}),
        ("question\tanswer\tintent", "{text}\tis it {text}\t{mood}", ["data.text_column"], BOTH),
        ("premise\thypothesis\tlabel", "la {many}\t{text}\t{mood}", [], {"text_column": ["premise", "hypothesis"]}),
    ],
)  # fmt: skip
def test_what_is_alike_is_not_mistaken(tmp_path, names, cells, asked, expected):
    lines = [
        cells.format(text=t, mood=m, n=at // 3 % 2, x=at // 5 % 2, rating=rating, many=at // 2, half=at % 8)
        for at, ((t, m), rating) in enumerate(zip(PAIRS, RATED, strict=True))
    ]
    (tmp_path / "a.tsv").write_text("\n".join([names, *lines]) + "\n")
    questions = []
    found = Findings({}, lambda key, question, answers: questions.append(key) or next(iter(answers)))
    find_form(tmp_path / "a.tsv", found)
    assert found.data.items() >= expected.items()
    assert questions == asked


@pytest.mark.parametrize(
    ("names", "cells", "key", "choice", "reason"),
    [
        ("text,label", "{text},{mood}|n{n}|x{x}", "label_column", "label", "6 values: "),
        ("premise,hypothesis,label", "la {n},el {text},{mood}", "text_column", "[premise, hypothesis]", "two texts"),
        ("premise,hypothesis,label", "la {n},el {text},{mood}", "task", "sequence", "two texts and a label in"),
    ],
)
def test_decisions_show_labels_and_columns_as_they_are_read(tmp_path, names, cells, key, choice, reason):
    lines = [cells.format(text=t, mood=m, n=at // 3 % 2, x=at // 5 % 2) for at, (t, m) in enumerate(PAIRS)]
    (tmp_path / "a.csv").write_text("\n".join([names, *lines]) + "\n")
    found = Findings({})
    find_form(tmp_path / "a.csv", found)
    (decision,) = [one for one in found.decisions if one.what == f"data.{key}"]
    assert (decision.choice, decision.reason[: len(reason)]) == (choice, reason)


def test_several_columns_of_0_and_1(tmp_path):
    lines = [f"{text}\t{at % 2}\t{at % 3 % 2}" for at, text in enumerate(TEXTS)]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tjoy\tanger", *lines]) + "\n")
    found, corpus = detect([tmp_path / "a.tsv"], {"label_column": ["joy", "anger"]})
    assert (found.data["task"], corpus.labels) == ("multilabel", ("anger", "joy"))
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"header, or name data\.label_column") as caught:
        detect([tmp_path / "a.tsv"], {"task": "multilabel"})
    assert caught.value.code == "no-labels"


def test_an_empty_label_does_not_change_the_share(tmp_path):
    lines = [f"la casa {at} azul,{('pos', 'neg')[at % 2] if at else ''}\n" for at in range(1005)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(lines))
    found, _ = detect([tmp_path / "a.csv"], {"hygiene": "report"})
    assert (found.data["validation"], found.data["missing"]) == (0.1, [""])


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "expected"),
        [
            ({"positve": 1, "Positve": 1, "positive": 90}, {"positve": "positive", "Positve": "positive"}),
            ({"negaitve": 2, "negative": 300}, {"negaitve": "negative"}),
            ({"lang1": 1, "lang2": 100}, {}),
            ({"B-LOC": 1, "I-LOC": 100}, {}),
            ({"positve": 5, "positive": 90}, {}),
            ({"PART": 1, "PARK": 100}, {}),
            ({"typical": 100, "atypical": 1}, {}),
        ],
    )
    def test_what_may_be_a_typo(self, labels, expected):
        assert typos(labels) == expected

    @pytest.mark.parametrize(("answer", "merged"), [(0, False), (1, True)])
    def test_typos_are_merged_only_if_a_person_says_so(self, tmp_path, answer, merged):
        content = "text,label\n" + "".join(f"la casa {at} azul,{('good', 'awful')[at % 2]}\n" for at in range(200))
        content = content.replace("good\n", "Good\n", 3).replace("awful\n", "awfull\n", 2)
        (tmp_path / "a.csv").write_text(content)
        asked = []
        ask = lambda key, _, answers: asked.append(key) or list(answers)[answer]  # noqa: E731
        found, corpus = detect([tmp_path / "a.csv"], {"hygiene": "report"}, ask)
        typo = {"awfull": "awful"} if merged else {}
        assert (asked, found.data["label_map"]) == (["data.label_map"], {"Good": "good"} | typo)
        assert corpus.labels == (("awful", "good") if merged else ("awful", "awfull", "good"))
        ready = 'data.label_map={"Good": "good", "awfull": "awful"}'
        assert any(ready in decision.reason for decision in found.decisions) is not merged

    def test_missing_ones_are_left_out_and_the_user_s_map_stays(self, tmp_path):
        content = rows(",", "text,label").replace("pos\n", "Pos\n", 1).replace("neg\n", "\n", 2)
        (tmp_path / "a.csv").write_text(content)
        found, corpus = detect([tmp_path / "a.csv"], {})
        assert (found.data["missing"], found.data["label_map"]) == ([""], {"Pos": "pos"})
        assert len(corpus.train) + len(corpus.validation) == 38
        found, _ = detect([tmp_path / "a.csv"], {"label_map": {"Pos": "Pos"}})
        assert found.data["label_map"] == {"Pos": "Pos"}


def test_what_is_not_sure_is_asked_and_reported(tmp_path):
    lines = [f"{text},{text.upper()},{mood},{'ab'[len(text) % 2]}" for text, mood in PAIRS]
    (tmp_path / "a.csv").write_text("first,second,one,two\n" + "\n".join(lines) + "\n")
    asked = []
    last = lambda key, _, answers: asked.append((key, list(answers))) or list(answers)[-1]  # noqa: E731
    found, _ = detect([tmp_path / "a.csv"], {}, last)
    assert asked == [("data.text_column", ["first", "second"]), ("data.label_column", ["one", "two"])]
    assert (found.data["text_column"], found.data["label_column"]) == ("second", "two")
    reasons = {decision.what: decision.reason for decision in found.decisions}
    assert "or is it first" in reasons["data.text_column"]
    found, _ = detect([tmp_path / "a.csv"], {"text_column": 0, "label_column": "two"}, last)
    assert len(asked) == 2
    assert found.data["text_column"] == 0


def test_scripts_and_english():
    assert list(scripts(["नमस्ते दुनिया hello", "123 😀"])) == ["Devanagari", "Latin"]
    assert looks_english(["what is the name of the river that was there", "how are you"])
    assert not looks_english(["la neta this weather está muy hot para mi", "qué cool que viniste my friend"])
    assert not looks_english([])


CELLS = st.sampled_from(
    ["", "a", "hola amigo", "la casa", "1", "2.0", "pos", "neg", "['a']", "x/en", '"', "# a = b", "<EOS>", "é"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=12),
    separator=st.sampled_from(["\t", ",", ";", " "]),
    ending=st.sampled_from(["csv", "tsv", "txt", "conll", "jsonl", "x"]),
)
def test_whatever_is_in_a_file_it_is_read_or_refused(tmp_path, table, separator, ending):
    file = tmp_path / f"a.{ending}"
    file.write_text("\n".join(separator.join(row) for row in table), encoding="utf-8")
    with contextlib.suppress(DataError):
        found, corpus = detect([file], {})
        assert load_corpus(DataConfig(**found.data), 42).fingerprint() == corpus.fingerprint()

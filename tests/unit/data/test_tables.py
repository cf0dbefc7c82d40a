"""CSV, TSV, JSON lines and parquet."""

# ruff: noqa: F811

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_readers import predicted, write  # noqa: F401

from tokmask_peft.data.conll import Columns, readable
from tokmask_peft.data.opening import DataFile
from tokmask_peft.data.readers import read_split, reader_of
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.tasks import get_task


def read(path, task="sequence", **columns):
    return readable(reader_of(path)(DataFile(path), Columns(get_task(task), **columns)))


def refused(path, task="sequence", **columns):
    """Return code and line of the error."""
    with pytest.raises(DataError) as caught:
        read(path, task, **columns)
    return caught.value.code, caught.value.fields.get("where", "").removeprefix(str(path))


def test_jsonl_of_texts_and_of_words(write):
    texts = write("a.jsonl", '{"sentence": "hola", "sentiment": 1}\n\n{"sentence": "bye", "sentiment": 0}\n')
    assert [(e.text, e.label) for e in read(texts)] == [("hola", "1"), ("bye", "0")]
    words = write("b.jsonl", '{"tokens": ["me", "too"], "tags": ["lang2", "lang1"]}\n')
    assert read(words, "token")[0].label == ("lang2", "lang1")
    joined = write("c.jsonl", '{"words": ["me", "too"], "label": "x"}\n')
    assert read(joined)[0].text == "me too"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('{"words": ["a"], "tags": ["x", "y"]}', "tag-count"),
        ('{"words": 3, "tags": ["x"]}', "cell-type"),
        ("{broken", "not-json"),
        ("[1]", "not-json"),
        ('{"words": ["a"]}', "missing-column"),
    ],
)
def test_jsonl_errors_name_their_line(write, line, code):
    path = write("a.jsonl", '{"words": ["a"], "tags": ["x"]}\n' + line + "\n")
    assert refused(path, "token") == (code, ":2")


ROWS = [{"text": "uno\n[dos]", "label": "x"}, {"text": "hola", "label": "y"}]


@pytest.mark.parametrize(("start", "indent"), [("", None), ("\ufeff", 2), ("\n \n", 0)])
def test_a_json_array_is_read(write, start, indent):
    path = write("a.json", start + json.dumps(ROWS, indent=indent) + "\n")
    assert [(e.text, e.label, e.where) for e in read(path)] == [
        ("uno\n[dos]", "x", f"{path}[0]"),
        ("hola", "y", f"{path}[1]"),
    ]


def test_every_element_of_a_json_array_is_a_row_and_so_is_a_line_with_a_list(write):
    array = write("a.json", '[{"text": "a"},\n 3, {"text": "b"}]')
    assert [text for _, text in predicted(array)] == ["a", "not-json", "b"]
    lines = write("a.jsonl", '[1]\n{"text": "a"}\n[2]\n')
    assert [text for _, text in predicted(lines)] == ["not-json", "a", "not-json"]


@pytest.mark.parametrize(
    ("content", "line"),
    [('[{"text": "a"},\n{"text": }]', ":2"), ('[{"text": "a"},\n', ":1"), ('{\n  "text": "a"\n}\n', ":1")],
)
def test_other_json_is_refused_with_what_to_do(write, content, line):
    path = write("a.json", content)
    assert refused(path) == ("not-json", line)


LISTS = [
    ("['me' 'encanta'\n 'this']", ("me", "encanta", "this"), "[0 1 0]", ("0", "1", "0")),
    ("['me' \"can't\" 'this']", ("me", "can't", "this"), "[ 0.  1. 10.]", ("0.0", "1.0", "10.0")),
    ('["me", "\\ud83d\\ude00", "a\\/b"]', ("me", "\U0001f600", "a/b"), "[0, 1, 0]", ("0", "1", "0")),
    (" ['me', \"it's\", 'a\\nb',] ", ("me", "it's", "a\nb"), "['x', u'y', 'z']", ("x", "y", "z")),
    ("me [x] this", ("me", "[x]", "this"), '["x", 2, -1.5]', ("x", "2", "-1.5")),
]


@pytest.mark.parametrize(("words", "text", "tags", "label"), LISTS)
def test_a_list_that_a_cell_holds_as_text(write, words, text, tags, label):
    (found,) = read(write("a.jsonl", json.dumps({"words": words, "tags": tags}) + "\n"), "token")
    assert (found.text, found.label) == (text, label)
    assert read(write("b.jsonl", json.dumps({"text": words, "label": "x"}) + "\n"))[0].text == " ".join(text)


NO_LISTS = ["['me', None]", '["me", null]', "[['me']]", "['me' 'x', 'y']", "['me' ... 'x']", "['me'", "[brb]", "[1]"]
NO_LISTS += ["[1 2]", "[brb] hola", "['a''b']", "[" * 3000, "[NaN, 1]"]


@pytest.mark.parametrize("words", NO_LISTS)
def test_what_begins_with_a_bracket_and_is_not_a_list_is_refused_as_words(write, words):
    path = write("a.jsonl", json.dumps({"words": words, "tags": "x"}) + "\n")
    assert refused(path, "token") == ("list-cell", ":1")


@pytest.mark.parametrize("tags", ["[null, 1]", "[0, 1", "[[0, 1]]", "[x]", "[9" + "9" * 5000 + "]"])
def test_tags_that_begin_with_a_bracket_and_are_not_a_list_are_refused(write, tags):
    path = write("a.jsonl", json.dumps({"words": "me too", "tags": tags}) + "\n")
    assert refused(path, "token") == ("list-cell", ":1")


@pytest.mark.parametrize("row", [{"words": [["me"]], "tags": ["x"]}, {"words": ["me"], "tags": [{"a": 1}]}])
def test_lists_in_lists_are_refused(write, row):
    assert refused(write("a.jsonl", json.dumps(row) + "\n"), "token") == ("cell-type", ":1")


@pytest.mark.parametrize("text", ["[1]", "[brb] hola", "[user]: hi", "['", "[]"])
def test_a_post_may_begin_with_a_bracket(write, text):
    assert read(write("a.jsonl", json.dumps({"text": text, "label": "[x]"}) + "\n"))[0].text == text


@pytest.mark.parametrize(
    ("text", "label", "code"),
    [("['me', None]", "x", "list-cell"), ("a", "[0, null]", "list-cell"), ("a", "['x']", "cell-type")],
)
def test_a_list_is_not_trained_with_its_brackets(write, text, label, code):
    assert refused(write("a.jsonl", json.dumps({"text": text, "label": label}) + "\n")) == (code, ":1")


def test_parquet_with_and_without_stored_class_names(tmp_path):
    pq.write_table(pa.table({"words": [["a", "b"]], "lid": [["x", "y"]]}), tmp_path / "plain.parquet")
    assert read(tmp_path / "plain.parquet", "token")[0].label == ("x", "y")
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"words": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "PER"]))})
    stored = Dataset.from_dict({"words": [["a", "b"], ["c"]], "ner_tags": [[1, 0], [0]]}, features=features)
    stored.to_parquet(tmp_path / "named.parquet")
    assert [e.label for e in read(tmp_path / "named.parquet", "token")] == [("PER", "O"), ("O",)]
    hidden = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=hidden).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError) as caught:
        read_split(SourceConfig(path=str(tmp_path)), "test", "sequence")
    assert caught.value.code == "no-labels"
    (tmp_path / "broken.parquet").write_bytes(b"text\n")
    assert refused(tmp_path / "broken.parquet")[0] == "not-parquet"


def test_columns_are_asked_for_when_the_choice_is_not_clear(write):
    two = write("a.tsv", "text\ttweet\tlabel\na\tb\tx\n")
    assert refused(two)[0] == "column"
    assert read(two, text="tweet")[0].text == "b"
    assert read(two, text=0)[0].text == "a"
    none = write("b.tsv", "frase\tlabel\na\tx\n")
    assert refused(none)[0] == "column"
    with pytest.raises(DataError, match=r"no column 'frse'.*frase, label.*Did you mean 'frase'") as caught:
        read(none, text="frse")
    assert caught.value.fields == {"field": "text_column", "columns": ("frase", "label")}
    assert refused(none, text="frase", label=2)[0] == "column"
    assert refused(write("c.jsonl", '{"words": ["a"], "lid": ["x"], "pos": ["y"]}\n'), "token")[0] == "column"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_two_columns_of_one_name_are_refused(write, name):
    content = "text,label,label\na,x,y\n"
    if name == "a.parquet":
        table = pa.table([pa.array([cell]) for cell in "axy"], names=["text", "label", "label"])
        pq.write_table(table, (sink := pa.BufferOutputStream()))
        content = sink.getvalue().to_pybytes()
    elif name == "a.jsonl":
        content = '{"text": "a", "label": "x", "label": "y"}\n'
    elif name == "a.tsv":
        content = content.replace(",", "\t")
    with pytest.raises(DataError, match=r"'label'.*[Rr]ename") as caught:
        read(write(name, content))
    assert caught.value.code == "duplicate-column"


def test_names_that_fit_alike_are_a_choice_to_make_and_empty_ones_have_a_number(write):
    path = write("a.csv", "text,Label,label \na,x,y\n")
    assert refused(path)[0] == "column"
    assert read(path, label="label ")[0].label == "y"
    path = write("b.csv", "text,,,label\na,b,c,x\n")
    assert (read(path, label=2)[0].label, read(path)[0].label) == ("c", "x")


@pytest.mark.parametrize(("column", "code"), [("  \tx", "empty-text"), ("fine\t", "empty-label")])
def test_empty_cells_are_reported_together(write, column, code):
    rows = ["good\tx", column] * 7
    path = write("train.tsv", "text\tlabel\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError) as caught:
        read_split(SourceConfig(path=str(path)), "train", "sequence")
    text = str(caught.value)
    assert caught.value.code == code
    assert text.count("train.tsv:") == 6  # the file, then five places
    assert "and 2 more (7 in all)" in text
    assert [place.rsplit(":", 1)[1] for place in caught.value.fields["places"]] == [str(n) for n in range(3, 16, 2)]


@pytest.mark.parametrize("label", ["", "?", "_", "-1"])
def test_a_split_with_placeholders_only_has_no_labels(write, label):
    path = write("test.jsonl", "".join(json.dumps({"text": t, "label": label}) + "\n" for t in "abc"))
    with pytest.raises(DataError, match=r"data.test to validation.*share of train") as caught:
        read_split(SourceConfig(path=str(path)), "test", "sequence")
    assert caught.value.code == "no-labels"


def test_an_empty_file_is_an_error(write):
    for name, content in {"a.tsv": "", "b.csv": "text,label\n", "c.jsonl": "\n", "d.conll": "\n\n"}.items():
        with pytest.raises(DataError) as caught:
            read_split(SourceConfig(path=str(write(name, content))), "train", "sequence")
        assert caught.value.code == "no-texts"


cell = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00", codec="utf-8"), max_size=12)


@given(
    rows=st.lists(st.tuples(cell, cell), min_size=1, max_size=5).map(
        lambda rows: [tuple(c.translate({9: None, 10: None, 13: None}) for c in row) for row in rows]
    ),
    bom=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_tsv_written_is_tsv_read(tmp_path_factory, rows, bom, end, last):
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    text = end.join("\t".join(row) for row in [("text", "label"), *rows]) + (end if last else "")
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    assert [(e.text, e.label) for e in read(path)] == [(text, label.strip()) for text, label in rows]

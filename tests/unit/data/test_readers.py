"""The files that users bring: every row comes out once, and what a file is gets decided from what is in it."""

import contextlib
import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokmask_peft.data import tables
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.opening import line_number
from tokmask_peft.data.readers import TextFile, read_split
from tokmask_peft.errors import DataError, TokmaskError
from tokmask_peft.examples import Example, Unreadable
from tokmask_peft.recipe.data import DataConfig, SourceConfig


@pytest.fixture
def write(tmp_path):
    def write_file(name, content, encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return write_file


def read(path, task="sequence", split="train", **source):
    """Return (text, label) of each text, and what was decided, as `{what: choice}`."""
    decisions = []
    found = read_split(SourceConfig(path=str(path), **source), split, task, decisions)
    made = {decision.what.split(" of ")[0]: decision.choice for decision in decisions}
    return [(example.text, example.label) for example in found], made


def refused(path, task="sequence", **source):
    with pytest.raises(TokmaskError) as caught:
        read(path, task, **source)
    return caught.value


def predicted(path, task="sequence", **options):
    """Return (line, text or code) of each row that prediction sees."""
    found = TextFile(path, task, **options)
    return [(line_number(one.where), one.text if isinstance(one, Example) else one.code) for one in found]


# -- every row once --


@pytest.mark.parametrize("row", [6, 200])
@pytest.mark.parametrize("quote", ['"hola {},x', 'hola {},"x', '"hola" {},x', '"hola {}"",x'])
def test_a_stray_quote_spoils_its_own_row_only(write, row, quote):
    rows = [f'"uno, dos {n}",x' if n % 3 == 0 else f"hola {n},x" for n in range(1, 201)]
    rows[row - 1] = quote.format(row)
    found = predicted(write("a.csv", "\n".join(["text,label", *rows]) + "\n"))
    assert [line for line, _ in found] == list(range(2, 202))
    assert [n for n, (_, text) in enumerate(found, start=1) if text == "not-csv"] == [row]
    assert refused(write("b.csv", "\n".join(["text,label", *rows]))).fields["where"].endswith(f":{row + 1}")


def test_two_stray_quotes_do_not_join_the_rows_between(write):
    rows = ['"uno,x', "dos,x", "tres,y", "cuatro,x", 'cinco",y', '"a\nb, c\nd",x', "seis,x"]
    found = predicted(write("a.csv", "\n".join(["text,label", *rows])))
    assert found == [
        (2, "not-csv"),
        *[(3, "dos"), (4, "tres"), (5, "cuatro")],
        *[(6, 'cinco"'), (7, "a\nb, c\nd"), (10, "seis")],
    ]


def test_a_quote_that_is_never_closed_is_looked_for_in_bounded_memory(write, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST", 1000)
    rows = [f"row {number} of a long file" for number in range(20_000)]
    source = TextFile(write("a.csv", "\n".join(["text", '"open', *rows])), "sequence")
    stream = iter(source)
    assert isinstance(next(stream), Unreadable)
    assert source.done < source.total / 3
    assert [one.text for one in stream] == rows


def test_a_cell_of_any_length_is_one_cell(write):
    long = "uno\n" * 40_000
    before = csv.field_size_limit()
    assert predicted(write("a.csv", f'text,id\n"{long}",1\ndos,2\n')) == [(2, long), (40_003, "dos")]
    assert predicted(write("a.tsv", f"text\tid\n{long[:-1].replace(chr(10), ' ')}\t1\n"))[0][0] == 2
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
def test_blank_rows_have_their_line_in_predictions(write, name):
    row = '{"text": "hola que tal"}' if name == "a.jsonl" else "hola que tal"
    head = ["text"] if name[-2:] == "sv" else []
    found = predicted(write(name, "\n".join([*head, "", row, "", "", row, ""]) + "\n"))
    first = len(head) + 1
    assert [line for line, _ in found] == list(range(first, first + 6))
    assert [line for line, text in found if text == "hola que tal"] == [first + 1, first + 4]


cell = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(['"', '""', ",", "\n", "\0"])


@given(rows=st.lists(st.tuples(cell, cell), max_size=6), odd=st.integers(0, 40), separator=st.sampled_from(",\t"))
def test_whatever_is_in_a_table_each_line_is_in_one_row(rows, odd, separator):
    sink = io.StringIO(newline="")
    csv.writer(sink, delimiter=separator).writerows([("text", "label"), *rows])
    text = sink.getvalue()
    text = text[:odd] + '"' + text[odd:]
    lines = list(io.StringIO(text, newline="\n"))
    found = [taken for taken, _ in tables.records(iter(lines), separator)]
    assert [line for taken in found for line in taken] == lines


@given(
    rows=st.lists(st.tuples(cell, cell), min_size=1, max_size=6),
    form=st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t")]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_csv_and_pandas_write_is_read(tmp_path_factory, rows, form, quoting, encoding, end):
    assume(form[1] != ";" or not any(mark in text for row in rows for text in row for mark in ",\t|"))  # ambiguous
    path = tmp_path_factory.mktemp("table") / f"train{form[0]}"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=form[1], lineterminator=end, quoting=quoting)
        writer.writerows([("text", "label"), *rows, ('needs "quotes"', "x"), ("plain", "y")])
    found = predicted(path, text_column="text")
    expected = [*(text for text, _ in rows), 'needs "quotes"', "plain"]
    assert [text for _, text in found] == [text if text.strip() else "unreadable" for text in expected]


# -- header, separator, quotes --

COLA = "src04\t1\t\tThey went home.\nsrc04\t0\t*\tThey home went.\nsrc05\t1\t\tIt rains.\n"


def test_without_a_header_the_first_row_is_data(write):
    path = write("a.tsv", COLA)
    columns = {"text_column": 3, "label_column": 1}
    found, decided = read(path, **columns)
    assert [label for _, label in found] == ["1", "0", "1"]
    assert decided == {"header": "none"}
    assert len(read(path, **columns, header=True)[0]) == 2
    assert read(path, **columns, header=False)[1] == {}
    error = refused(path)
    assert (error.code, error.fields["columns"]) == ("column", tuple(f"column {n}" for n in range(4)))
    assert "data.header" in str(error)
    assert predicted(path, text_column="3")[0] == (1, "They went home.")


@pytest.mark.parametrize(
    ("first", "choice"),
    [("text,label", None), ("hola,pos", "none"), ("frase,clase", "the first row"), ("hola,1", "none")],
)
def test_auto_decides_from_names_and_cells(write, first, choice):
    path = write("a.csv", f"{first}\nuno,pos\ndos,neg\ntres,pos\n")
    found, decided = read(path, text_column=0, label_column=1)
    assert len(found) == 3 + (choice == "none")
    assert decided.get("header") == choice


def test_decisions_on_the_form_are_reported(write, tmp_path):
    for name in ("train", "dev", "test"):
        write(f"{name}.csv", "".join(f"{name} {n};{'pn'[n % 2]}\n" for n in range(8)))
    config = DataConfig(path=str(tmp_path), task="sequence", text_column=0, label_column=1)
    report = load_corpus(config, seed=1).report
    expected = [f"{what} of {name}.csv" for name in ("train", "dev", "test") for what in ("separator", "header")]
    assert [decision.what for decision in report.decisions] == expected
    assert json.loads(json.dumps(report.to_dict()))["splits"]["test"]["texts"] == 8


def test_quotes_of_pandas_go_and_quotes_of_posts_stay(write):
    written = 'text\tlabel\nplain\tx\n"she said ""hi"""\ty\n"two\nlines"\tx\n'
    assert read(write("a.tsv", written))[0] == [("plain", "x"), ('she said "hi"', "y"), ("two\nlines", "x")]
    for post in ('"a quotation"', 'it\'s "all" fine"', '"half open', '""twice""'):
        assert read(write("b.tsv", f'text\tlabel\n{post}\tx\n"another"\ty\n'))[0] == [(post, "x"), ('"another"', "y")]


# -- a word in each row --


def test_words_without_their_texts_are_refused_with_the_key(write):
    alone = write("a.csv", "words,tags\nhola,x\nok,y\n")
    assert refused(alone, "token").code == "word-per-row"
    assert [text for _, text in predicted(alone, "token")] == [("hola",), ("ok",)]
    assert read(write("d.csv", "sent,word,tag\n1,Das,2\n1,ist,2\n2,ok,1\n"), "token")[1] == {"texts": "one word a row"}
    again = write("b.csv", "doc,sent,words,tags\nA,1,a,x\nA,1,b,x\nA,2,c,x\nB,1,d,y\nB,1,e,y\n")
    error = refused(again, "token")
    assert error.fields["columns"] == ("doc", "sent")
    assert "data.group_column" in str(error)
    assert [text for text, _ in read(again, "token", group_column="sent")[0]] == [("a", "b"), ("c",), ("d", "e")]
    assert refused(again, text_column="words", label_column="tags", group_column="sent").code == "column"
    notes = "words,tags,note\n" + "".join(f"{word},x,{'odd' * (word == 'e')}\n" for word in "abcdefgh")
    assert refused(write("e.csv", notes), "token").fields["columns"] == ()
    assert read(write("c.csv", 'words,tags\n"[""hola""]",x\n"[""ok""]",y\n'), "token")[0][0] == (("hola",), ("x",))


def test_rows_of_a_text_that_are_apart_are_counted(write):
    for name, keys, count in (("a.csv", "1212", 2), ("b.csv", "1121", 1), ("c.csv", "1122", 0)):
        path = write(name, "id,words,tags\n" + "".join(f"{key},a,x\n" for key in keys))
        decisions = []
        read_split(SourceConfig(path=str(path), group_column="id"), "train", "token", decisions)
        source = TextFile(path, "token", group_column="id")
        assert list(source) == list(source)
        for found in (decisions, source.decisions):
            reasons = [one.reason for one in found if one.what == f"'id' in {name}"]
            assert len(reasons) == (count > 0)
            assert all(f": {count};" in one and "sort the file by 'id'" in one for one in reasons)


IDS = '{"id": %s, "word": "ok", "tag": %s}\n'


def test_an_empty_word_is_named_at_its_line(write):
    for name, content in (("a.conll", "yes\tx\n\tO\nno\tx\n\n"), ("b.csv", "id,word,tag\n1,yes,x\n1,,O\n2,no,x\n")):
        error = refused(path := write(name, content), "token")
        assert (error.code, error.fields["where"]) == ("empty-word", f"{path}:{3 if name == 'b.csv' else 2}")
    assert refused(write("c.jsonl", '{"words": ["a", ""], "tags": ["x", "y"]}\n'), "token").code == "empty-word"
    cells = "".join(IDS % row for row in [(1, "NaN"), (2, '"x"'), ("NaN", '"x"')])
    assert refused(path := write("e.jsonl", cells), "token", group_column="id").code == "empty-label"
    assert [text for text, _ in read(path, "token", group_column="id", missing=[""])[0]] == [("ok",), ("ok", "ok")]
    found, decided = read(write("d.conll", "# sent_enum = 1 pos\nyes\tx\n\tO\nno\tx\n"))
    assert (found[0][0], decided) == ("yes no", {"empty words": "left out"})


def test_documents_of_conll_2003_begin_without_a_text(write):
    path = write("a.conll", "-DOCSTART- -X- O\n\nEU NNP B-ORG\n\n-DOCSTART- -X- O\n\nok RB O\n-DOCSTART- NNP O\n")
    assert [text for text, _ in read(path, "token")[0]] == [("EU",), ("ok", "-DOCSTART-")]


# -- for prediction: bad rows stay at their place, good ones around them are read --


def test_plain_text_is_a_text_per_line(write):
    content = "\ufeffhoy great\r\n\r\n#viernes  \nmañana\u2028tarde".encode() + b"\nca\xf1a\nfin\n"
    path = write("in.txt", content)
    texts = ["hoy great", "unreadable", "#viernes  ", "mañana\u2028tarde", "not-unicode", "fin"]
    assert predicted(path) == list(enumerate(texts, start=1))
    assert predicted(path, "token")[2] == (3, ("#viernes",))


def test_csv_and_tsv_go_on_after_a_bad_row(write):
    content = 'id,text\n1,"two\nlines"\n2,a,b\n3,"bad" quote\n4,good\n5,\n6,"never closed\n7,free\n'
    found = predicted(write("in.csv", content))
    assert [line for line, _ in found] == [2, 4, 5, 6, 7, 8, 9]
    codes = ["two\nlines", "column-count", "not-csv", "good", "unreadable", "not-csv", "free"]
    assert [text for _, text in found] == codes
    found = predicted(write("in.tsv", 'label\ttext\nx\t"quote\nonly one\nx\tgood\n'))
    assert found == [(2, '"quote'), (3, "column-count"), (4, "good")]


def test_jsonl_goes_on_after_a_bad_row(write):
    rows = ['{"text": "good"', '{"text": "good"}', "[1]", '{"txt": 1}', '{"text": 7}', '{"text": "half \\ud83d"}']
    path = write("in.jsonl", "\n".join([*rows, "[" * 10**6, '{"text": "last", "more": 1}']))
    codes = ["not-json", "good", "not-json", "missing-column", "cell-type", "not-unicode", "not-json", "last"]
    assert predicted(path) == list(enumerate(codes, start=1))
    assert not any(str(path.parent) in one.problem for one in TextFile(path, "sequence") if isinstance(one, Unreadable))


def test_an_object_without_columns_spoils_its_own_line_only(write):
    assert predicted(write("in.jsonl", '{}\n{"text": "good"}\n')) == [(1, "missing-column"), (2, "good")]
    assert predicted(write("none.jsonl", "{}\n")) == [(1, "missing-column")]


def test_words_come_from_lists_or_strings(write):
    rows = [{"words": ["hoy", "great"]}, {"words": "hoy great"}, {"words": ["a", ""]}, {"words": []}, {"words": 4}]
    found = predicted(write("in.jsonl", "\n".join(map(json.dumps, rows))), "token")
    words = ("hoy", "great")
    assert [text for _, text in found] == [words, words, "unreadable", "unreadable", "cell-type"]


def test_conll_goes_on_with_the_next_text(write):
    content = "hoy\tes\ngreat\ten\n\nuno\tes\n# key = value\ndos\tes\n\n# id = 3\nfin\tes\n"
    found = predicted(write("in.conll", content), "token")
    assert found == [(1, ("hoy", "great")), (5, "comment-inside"), (9, ("fin",))]
    assert predicted(write("b.conll", "hola x\n\na b c\nd x\n\nok x\n"))[1] == (3, "column-count")


def test_parquet_rows_count_from_one(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["good", None, "last"]}), tmp_path / "in.parquet")
    source = TextFile(tmp_path / "in.parquet", "sequence")
    assert predicted(tmp_path / "in.parquet") == [(1, "good"), (2, "unreadable"), (3, "last")]
    assert len(list(source)) == 3
    assert source.done == source.total


def test_what_no_row_can_mend_is_an_error(write, tmp_path):
    wrong = {
        "no-path": tmp_path / "none.txt",
        "unknown-format": write("in.doc", "x"),
        "column": write("in.tsv", "a\tb\n1\t2\n"),
        "not-parquet": write("in.parquet", "x"),
    }
    for code, path in wrong.items():
        with pytest.raises(DataError) as caught:
            TextFile(path, "sequence")
        assert caught.value.code == code
    with pytest.raises(DataError) as caught:
        TextFile(tmp_path / "in.tsv", "sequence", separator="ab")
    assert (caught.value.code, caught.value.fields) == ("separator", {"field": "separator"})
    assert predicted(tmp_path / "in.tsv", text_column="b", separator="\\t") == [(2, "2")]
    assert predicted(write("empty.txt", "")) == []


def test_done_grows_to_total(write):
    source = TextFile(write("in.txt", "a\n" * 50), "sequence")
    seen = [source.done for _ in source]
    assert seen == sorted(seen)
    assert (seen[0], seen[-1], source.total) == (2, 100, 100)


# -- never a traceback --


@pytest.mark.parametrize("damage", range(12))
def test_a_damaged_parquet_file_is_one_error(tmp_path, damage):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": [f"hola {n}" for n in range(500)], "label": ["x", "y"] * 250}), path)
    data = bytearray(path.read_bytes())
    start = damage * len(data) // 12
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        assert len(read(path)[0]) == 500


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.conll", "a.conllu", "a.parquet"])
@given(content=st.binary(max_size=200) | st.binary(max_size=60).map(b'text\tlabel\n"'.__add__))
def test_odd_bytes_are_read_or_refused(tmp_path_factory, name, content):
    path = tmp_path_factory.mktemp("odd") / name
    path.write_bytes(content)
    for task in ("sequence", "token"):
        for attempt in (read, lambda path, task: list(TextFile(path, task))):
            with contextlib.suppress(TokmaskError):
                attempt(path, task)


@pytest.mark.parametrize("row", [{"text": "half \ud83d", "label": "x"}, {"text": "a", "label": "\ud83d"}])
def test_half_a_character_is_refused(write, row):
    path = write("a.jsonl", json.dumps(row) + "\n")
    assert (refused(path).code, refused(path).fields["where"]) == ("not-unicode", f"{path}:1")


def test_a_lack_of_memory_is_not_a_damaged_file(write, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(pq, "ParquetFile", full)
    with pytest.raises(MemoryError):
        read(write("train.parquet", b"PAR1"))


def test_what_a_reader_does_not_expect_is_an_error_with_the_file(write, monkeypatch):
    path = write("a.csv", "text,label\na,x\n")

    def broken(*_):
        raise RuntimeError("surprise")

    monkeypatch.setattr(tables, "cells_of", broken)
    assert (refused(path).code, refused(path).fields["file"]) == ("unreadable-file", str(path))

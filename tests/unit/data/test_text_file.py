"""Streaming texts for prediction: bad rows stay at their place, good ones around them are read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokmask_peft.data.opening import line_number
from tokmask_peft.data.readers import TextFile
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example, Unreadable


def read(path, task="sequence", **options):
    """Return (line, text or problem) of every row."""
    return [
        (line_number(found.where), found.text if isinstance(found, Example) else f"! {found.problem}")
        for found in TextFile(path, task, **options)
    ]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_plain_text_is_a_text_per_line(tmp_path):
    path = write(
        tmp_path, "in.txt", "\ufeffhoy great\r\n\n#viernes  \nmañana\u2028tarde".encode() + b"\nca\xf1a\nfin\n"
    )
    found = read(path)
    assert "not UTF-8" in found[4][1]
    assert found == [
        (1, "hoy great"),
        (2, "! the text is empty"),
        (3, "#viernes  "),
        (4, "mañana\u2028tarde"),
        (5, found[4][1]),
        (6, "fin"),
    ]
    assert read(path, "token")[2] == (3, ("#viernes",))


def test_csv_goes_on_after_a_bad_row(tmp_path):
    content = 'id,text\n1,"two\nlines"\n2,a,b\n3,"bad" quote\n4,good\n5,\n6,"never closed\n7,free\n'
    found = read(write(tmp_path, "in.csv", content))
    assert [line for line, _ in found] == [2, 4, 5, 6, 7, 8, 9]
    assert [text for _, text in found if text[0] != "!"] == ["two\nlines", "good", "free"]
    assert "3 columns separated by ','" in found[1][1]
    assert "not valid CSV" in found[2][1]
    assert "not valid CSV" in found[5][1]


def test_tsv_and_jsonl_go_on_after_a_bad_row(tmp_path):
    path = write(tmp_path, "in.tsv", 'label\ttext\nx\t"quote\nonly one\nx\tgood\n')
    found = read(path)
    assert [line for line, _ in found] == [2, 3, 4]
    assert (found[0][1], found[2][1]) == ('"quote', "good")
    rows = [
        '{"text": "good"',
        '{"text": "good"}',
        "[1]",
        '{"txt": 1}',
        '{"text": 7}',
        '{"text": "half \\ud83d"}',
        "[" * 10**6,
    ]
    path = write(tmp_path, "in.jsonl", "\n".join([*rows, '{"text": "last", "more": 1}']))
    found = list(TextFile(path, "sequence"))
    assert [line_number(one.where) for one in found] == list(range(1, 9))
    assert [one.text for one in found if isinstance(one, Example)] == ["good", "last"]
    bad = [one for one in found if isinstance(one, Unreadable)]
    assert [one.code for one in bad] == [
        "not-json",
        "not-json",
        "missing-column",
        "cell-type",
        "not-unicode",
        "not-json",
    ]
    assert not any(str(tmp_path) in one.problem for one in bad)


def test_an_object_without_columns_spoils_its_own_line_only(tmp_path):
    found = list(TextFile(write(tmp_path, "in.jsonl", '{}\n{"text": "good"}\n'), "sequence"))
    assert [getattr(one, "code", None) or one.text for one in found] == ["missing-column", "good"]
    assert next(iter(TextFile(write(tmp_path, "none.jsonl", "{}\n"), "sequence"))).code == "missing-column"


def test_words_come_from_lists_or_strings(tmp_path):
    rows = [{"words": ["hoy", "great"]}, {"words": "hoy great"}, {"words": ["a", ""]}, {"words": []}, {"words": 4}]
    path = write(tmp_path, "in.jsonl", "\n".join(map(json.dumps, rows)))
    found = read(path, "token")
    assert found[:2] == [(1, ("hoy", "great")), (2, ("hoy", "great"))]
    assert [text[:3] for _, text in found[2:]] == ["! a", "! t", "! t"]


def test_conll_goes_on_with_the_next_text(tmp_path):
    content = "hoy\tes\ngreat\ten\n\nuno\tes\n# key = value\ndos\tes\n\n# id = 3\nfin\tes\n"
    found = read(write(tmp_path, "in.conll", content), "token")
    assert found[0] == (1, ("hoy", "great"))
    assert found[1][0] == 5
    assert "inside a text" in found[1][1]
    assert found[2] == (9, ("fin",))


def test_parquet_rows_count_from_one(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["good", None, "last"]}), tmp_path / "in.parquet")
    source = TextFile(tmp_path / "in.parquet", "sequence")
    assert read(tmp_path / "in.parquet") == [(1, "good"), (2, "! the text is empty"), (3, "last")]
    assert len(list(source)) == 3
    assert source.done == source.total


def test_what_no_row_can_mend_is_an_error(tmp_path):
    wrong = {
        "no-path": tmp_path / "none.txt",
        "unknown-format": write(tmp_path, "in.doc", "x"),
        "column": write(tmp_path, "in.tsv", "a\tb\n1\t2\n"),
        "not-parquet": write(tmp_path, "in.parquet", "x"),
    }
    for code, path in wrong.items():
        with pytest.raises(DataError) as caught:
            TextFile(path, "sequence")
        assert caught.value.code == code
    assert read(tmp_path / "in.tsv", text_column="b") == [(2, "2")]
    assert read(write(tmp_path, "empty.txt", "")) == []


def test_done_grows_to_total(tmp_path):
    source = TextFile(write(tmp_path, "in.txt", "a\n" * 50), "sequence")
    seen = [source.done for _ in source]
    assert seen == sorted(seen)
    assert (seen[0], seen[-1], source.total) == (2, 100, 100)

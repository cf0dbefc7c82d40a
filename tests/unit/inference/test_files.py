"""Files: in order, in bounded memory, nothing half-written."""

import csv
import importlib.util
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokmask_peft.data.readers import TextFile
from tokmask_peft.errors import DataError, ExtraError, ModelError
from tokmask_peft.examples import Prediction, WordPredictions
from tokmask_peft.inference import files
from tokmask_peft.inference.display import print_file
from tokmask_peft.inference.export import check_folder, check_output
from tokmask_peft.inference.files import answer_record, json_parts, predict_file


class Echo:
    """Stands in for a classifier; notes how far the file was read at each call."""

    def __init__(self, source, fail_after=None):
        self.source, self.calls, self.fail_after = source, [], fail_after

    def predict(self, texts, batch_size):
        self.calls.append((len(texts), self.source.done))
        if self.fail_after is not None and len(self.calls) > self.fail_after:
            raise DataError("stop")
        return [Prediction(text.split()[0], {text.split()[0]: 1 / 3}) for text in texts]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_keep_their_order_and_bad_ones_their_place(tmp_path, classifier):
    model = classifier("bert", "token")
    rows = ['{"words": "hoy great"}', "nonsense", '{"words": ["mañana"]}', '{"words": []}']
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    report = predict_file(model, TextFile(tmp_path / "in.jsonl", "token"), tmp_path / "out.jsonl", batch_size=2)
    found = lines(tmp_path / "out.jsonl")
    assert [row["line"] for row in found] == [1, 2, 3, 4]
    assert [sorted(row) for row in found[1::2]] == [["error", "line"], ["error", "line", "words"]]
    (answer,) = model.predict([["hoy", "great"]])
    assert (found[0]["words"], found[0]["labels"]) == (["hoy", "great"], list(answer.labels))
    assert found[0]["probabilities"][1] == pytest.approx(answer.probabilities[1], abs=1e-5)
    assert found[2]["words"] == ["mañana"]
    assert (report.rows, report.unreadable, [p.problem for p in report.problems][1]) == (4, 2, "the text is empty")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_answer_to_a_long_text_is_written_in_parts(classifier, monkeypatch):
    (answer,) = classifier("bert", "token").predict(["hoy great mañana"])
    whole = "".join(json_parts(answer_record("", answer)))
    monkeypatch.setattr(files, "BATCH_ROWS", 2)
    parts = list(json_parts(answer_record("", answer)))
    assert "".join(parts) == whole
    assert max(part.count("lang1") for part in parts[-4:]) == 2
    found = json.loads(whole)
    assert found["confidence"] == pytest.approx(answer.confidence, abs=1e-6)
    assert found["probabilities"][2] == pytest.approx(answer.probabilities[2], abs=1e-6)


def test_a_long_file_is_read_a_chunk_ahead_and_no_further(tmp_path):
    path = tmp_path / "in.txt"
    with path.open("w") as file:
        for number in range(10_000):
            file.write(f"word{number} and some more\n")
    source = TextFile(path, "sequence")
    model, sizes = Echo(source), []

    def progress(report):
        sizes.append(report.rows)

    report = predict_file(model, source, tmp_path / "out.jsonl", batch_size=16, progress=progress)
    assert report.rows == 10_000
    chunk = 16 * files.CHUNK_BATCHES
    assert max(size for size, _ in model.calls) == chunk
    width = source.total / 10_000
    for number, (_, done) in enumerate(model.calls, start=1):
        assert done <= (number * chunk + 1) * width * 1.2
    assert sizes == sorted(sizes)
    with (tmp_path / "out.jsonl").open() as file:
        for number, line in enumerate(file):
            assert json.loads(line)["label"] == f"word{number}"
    assert number == 9_999


def test_long_texts_make_smaller_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_CHARACTERS", 1000)
    (tmp_path / "in.txt").write_text(("a " * 300 + "\n") * 20)
    source = TextFile(tmp_path / "in.txt", "sequence")
    predict_file(model := Echo(source), source, tmp_path / "out.jsonl")
    assert {size for size, _ in model.calls} == {2}


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a\n" * 5000)
    (tmp_path / "out.jsonl").write_text("before")
    source = TextFile(tmp_path / "in.txt", "sequence")
    with pytest.raises(DataError, match="stop"):
        predict_file(Echo(source, fail_after=2), source, tmp_path / "out.jsonl", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "out.jsonl"}
    assert (tmp_path / "out.jsonl").read_text() == "before"
    predict_file(Echo(source), source, tmp_path / "out.jsonl", force=True)
    assert len(lines(tmp_path / "out.jsonl")) == 5000


def test_what_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "out.jsonl").write_text("before")
    for out, force, code in [
        ("out.jsonl", False, "output-exists"),
        ("in.txt", True, "output-is-input"),
        (".", True, "output-not-writable"),
        ("no/out.jsonl", False, "output-not-writable"),
        (f"{'x' * 249}.jsonl", False, "output-not-writable"),  # with the number of the process the name is too long
    ]:
        with pytest.raises(DataError) as caught:
            check_output(tmp_path / out, tmp_path / "in.txt", force)
        assert (caught.value.code, caught.value.fields) == (code, {"path": tmp_path / out})
    bad = tmp_path / "no" / "folder", tmp_path / ("x" * 255), tmp_path / "in.txt" / "folder"
    for folder, code in ((tmp_path, "folder-taken"), *((folder, "folder-not-writable") for folder in bad)):
        with pytest.raises(ModelError) as caught:
            check_folder(folder)
        assert caught.value.code == code
    assert check_folder(tmp_path / "new") == tmp_path / "new"


def test_rows_without_an_answer_are_an_error(tmp_path):
    (tmp_path / "in.txt").write_text("a\nb\n")
    source = TextFile(tmp_path / "in.txt", "sequence")
    model = Echo(source)
    model.predict = lambda texts, batch_size: [Prediction("x", {"x": 1.0})]
    with pytest.raises(DataError) as caught:
        predict_file(model, source, tmp_path / "out.jsonl")
    assert (caught.value.code, caught.value.fields) == ("row-count", {"texts": 2, "answers": 1})
    assert not (tmp_path / "out.jsonl").exists()


class Namer:
    """Answers with the first word as the label; words get themselves."""

    def predict(self, texts, batch_size):
        found = []
        for text in texts:
            if isinstance(text, str):
                found.append(Prediction(text.split()[0], {text.split()[0]: 1 / 3}))
            else:
                found.append(WordPredictions(tuple(text), tuple(text), tuple({word: 0.5} for word in text)))
        return found


def table(path):
    if path.suffix == ".parquet":
        found = pq.read_table(path)
        return [found.column_names, *(list(row.values()) for row in found.to_pylist())]
    if path.suffix == ".xlsx":
        sheet = pytest.importorskip("openpyxl").load_workbook(path).active
        return [list(row) for row in sheet.iter_rows(values_only=True)]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def predicted(tmp_path, name, content, out, task="sequence", **options):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    report = predict_file(Namer(), TextFile(tmp_path / name, task, **options), tmp_path / out, force=True)
    return table(tmp_path / out) if Path(out).suffix != ".jsonl" else lines(tmp_path / out), report


BAD_ROWS = 'id,text,more\n1,"two\nlines",x\n\n2,a,b,c,d\n3,"bad" q\n4,"say ""hi"", =1+1",\n5,,y\n6,ca\udc81a,z\n'
ROWS = [
    ["1", "two\nlines", "x", "two", "0.333333", ""],
    ["", "", "", "", "", "the row is blank"],
    ["2", "a", "b,c,d", "", "", "5 columns"],
    ['3,"bad" q', "", "", "", "", "not valid CSV"],
    ["4", 'say "hi", =1+1', "", "say", "0.333333", ""],
    ["5", "", "y", "", "", "the text is empty"],
    ["6", "ca\\udc81a", "z", "", "", "not UTF-8"],
]


@pytest.mark.parametrize("out", ["out.csv", "out.tsv", "out.parquet", "out.xlsx"])
def test_a_table_comes_back_row_by_row_with_every_cell(tmp_path, out):
    if out.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    content = BAD_ROWS.encode("utf-8", "surrogateescape")
    (head, *rows), report = predicted(tmp_path, "in.csv", content, out)
    assert head == ["id", "text", "more", "label", "confidence", "error"]
    shown = [["" if cell is None else str(cell) for cell in row] for row in rows]
    assert [row[:5] for row in shown] == [row[:5] for row in ROWS]
    assert all(wanted[5] in row[5] for row, wanted in zip(shown, ROWS, strict=True))
    assert (report.rows, report.unreadable) == (7, 5)
    if not out.endswith(("csv", "tsv")):
        assert isinstance(rows[0][4], float)


@pytest.mark.parametrize(
    ("columns", "added"),
    [
        ("text,id", ["label", "confidence"]),
        ("text,label", ["predicted_label", "confidence"]),
        ("label,predicted_label,text,confidence", ["predicted_label_2", "predicted_confidence"]),
    ],
)
def test_a_column_of_the_input_keeps_its_name(tmp_path, columns, added):
    row = ",".join(f"{name} x" for name in columns.split(","))
    found, _ = predicted(tmp_path, "in.csv", f"{columns}\n{row}\n", "out.csv")
    assert found == [[*columns.split(","), *added], [*row.split(","), "text", "0.333333"]]
    (record,), _ = predicted(tmp_path, "in.csv", f"{columns}\n{row}\n", "out.jsonl")
    assert list(record) == ["line", *columns.split(","), *added, "probabilities"]
    assert [record[name] for name in added] == ["text", 0.333333]


def test_columns_of_json_lines_and_of_parquet_keep_order_and_type(tmp_path):
    content = '{"n": 1, "text": "a b", "list": [1]}\n{"text": "c", "more": true}\nnot json\n'
    found, _ = predicted(tmp_path, "in.jsonl", content, "out.parquet")
    assert found == [
        ["n", "text", "list", "more", "label", "confidence", "error"],
        [1, "a b", "[1]", None, "a", 0.333333, None],
        [None, "c", None, True, "c", 0.333333, None],
        [None, "not json", None, None, None, None, found[3][-1]],
    ]
    kinds = pa.schema([("when", pa.timestamp("ms")), ("text", pa.string()), ("tags", pa.list_(pa.string()))])
    source = pa.Table.from_pylist([{"when": 5, "text": "a b", "tags": ["x"]}, {"when": None, "text": ""}], kinds)
    pq.write_table(source, tmp_path / "in.parquet")
    predict_file(Namer(), TextFile(tmp_path / "in.parquet", "sequence"), tmp_path / "again.parquet")
    again = pq.read_table(tmp_path / "again.parquet")
    assert again.column_names == ["when", "text", "tags", "label", "confidence", "error"]
    assert again.select(["when", "text", "tags"]).equals(source)
    predict_file(Namer(), TextFile(tmp_path / "in.parquet", "sequence"), tmp_path / "again.jsonl")
    assert lines(tmp_path / "again.jsonl")[0]["when"].startswith("1970-01-01")


def test_names_of_classes_and_large_numbers_are_texts_in_parquet(tmp_path):
    tags = datasets.ClassLabel(names=["en", "es"])
    features = {"text": datasets.Value("string"), "tags": datasets.List(tags), "class": tags}
    rows = [{"text": "a", "tags": [0, 1], "class": 1}, {"text": "b", "tags": [], "class": 0}]
    source = datasets.Dataset.from_list(rows, datasets.Features(features))
    source.to_parquet(tmp_path / "in.parquet")
    predict_file(Namer(), TextFile(tmp_path / "in.parquet", "sequence"), tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["tags"], row["class"]) for row in found] == [(["en", "es"], "es"), ([], "en")]
    content = f'{{"text": "a", "n": {2**53 + 1}, "m": 1}}\n{{"text": "b", "n": 0.5, "m": 0.5}}\n'
    (_, *rows), _ = predicted(tmp_path, "in.jsonl", content, "out.parquet")
    assert [row[1:3] for row in rows] == [["9007199254740993", 1.0], ["0.5", 0.5]]


def test_a_workbook_holds_every_digit(tmp_path):
    pytest.importorskip("openpyxl")
    content = f'{{"text": "a", "id": {10**18 + 1}, "n": 7}}\n{{"text": "b", "id": {-(10**15) - 1}, "n": NaN}}\n'
    (_, *rows), _ = predicted(tmp_path, "in.jsonl", content, "out.xlsx")
    assert [row[1:3] for row in rows] == [["1000000000000000001", 7], ["-1000000000000001", None]]


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path, capsys):
    content = '{"text": "a", "n": NaN, "list": [1, {"m": -Infinity}]}\n'
    predicted(tmp_path, "in.jsonl", content, "out.jsonl")
    print_file(Namer(), TextFile(tmp_path / "in.jsonl", "sequence"), True, 32)
    for text in ((tmp_path / "out.jsonl").read_text(), capsys.readouterr().out):
        row = json.loads(text, parse_constant=pytest.fail)
        assert (row["n"], row["list"]) == (None, [1, {"m": None}])
    (_, row), _ = predicted(tmp_path, "in.jsonl", content, "out.csv")
    assert row[2] == '[1, {"m": null}]'


def test_a_file_is_what_its_format_says_whatever_its_name(tmp_path):
    (tmp_path / "in.parquet").write_text('{"text": "a b"}\n')
    source = TextFile(tmp_path / "in.parquet", "sequence", "jsonl")
    predict_file(Echo(source), source, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").column("label").to_pylist() == ["a"]


def test_what_parquet_cannot_hold_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a\n")
    model = Namer()
    model.predict = lambda texts, batch_size: [Prediction(1, {1: 1 / 3})]
    monkeypatch.setattr(files, "_as_text", lambda cell: cell)
    with pytest.raises(DataError) as caught:
        predict_file(model, TextFile(tmp_path / "in.txt", "sequence"), tmp_path / "out.parquet")
    assert caught.value.code == "parquet-limit"
    assert not (tmp_path / "out.parquet").exists()


def test_words_in_rows_of_their_own_are_answered_row_by_row(tmp_path):
    content = "word,tag,n\nhoy,x,1\ngreat,y,2\n\nel,x,3\n<EOS>,,\n"
    found, report = predicted(tmp_path, "in.csv", content, "out.csv", "token")
    assert found == [
        ["word", "tag", "n", "label", "confidence"],
        ["hoy", "x", "1", "hoy", "0.5"],
        ["great", "y", "2", "great", "0.5"],
        ["", "", "", "", ""],
        ["el", "x", "3", "el", "0.5"],
        ["<EOS>", "", "", "", ""],
    ]
    assert report.rows == 2
    found, _ = predicted(tmp_path, "in.csv", "words\nhoy great\n", "out.csv", "token")
    assert found == [["words", "label", "confidence"], ["hoy great", "hoy great", "0.5 0.5"]]
    found, _ = predicted(tmp_path, "in.conll", "hoy\tx\ngreat\ty\n\nel\tx\n", "out.csv", "token")
    assert found[0] == ["text", "word", "label", "confidence"]
    assert [row[:3] for row in found[1:]] == [["1", "hoy", "hoy"], ["1", "great", "great"], ["2", "el", "el"]]
    found, _ = predicted(tmp_path, "in.conll", "hoy\tx\ngreat\ty\n\nel\tx\n", "out.csv")
    assert found == [["text", "label", "confidence"], ["hoy great", "hoy", "0.333333"], ["el", "el", "0.333333"]]
    found, _ = predicted(tmp_path, "in.txt", "a b\n\nc\n", "out.tsv")
    assert found == [["text", "label", "confidence", "error"], ["a b", "a", "0.333333", ""],
                     ["", "", "", "the text is empty"], ["c", "c", "0.333333", ""]]  # fmt: skip


@given(
    st.lists(st.lists(st.text(alphabet='ab ,"\n\r\t;é', max_size=5), min_size=2, max_size=2), min_size=1, max_size=6)
)
@settings(max_examples=60, deadline=None)
def test_every_cell_of_a_table_comes_back(tmp_path_factory, cells):
    folder = tmp_path_factory.mktemp("cells")
    with (folder / "in.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["text", "more"], *cells])
    predict_file(Namer(), TextFile(folder / "in.csv", "sequence"), folder / "out.csv")
    head, *rows = table(folder / "out.csv")
    assert head[:4] == ["text", "more", "label", "confidence"]
    assert [row[:2] for row in rows] == cells


@pytest.mark.parametrize("ending", [".xls", ".ods", ".gz", ".conll"])
def test_an_ending_that_cannot_be_written_is_refused(tmp_path, ending):
    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(DataError) as caught:
        predict_file(Namer(), TextFile(tmp_path / "in.txt", "sequence"), tmp_path / f"out{ending}")
    assert (caught.value.code, caught.value.fields["ending"]) == ("output-format", ending)


def test_a_workbook_needs_its_extra_and_has_limits(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a" * 40_000)
    source = TextFile(tmp_path / "in.txt", "sequence")
    if importlib.util.find_spec("openpyxl"):
        with pytest.raises(DataError) as caught:
            predict_file(Namer(), source, tmp_path / "out.xlsx")
        assert caught.value.code == "workbook-limit"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtraError) as missing:
        predict_file(Namer(), source, tmp_path / "out.xlsx")
    assert missing.value.fields == {"extra": "excel"}

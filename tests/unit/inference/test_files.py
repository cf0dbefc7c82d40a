"""Files: in order, in bounded memory, nothing half-written."""

import json

import pytest

from tokmask_peft.data.readers import TextFile
from tokmask_peft.errors import DataError, ModelError
from tokmask_peft.inference import files
from tokmask_peft.inference.export import check_folder, check_output
from tokmask_peft.inference.files import predict_file
from tokmask_peft.tasks import Prediction


class Echo:
    """Stands in for a classifier; notes how far the file was read at each call."""

    def __init__(self, source, fail_after=None):
        self.source, self.calls, self.fail_after = source, [], fail_after

    def predict(self, texts, batch_size):
        self.calls.append((len(texts), self.source.done))
        if self.fail_after is not None and len(self.calls) > self.fail_after:
            raise DataError("stop")
        return [Prediction(text.split()[0], {"a": 1 / 3}) for text in texts]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_keep_their_order_and_bad_ones_their_place(tmp_path, classifier):
    model = classifier("bert", "token")
    rows = ['{"words": "hoy great"}', "nonsense", '{"words": ["mañana"]}', '{"words": []}']
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    report = predict_file(model, TextFile(tmp_path / "in.jsonl", "token"), tmp_path / "out.jsonl", batch_size=2)
    found = lines(tmp_path / "out.jsonl")
    assert [row["line"] for row in found] == [1, 2, 3, 4]
    assert [sorted(row) for row in found[1::2]] == [["error", "line"]] * 2
    (answer,) = model.predict([["hoy", "great"]])
    assert (found[0]["words"], found[0]["labels"]) == (["hoy", "great"], list(answer.labels))
    assert found[0]["probabilities"][1] == pytest.approx(answer.probabilities[1], abs=1e-5)
    assert found[2]["words"] == ["mañana"]
    assert (report.rows, report.unreadable, [p.problem for p in report.problems][1]) == (4, 2, "the text is empty")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_long_file_is_read_a_chunk_ahead_and_no_further(tmp_path):
    path = tmp_path / "in.txt"
    with path.open("w") as file:
        for number in range(100_000):
            file.write(f"word{number} and some more\n")
    source = TextFile(path, "sequence")
    model, sizes = Echo(source), []

    def progress(report):
        sizes.append(report.rows)

    report = predict_file(model, source, tmp_path / "out.jsonl", batch_size=16, progress=progress)
    assert report.rows == 100_000
    chunk = 16 * files.CHUNK_BATCHES
    assert max(size for size, _ in model.calls) == chunk
    width = source.total / 100_000
    for number, (_, done) in enumerate(model.calls, start=1):
        assert done <= (number * chunk + 1) * width * 1.2
    assert sizes == sorted(sizes)
    with (tmp_path / "out.jsonl").open() as file:
        for number, line in enumerate(file):
            assert json.loads(line)["label"] == f"word{number}"
    assert number == 99_999


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
    ]:
        with pytest.raises(DataError) as caught:
            check_output(tmp_path / out, tmp_path / "in.txt", force)
        assert (caught.value.code, caught.value.fields) == (code, {"path": tmp_path / out})
    for folder, code in ((tmp_path, "folder-taken"), (tmp_path / "no" / "folder", "folder-not-writable")):
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

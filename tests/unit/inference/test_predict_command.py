"""`tokmask predict`: files, pipes, and hints that name its own options."""

import csv
import io
import json
import os
import threading
from functools import partial

import pytest
from typer.testing import CliRunner

from tokmask_peft.cli import app
from tokmask_peft.cli.app import open_texts
from tokmask_peft.data.readers import TextFile
from tokmask_peft.errors import DataError


def predict(folder, *arguments, given=None):
    return CliRunner().invoke(app, ["predict", *map(str, (folder, *arguments))], input=given)


def test_csv_in_csv_out_and_the_same_from_a_pipe(saved_adapter, tmp_path):
    folder = saved_adapter()
    (tmp_path / "in.csv").write_text("id,text\n1,hoy great\n2,muy malo\n3\n")
    done = predict(folder, "--file", tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    assert done.exit_code == 0, done.output
    rows = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert rows[0] == ["id", "text", "label", "confidence", "error"]
    assert [row[:2] for row in rows[1:]] == [["1", "hoy great"], ["2", "muy malo"], ["3", ""]]
    assert "in.csv:4: 1 columns" in done.stderr
    piped = predict(folder, "-", "--format", "csv", "--out", tmp_path / "piped.csv", given="id,text\n1,hoy great\n")
    assert piped.exit_code == 0, piped.output
    assert (tmp_path / "piped.csv").read_text().splitlines()[1] == ",".join(rows[1][:4])
    printed = predict(folder, "--file", tmp_path / "in.csv")
    label, confidence = rows[1][2:4]
    assert printed.stdout.splitlines() == [
        f"{label}\t{float(confidence):.4f}\thoy great",
        "\t".join([rows[2][2], f"{float(rows[2][3]):.4f}", "muy malo"]),
        "\t\t",
    ]


@pytest.mark.parametrize("arguments", [(), ("-",), ("--file", "-")])
def test_standard_input_is_a_text_per_line(saved_adapter, arguments):
    done = predict(saved_adapter(), *arguments, "--json", given="hoy great\n\nmañana\n")
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["line"], row.get("text")) for row in found] == [(1, "hoy great"), (2, None), (3, "mañana")]
    assert "unreadable: stdin:2: the text is empty" in done.stderr


ASKED = {"format": "auto", "text_column": None, "header": "auto", "group_column": None}
NUMBERED = "header: false, text_column: 1, group_column: 0"


@pytest.mark.parametrize(
    ("data", "task", "name", "content", "texts"),
    [
        ("text_column: post", "sequence", "in.csv", "text,post\na,la casa\nb,azul\n", ["la casa", "azul"]),
        ("text_column: post", "sequence", "in.csv", "id,text\n1,la casa\n", ["la casa"]),
        ("header: false, text_column: 1", "sequence", "in.tsv", "1\tla casa\n2\tazul\n", ["la casa", "azul"]),
        ("text_column: 2", "sequence", "in.csv", "text,a,b\nla casa,1,2\n", ["la casa"]),
        ("format: conll", "token", "in.tsv", "la\ncasa\n\nazul\n", ["la casa", "azul"]),
        ("text_column: word", "token", "in.csv", "s,word,text\n1,la,x\n1,casa,y\n2,azul,z\n", ["la casa", "azul"]),
        ("format: tagged", "token", "in.txt", "and/or la\n", ["and/or la"]),
        (NUMBERED, "token", "in.csv", "1,hola\n1,this\n2,muy\n", ["hola this", "muy"]),
        (NUMBERED, "token", "in.csv", "1,hola this\n2,muy\n", ["hola this", "muy"]),
        (NUMBERED, "token", "in.csv", "id,text\n1,hola this\n2,muy\n", ["hola this", "muy"]),
        ("text_column: word, group_column: s", "token", "in.csv", "t,s,word\n1,1,la\n1,1,a\n2,2,b\n", ["la a", "b"]),
        ("text_column: word, group_column: s", "token", "in.csv", "s,word\n1,la casa\n1,azul\n", ["la casa", "azul"]),
    ],
)  # fmt: skip
def test_what_the_command_leaves_open_is_as_in_the_run_s_data(tmp_path, data, task, name, content, texts):
    run = f"name: a\nmodel: {{backbone: b}}\ndata: {{path: ., task: {task}, {data}}}\n"
    (tmp_path / "recipe.yaml").write_text(run)
    (tmp_path / name).write_text(content)
    source = open_texts(str(tmp_path), ASKED, partial(TextFile, tmp_path / name, task))
    assert [one.string for one in source] == texts


def test_a_file_without_columns_names_none(tmp_path):
    run = "name: a\nmodel: {backbone: b}\ndata: {path: ., task: sequence, text_column: post}\n"
    (tmp_path / "recipe.yaml").write_text(run)
    for name, content, said in (("in.txt", "la casa\n", False), ("in.csv", "a,post\nx,la casa\n", True)):
        (tmp_path / name).write_text(content)
        source = open_texts(str(tmp_path), ASKED, partial(TextFile, tmp_path / name, "sequence"))
        assert [one.string for one in source] == ["la casa"]
        assert any("column post" in one.choice for one in source.decisions) is said


def test_if_neither_fits_the_error_is_about_the_file(tmp_path):
    run = "name: a\nmodel: {backbone: b}\ndata: {path: ., task: sequence, text_column: post}\n"
    (tmp_path / "recipe.yaml").write_text(run)
    (tmp_path / "in.csv").write_text("a,b\nx,y\n")
    with pytest.raises(DataError, match="no column has a usual name") as caught:
        open_texts(str(tmp_path), ASKED, partial(TextFile, tmp_path / "in.csv", "sequence"))
    assert caught.value.code == "column"


def test_a_model_that_labels_words_reads_the_column_of_whole_texts(saved_adapter, tmp_path):
    (tmp_path / "in.csv").write_text("id,text\n1,hoy great\n2,muy malo\n")
    done = predict(saved_adapter(task="token"), "--file", tmp_path / "in.csv", "--json")
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["words"] for line in done.stdout.splitlines()] == [["hoy", "great"], ["muy", "malo"]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_read_as_a_file(saved_adapter, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_text, args=("hoy\nmañana\n",))
    writing.start()
    done = predict(saved_adapter(), "--file", pipe)
    writing.join()
    assert [line.split("\t")[2] for line in done.stdout.splitlines()] == ["hoy", "mañana"]


@pytest.mark.parametrize(
    ("content", "options", "flag"),
    [
        ("a,b\nx,y\n", (), "Set --column"),
        ("a\tb\n", ("--format", "cvs"), "Set --format"),
        ("1,2\n3,4\n", ("--column", "words"), "set --header=true"),
        ("a\n", ("--encoding", "utf-99"), "--encoding: expected auto or a codec of Python. Found 'utf-99'"),
    ],
)
def test_hints_name_the_options_of_the_command(saved_adapter, tmp_path, content, options, flag):
    (tmp_path / "in.csv").write_text(content)
    options = ("--header", "false", *options) if "1" in content else options
    done = predict(saved_adapter(), "--file", tmp_path / "in.csv", *options)
    assert done.exit_code == 2
    assert flag in done.stderr
    assert "data." not in done.stderr


def test_wrong_usage_is_found_before_a_model_is_loaded(saved_adapter, tmp_path):
    folder = saved_adapter()
    (tmp_path / "in.txt").write_text("a\n")
    for options, words in (
        ((), "empty"),
        (("a", "--file", tmp_path / "in.txt"), "TEXT"),
        (("a", "--out", tmp_path / "out.csv"), "--out"),
        (("--file", tmp_path / "in.txt", "--out", tmp_path / "out.xls"), ".xls"),
        (("-", "--format", "a/b"), "Set --format to one of"),
        (("--file", tmp_path), "is a folder"),
    ):
        done = predict(folder, *options, given="a" if "-" in options else None)
        assert (done.exit_code, words in done.stderr) == (2, True), done.output
    assert not (tmp_path / "out.csv").exists()


def test_cells_with_errors_name_the_options_of_the_command(saved_adapter, tmp_path):
    (tmp_path / "in.csv").write_text('id,text\n1,"a" b\n2,c\n')
    done = predict(saved_adapter(), "--file", tmp_path / "in.csv", "--json")
    assert done.exit_code == 0, done.output
    assert "--format=tsv" in done.stdout
    assert "data." not in done.output
    (tmp_path / "in.csv").write_text("id,word,tag\n1,yes,x\n1,,O\n2,no,x\n")
    done = predict(saved_adapter(task="token"), "--file", tmp_path / "in.csv", "--group-column", "id", "--json")
    assert "the word is empty" in done.stdout
    assert "data." not in done.output

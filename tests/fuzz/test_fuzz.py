"""Odd and damaged input through the whole command line, in this process.

Whatever is in a file: no traceback, no command that takes longer than ten seconds, no row lost, one error that names
the file, and exit code 0 only if the work was done. The same inputs every time. `TOKMASK_FUZZ=10 pytest tests/fuzz`
tries ten times as many.
"""

import csv
import functools
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tiny_models import build
from typer.testing import CliRunner

from tokmask_peft.cli import app
from tokmask_peft.data.readers import read_split
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.recipe.loading import SHIPPED, to_yaml
from tokmask_peft.recipe.schema import Recipe, all_fields
from tokmask_peft.study.plan import make_plan
from tokmask_peft.training.train import train

TIMES = int(os.environ.get("TOKMASK_FUZZ", "1"))
WORDS = {"good": ["great", "bueno", "nice"], "bad": ["awful", "malo", "sad"]}
PROGRAM_SECONDS = 10


def tries(count):
    """Return a decorator: this many inputs, or a multiple."""
    limits = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
    chosen = settings(max_examples=count * TIMES, derandomize=True, **limits)
    return lambda test: pytest.mark.timeout(300 * TIMES)(chosen(test))


@functools.cache
def trained(task):
    """Train a tiny run of a task, with its checkpoints; return its folder."""
    root = Path(tempfile.mkdtemp(prefix="fuzz"))
    model, tokenizer = build("bert")
    model.base_model.save_pretrained(root / "backbone")
    tokenizer.save_pretrained(root / "backbone")
    for split, count in {"train": 24, "validation": 8, "test": 8}.items():
        rows = [(f"{WORDS[label][n % 3]} hoy {split} {n}", label) for n in range(count // 2) for label in WORDS]
        text = "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *rows])
        if task == "token":
            text = "\n".join("".join(f"{word}\t{label}\n" for word in text.split()) for text, label in rows)
        (root / f"{split}.{'tsv' if task == 'sequence' else 'conll'}").write_text(text)
    recipe = {
        "name": task,
        "output_dir": str(root),
        "model": {"backbone": str(root / "backbone"), "quantization": "none", "precision": "fp32"},
        "adapter": {"r": 2, "targets": ["query"]},
        "data": {"task": task, "path": str(root), "max_length": 40},
        "training": {"epochs": 2, "batch_size": 8, "logging_steps": 1, "baseline": False},
    }
    return train(Recipe.model_validate(recipe), quiet=True).folder.root


def command(*arguments, about=None):
    """Run a command as a user does; return its exit code and what it printed."""
    began = time.process_time()
    found = CliRunner().invoke(app, [str(part) for part in arguments])
    took = time.process_time() - began
    said = f"{arguments}: {found.output[-3000:]}"
    assert found.exception is None or isinstance(found.exception, SystemExit), said
    assert "Traceback" not in found.output, said
    assert took < PROGRAM_SECONDS, f"{took:.0f} s: {said}"
    assert found.exit_code in (0, 2), said
    if found.exit_code and about is not None:
        assert found.stderr.startswith("Error: "), said
        assert str(about) in found.stderr or "cannot be loaded from" in found.stderr, said  # another file, named in it
    return found


ODD = ["", "\x00", "null", "-1", "1e999", "[" * 3000, "9" * 5000, "\ud800", "../x", "ñ" * 300, "\x1b[2J"]
BYTES = [b"\x00", b"\xff\xfe", b'"', b"\n", b"\r", b"\t", b"{", b"\xed\xa0\x80"]
WEIRD = st.sampled_from(ODD)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.text(max_size=12), WEIRD,
    st.just([]), st.just({}), st.just([[]]), st.just({"a": 1}), st.just(["a", 1, None]),
)  # fmt: skip


@st.composite
def edited(draw, tree):
    """Return a JSON tree with one part replaced, removed or added."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    tree = tree.copy()
    key = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
    kind = draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "add"]))
    if kind == "deeper":
        tree[key] = draw(edited(tree[key]))
    elif kind == "remove":
        del tree[key]
    elif isinstance(tree, dict):
        tree[draw(st.text(max_size=8))] = draw(VALUES)
    else:
        tree.append(draw(VALUES))
    return tree


@st.composite
def spoiled(draw, content):
    """Return bytes that were cut, overwritten or mixed up."""
    kind = draw(st.sampled_from(["cut", "insert", "overwrite", "repeat", "noise"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    odd = draw(st.sampled_from(BYTES) | st.binary(max_size=9))
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + odd + content[place:]
    if kind == "overwrite":
        return content[:place] + odd + content[place + len(odd) :]
    return content[:place] + content if kind == "repeat" else odd


def spoil(data, path):
    """Damage a file in some way: its content, its place or its kind."""
    kind = data.draw(st.sampled_from(["bytes", "bytes", "tree", "tree", "tree", "gone", "folder", "pipe"]), path.name)
    content = path.read_bytes()
    if kind == "tree" and path.suffix in (".json", ".yaml"):
        tree = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
        text = json.dumps(data.draw(edited(tree)))  # which is YAML, too
        return path.write_text(text.encode("utf-8", "replace").decode())
    path.unlink()
    if kind == "folder":
        return path.mkdir()
    if kind == "pipe":
        return os.mkfifo(path)
    return path.write_bytes(data.draw(spoiled(content))) if kind != "gone" else None


def some(names, most):
    """Return one or several of these names."""
    return st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=most, unique=True)


def copied(folder, place, *without):
    """Return a copy of a folder."""
    return Path(shutil.copytree(folder, Path(place) / folder.name, ignore=shutil.ignore_patterns(*without)))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=30)
CELL = st.one_of(TEXT, st.sampled_from(['a "quoted" word', "a,b;c\td", "[1, 2]", "null", "x" * 3000, "¿qué? 😀", '"']))


def as_file(kind, texts, labels=None):
    """Return the content of a file of a kind with these texts, and labels in turn if any are given."""
    rows = [{"text": text, **({"label": labels[number % 2]} if labels else {})} for number, text in enumerate(texts)]
    if kind == "txt":
        return "".join(f"{text}\n" for text in texts)
    if kind == "conll":
        return "\n".join("".join(f"{word}\t{row['label']}\n" for word in row["text"].split()) for row in rows)
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    written = io.StringIO()
    table = csv.writer(written, delimiter="," if kind == "csv" else "\t")
    table.writerows([["id", *rows[0]], *([number, *row.values()] for number, row in enumerate(rows))])
    return written.getvalue()


@tries(800)
@given(
    data=st.data(),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "conll"]),
    task=st.sampled_from(["sequence", "token"]),
    texts=st.lists(CELL, min_size=1, max_size=5),
)
def test_labelled_files_are_read_or_refused(data, kind, task, texts):
    content = as_file(kind, texts, ("good", "bad")).encode()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"train.{kind}"
        file.write_bytes(data.draw(spoiled(content)))
        try:
            found = read_split(SourceConfig(path=str(file)), "train", task)
        except DataError as error:
            found = str(error)
        assert found if isinstance(found, list) else str(file) in found


@tries(30)
@given(st.data(), st.sampled_from(["txt", "csv", "tsv", "jsonl"]), st.lists(CELL, min_size=1, max_size=9))
def test_every_row_of_a_file_has_an_answer(data, kind, texts):
    texts = [f"{number} {' '.join(text.split())}" for number, text in enumerate(texts)]
    content = as_file(kind, texts).encode()
    damaged = data.draw(st.booleans(), "damaged")
    with tempfile.TemporaryDirectory() as place:
        file, out = Path(place) / f"in.{kind}", Path(place) / "out.jsonl"
        file.write_bytes(data.draw(spoiled(content)) if damaged else content)
        done = command("predict", trained("sequence"), "--file", file, "--out", out, about=file)
        assert out.exists() == (done.exit_code == 0)
        assert {path.name for path in Path(place).iterdir()} <= {file.name, out.name}
        if damaged and done.exit_code:
            return
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(("label" in row) != ("error" in row) for row in rows)
        assert damaged or len(rows) == len(texts), done.output


@tries(15)
@given(data=st.data(), task=st.sampled_from(["sequence", "token"]))
def test_labelled_texts_that_are_damaged(data, task):
    kind = "tsv" if task == "sequence" else "conll"
    content = (trained(task).parent / f"test.{kind}").read_bytes()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / f"test.{kind}").write_bytes(data.draw(spoiled(content)))
        done = command("evaluate", trained(task), "--data", place, "--json")
        assert done.exit_code or json.loads(done.stdout)["items"] > 0


@tries(20)
@given(
    texts=st.lists(st.text(max_size=60) | CELL | WEIRD, min_size=1, max_size=4),
    task=st.sampled_from(["sequence", "token"]),
    name=st.sampled_from(["predict", "explain"]),
    size=st.integers(-1, 40),
)
def test_texts_on_the_command_line(texts, task, name, size):
    done = command(name, trained(task), "--json", "--batch-size", size, "--", *texts)
    assert done.exit_code or len(done.stdout.rstrip("\n").split("\n")) == len(texts)


KEYS = [path for path, _ in all_fields()]
OVERRIDE = st.tuples(st.sampled_from(KEYS) | TEXT, st.sampled_from(["=", "=", ".x=", ""]), VALUES.map(str) | TEXT)


@tries(60)
@given(data=st.data(), overrides=st.lists(OVERRIDE.map("".join), max_size=2))
def test_recipes(data, overrides):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "recipe.yaml"
        shutil.copy(SHIPPED / data.draw(st.sampled_from(["quickstart.yaml", "trec/minilm.yaml"])), file)
        if data.draw(st.booleans(), "resolved"):
            file.write_text(to_yaml(Recipe.load("quickstart")))
        if not overrides or data.draw(st.booleans(), "damaged"):
            spoil(data, file)
        assume(not any(text.startswith("-") for text in overrides))
        done = command("validate", file, *overrides, about=file)
        assert done.exit_code or f"{file} is valid" in done.stdout
        command("recipes", "show", file, "--resolved", about=file)


@tries(35)
@given(data=st.data(), task=st.sampled_from(["sequence", "token"]))
def test_adapter_folders(data, task):
    with tempfile.TemporaryDirectory() as place:
        adapter = copied(trained(task) / "adapter", place)
        for name in data.draw(some([path.name for path in adapter.iterdir()], 2)):
            spoil(data, adapter / name)
        done = command("predict", adapter, "great hoy", "--json", about=adapter)
        if done.exit_code == 0:
            (answer,) = map(json.loads, done.stdout.splitlines())
            rows = answer["probabilities"] if task == "token" else [answer["probabilities"]]
            assert all(abs(sum(row.values()) - 1) < 1e-4 for row in rows)


@tries(5)
@given(data=st.data())
def test_checkpoints(data):
    with tempfile.TemporaryDirectory() as place:
        run = copied(trained("sequence"), place, "result.json", "adapter")
        for name in data.draw(some([path.relative_to(run) for path in run.glob("checkpoints/*/*")], 3)):
            spoil(data, run / name)
        done = command("train", run / "recipe.yaml", f"output_dir={place}", "--resume", "--quiet", about=run)
        assert (done.exit_code == 0) == (run / "result.json").is_file() == (run / "adapter").is_dir()
        assert not [path for path in run.iterdir() if path.name.startswith(".")]


@tries(30)
@given(data=st.data(), task=st.sampled_from(["sequence", "token"]))
def test_results(data, task):
    pytest.importorskip("matplotlib")
    with tempfile.TemporaryDirectory() as place:
        run = copied(trained(task), place, "checkpoints")
        names = ["result.json", "result.json", "recipe.yaml", "log.jsonl", "adapter/tokmask.json"]
        spoil(data, run / data.draw(st.sampled_from(names)))
        done = command("report", run, "--no-examples", about=run)
        page = run / "report.html"
        assert page.is_file() == (done.exit_code == 0)
        assert done.exit_code or page.read_text().rstrip().endswith("</html>")


@tries(10)
@given(data=st.data())
def test_sweeps(data):
    pytest.importorskip("matplotlib")
    with tempfile.TemporaryDirectory() as place:
        recipe = str(trained("sequence") / "recipe.yaml")
        plan = make_plan(recipe, [f"output_dir={place}"], p="0,0.1", seeds="2", name="mine")
        plan.folder.mkdir()
        plan.write()
        for cell in plan.cells:
            shutil.copytree(trained("sequence"), plan.folder / cell.name, ignore=shutil.ignore_patterns("checkpoints"))
        names = ["sweep.json", f"{plan.cells[0].name}/result.json", f"{plan.cells[1].name}/predictions.json"]
        spoil(data, plan.folder / data.draw(st.sampled_from(names)))
        done = command("report", plan.folder, about=plan.folder)
        assert (plan.folder / "report" / "report.md").is_file() == (done.exit_code == 0)

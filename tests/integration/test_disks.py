"""A disk that is full or cannot be written: one error, and no half file."""

import contextlib
import re
import resource
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokmask_peft.artifacts import RunFolder
from tokmask_peft.cli import app
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.train import train

UNWRITABLE = "/sys/kernel/tokmask"  # for root, too


@contextlib.contextmanager
def full(limit=3000):
    """Let no file grow beyond this many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_no_half_file_of_any_command(write_recipe, trained, copied, tmp_path):
    recipe, run = write_recipe(), copied(trained())
    texts = tmp_path / "in.txt"
    texts.write_text("great hoy\n" * 200)
    words = ["great"] * 40
    commands = [
        ["predict", run.root, "--file", texts, "--out", tmp_path / "out.jsonl"],
        ["explain", run.root, " ".join(words), "--html", tmp_path / "page.html"],
        ["export", run.root, "--merged", tmp_path / "merged"],
        ["report", run.root, "--no-examples"],
        ["recipes", "copy", "quickstart", tmp_path / "mine.yaml"],
        ["train", recipe, "name=other", "training.max_steps=3"],
    ]
    for command in commands:
        before = files(tmp_path)
        with full(100 if command[0] == "recipes" else 3000):
            done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 2, (command, done.output)
        assert "Error: " in done.stderr
        assert "free some space" in done.stderr or command[0] == "recipes", done.stderr
        other = RunFolder(tmp_path / "runs" / "other")
        assert command[0] == "train" or files(tmp_path) == before, command
    assert not other.finished()
    assert not other.adapter.exists()
    shutil.rmtree(other.root)
    train(Recipe.load(recipe, ["name=other", "training.max_steps=3"]), quiet=True)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "RECIPE", f"output_dir={UNWRITABLE}"],
        ["recipes", "copy", "quickstart", f"{UNWRITABLE}/mine.yaml"],
        ["sweep", "RECIPE", f"output_dir={UNWRITABLE}", "--p", "0", "--seeds", "1"],
        ["init", "TEXTS", "--backbone", "BACKBONE", "--out", f"{UNWRITABLE}.yaml"],
        ["predict", "RUN", "--file", "TEXTS", "--out", f"{UNWRITABLE}.csv"],
        ["explain", "RUN", "great", "--html", f"{UNWRITABLE}.html"],
        ["export", "RUN", "--merged", UNWRITABLE],
        ["report", "RUN", "--out", f"{UNWRITABLE}.html"],
        ["diagnose", "RECIPE", "--out", UNWRITABLE],
        ["robustness", "RUN", "--out", str(Path(UNWRITABLE).parent)],  # which is there
    ],
)
def test_a_place_that_cannot_be_written(write_recipe, tiny_backbone, trained, tmp_path, command):
    texts = tmp_path / "in.csv"
    texts.write_text("text,label\n" + "".join(f"{label} hoy {n},{label}\n" for n in range(20) for label in "ab"))
    given = {"RECIPE": write_recipe(), "TEXTS": texts, "RUN": trained().folder.root, "BACKBONE": tiny_backbone("bert")}
    done = CliRunner().invoke(app, [str(given.get(part, part)) for part in command])
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert command[-1].removeprefix("output_dir=") in done.stderr or UNWRITABLE in done.stderr
    assert re.search("choose another|output_dir", done.stderr), done.stderr
    assert "Errno" not in done.stderr

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from click.testing import Result
from tiny_models import build
from typer.testing import CliRunner

from tokmask_peft import Recipe, train
from tokmask_peft.artifacts import RunFolder
from tokmask_peft.cli import app
from tokmask_peft.data import readers
from tokmask_peft.study import worker

GOOD, BAD = ["great", "bueno", "lindo", "nice", "happy"], ["bad", "malo", "feo", "sad", "awful"]
FILLER = ["today", "hoy", "casa", "work", "amigo", "the", "la", "very", "muy", "phone", "#viernes", "@ana", ":)"]
SPANISH = {"bueno", "lindo", "malo", "feo", "hoy", "casa", "amigo", "la", "muy"}


def make_texts(count: int, seed: int) -> list[tuple[list[str], str]]:
    """Return made-up posts whose label depends on one word."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        label = ("positive", "negative")[number % 2]
        words = draw.choices(FILLER, k=draw.randint(1, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if label == "positive" else BAD))
        texts.append(([*words, f"n{seed}{number}"], label))
    return texts


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """A folder with train, validation and test as TSV (sentiment) and CoNLL (language per word)."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, count) in enumerate({"train": 96, "validation": 32, "test": 40}.items()):
        texts = make_texts(count, seed)
        rows = ["text\tlabel", *(f"{' '.join(words)}\t{label}" for words, label in texts)]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        blocks = [
            "\n".join(
                f"{word}\t{'lang2' if word in SPANISH else 'lang1' if word.isalpha() else 'other'}" for word in words
            )
            for words, _ in texts
        ]
        (folder / f"{split}.conll").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """Return a function that saves a tiny random backbone and gives its folder."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, wide, _ = family.partition("-wide")
            model, tokenizer = build(name, **({"hidden_size": 64, "intermediate_size": 128} if wide else {}))
            made[family] = tmp_path_factory.mktemp(f"tiny-{family}")
            model.base_model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


def recipe_of(root, data, backbone, task="sequence", extra=""):
    """Write a recipe for a tiny run below `root` and return its path."""
    path = root / "recipe.yaml"
    path.write_text(
        f"""
name: tiny
output_dir: {root / "runs"}
model: {{backbone: "{backbone}", quantization: none, precision: fp32}}
adapter: {{r: 4}}
data: {{task: {task}, path: "{data}", format: {"tsv" if task == "sequence" else "conll"}, max_length: 62}}
training: {{epochs: 3, batch_size: 8, learning_rate: 3.0e-3, logging_steps: 1}}
{extra}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def write_recipe(tmp_path, data_folder, tiny_backbone):
    """Return a function that writes a recipe for a tiny run and gives its path."""

    def write(family: str = "bert", task: str = "sequence", extra: str = "") -> Path:
        return recipe_of(tmp_path, data_folder, tiny_backbone(family), task, extra)

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_folder, tiny_backbone):
    """Return a function that trains a tiny run, once in a process; whoever changes its folder takes a copy."""

    runs = {}

    def files(run):
        return {path: path.stat().st_mtime_ns for path in run.folder.root.rglob("*")}

    def make(family: str = "bert", task: str = "sequence", *overrides: str):
        if (key := (family, task, *overrides)) not in runs:
            path = recipe_of(tmp_path_factory.mktemp("trained"), data_folder, tiny_backbone(family), task)
            run = train(Recipe.load(path, list(overrides)), quiet=True)
            runs[key] = run, files(run)
        return runs[key][0]

    yield make
    assert all(files(run) == before for run, before in runs.values()), "a test changed a run: let it take a copy"


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a run to where `write_recipe` puts one of this name."""

    def copy(run, name: str = "tiny") -> RunFolder:
        return RunFolder(shutil.copytree(run.folder.root, tmp_path / "runs" / name))

    return copy


@pytest.fixture(scope="session", autouse=True)
def _estimates(counted_once):
    """Let no run here count what was counted before."""


@pytest.fixture
def few_posts(monkeypatch):
    """Leave 48 posts in each split of the built-in corpus: with MiniLM, to score them all takes longest."""
    every = readers.builtin_examples
    monkeypatch.setattr(readers, "builtin_examples", lambda task, split: every(task, split)[:48])


@pytest.fixture
def forked_workers(monkeypatch):
    """Fork the workers of a sweep, which a user's sweep spawns (as that in tests/unit/study does), in no time."""
    monkeypatch.setattr(worker, "multiprocessing", SimpleNamespace(get_context=lambda _: forked.FORKS))


@pytest.fixture
def begin(tmp_path_factory, tmp_path):
    """Return a function that starts `python` with arguments, and settings of the environment, in a process."""

    started = []

    def start(*arguments: object, **settings: str) -> forked.Python:
        environment = {key: value for key, value in (dict(os.environ) | settings).items() if value}
        started.append(forked.Python.start(arguments, tmp_path, environment, tmp_path_factory.mktemp("said")))
        return started[-1]

    yield start
    for python in started:  # of a test that failed: they would keep the tests from ending
        python.process.kill()


@pytest.fixture
def tokmask(tmp_path, monkeypatch):
    """Return a function that runs the command line in this process."""

    def run(*arguments: object, code: int = 0, input: str | None = None) -> Result:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            done = CliRunner().invoke(app, [str(argument) for argument in arguments], input)
        assert done.exit_code == code, done.output[-5000:] + repr(done.exception)
        return done

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora, from TOKMASK_DATA."""
    return _place("TOKMASK_DATA", "the folder of real corpora")


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """The folder of real tokenizers and configs, from TOKMASK_TOKENIZERS."""
    return _place("TOKMASK_TOKENIZERS", "the folder of the three backbones' tokenizers and configs")


def _place(variable: str, what: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: {what}")
    return Path(os.environ[variable])

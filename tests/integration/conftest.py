import os
import random
from pathlib import Path

import forked
import pytest
from tiny_models import build

GOOD, BAD = ["great", "bueno", "lindo", "nice", "happy"], ["bad", "malo", "feo", "sad", "awful"]
FILLER = ["today", "hoy", "casa", "work", "amigo", "the", "la", "very", "muy", "phone", "#viernes", "@ana", ":)"]
SPANISH = {"bueno", "lindo", "malo", "feo", "hoy", "casa", "amigo", "la", "muy"}


def make_texts(count: int, seed: int) -> list[tuple[list[str], str]]:
    """Return made-up posts whose label hangs on one word."""
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


@pytest.fixture
def write_recipe(tmp_path, data_folder, tiny_backbone):
    """Return a function that writes a recipe for a tiny run and gives its path."""

    def write(family: str = "bert", task: str = "sequence", extra: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"""
name: tiny
output_dir: {tmp_path / "runs"}
model: {{backbone: "{tiny_backbone(family)}", quantization: none, precision: fp32}}
adapter: {{r: 4}}
data: {{task: {task}, path: "{data_folder}", format: {"tsv" if task == "sequence" else "conll"}, max_length: 62}}
training: {{epochs: 3, batch_size: 8, learning_rate: 3.0e-3, logging_steps: 1}}
{extra}
""",
            encoding="utf-8",
        )
        return path

    return write


@pytest.fixture
def begin(tmp_path_factory, tmp_path):
    """Return a function that starts the command line; it gives the process, and what to call to wait for its end."""

    def start(*arguments: object, timeout: float = 280):
        said = tmp_path_factory.mktemp("said")
        files = (said / "stdout", said / "stderr")
        process = forked.command(arguments, tmp_path, {**os.environ, "HF_HUB_OFFLINE": "1"}, *files)
        return process, lambda: forked.ended(process, *files, timeout)

    return start


@pytest.fixture
def tokmask(begin):
    """Return a function that runs the command line in a process of its own."""

    def run(*arguments: object, check: bool = True) -> forked.Finished:
        _, end = begin(*arguments)
        done = end()
        if check:
            assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
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

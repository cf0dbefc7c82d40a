"""A copy of a backbone that can be carried to a machine without a network: in bf16, with the rows that texts need.

    TOKMASK_DATA=FOLDER PYTHONPATH=benchmarks python benchmarks/gpu/small_copy.py shrink MODEL COPY
    python benchmarks/gpu/small_copy.py restore COPY MODEL

Of the embedding it keeps the rows of the sub-tokens in the texts of `KEPT` and of the special tokens. The tokenizer
stays whole, so that it cuts words as before, and `restore` makes a checkpoint with all rows again. In bf16 a run on
these texts is that of the whole model, bit for bit, as long as no row is drawn or made from the others (random tokens,
a typical row); other texts have wrong rows.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

SCORED = ("trec", "afrisenti_twi")
"""Folders of `recipes`, whose texts the part `scores` trains on and scores."""
KEPT = (*SCORED, "ud_tur_deu_lid", "afrisenti_kin", "afrisenti_swa", "afrisenti_tso", "sa_spaeng", "melid_mareng",
        "lid_spaeng")  # fmt: skip
"""These and the folders of the other recipes in `study.py`."""
FILE, ROWS = "model.safetensors", "rows"


def used_ids(model: Path) -> Iterator[int]:
    """Yield the sub-tokens of all texts of `KEPT`; TOKMASK_DATA names the folder of their corpora."""
    from tokmask_peft.data.corpus import load_corpus
    from tokmask_peft.data.encoding import Encoder
    from tokmask_peft.recipe.schema import Recipe

    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in KEPT:
        data = Recipe.load(f"{name}/e5-small", ["data.hygiene=report"]).data.expanded()
        corpus = load_corpus(data, 0)
        texts = [*corpus.train, *corpus.validation, *corpus.test]
        for window in Encoder(tokenizer, data.task, data.max_length).windows([one.text for one in texts]):
            yield from window.ids


def shrink(model: Path, copy: Path, used: Iterable[int]) -> None:
    """Write the files of a model in a new folder, with the rows of its embedding that sub-tokens need."""
    ids = {*used, *AutoTokenizer.from_pretrained(model).all_special_ids}
    rows = torch.tensor(sorted(ids))
    with safe_open(model / FILE, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    embedding = max(weights, key=lambda name: weights[name].numel())
    about = {"format": "pt", "embedding": embedding, "count": str(len(weights[embedding]))}
    weights[embedding] = weights[embedding][rows]
    small = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    copy.mkdir(parents=True)
    save_file({**small, ROWS: rows}, copy / FILE, about)
    _copy_tokenizer(model, copy)


def restore(copy: Path, model: Path) -> None:
    """Write a checkpoint with all rows from what `shrink` made."""
    with safe_open(copy / FILE, "pt") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows, kept = weights.pop(ROWS), weights[about["embedding"]]
    # sub-tokens that no text has get rows of others, so that the usual size of a row is much as before
    whole = kept[torch.arange(int(about["count"])) % len(kept)]
    whole[rows] = kept
    model.mkdir(parents=True)
    save_file({**weights, about["embedding"]: whole}, model / FILE, {"format": "pt"})
    _copy_tokenizer(copy, model)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in (*source.glob("*.json"), *source.glob("*.txt")):
        shutil.copy(file, target)


if __name__ == "__main__":
    source, target = Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[1] == "shrink":
        shrink(source, target, used_ids(source))
    else:
        restore(source, target)

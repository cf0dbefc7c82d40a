"""What a user's own file gets with nothing set: the adapter compared with character n-grams, on ten corpora.

    TOKMASK_DATA=FOLDER TOKMASK_BACKBONES=FOLDER python benchmarks/own_data.py [--only kin,trec] [--sizes 360]
        [--seeds 1,2,3] [--set KEY=VALUE …]

A cell is a corpus, a number of texts and a seed, which draws the texts and moves everything else; the test texts are
the corpus's own, at most 1,000. The rest is as `tokmask train FOLDER` decides on a CPU: the backbone is MiniLM for
English, otherwise multilingual-e5-small, which is `e5-small` below TOKMASK_BACKBONES. `--set` changes keys of a recipe
and makes an arm of its own. Cells that are in `results/own_data.json` are not run again. `studies/page.py` writes the
table of docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokmask_peft import train
from tokmask_peft.artifacts import Run, write_json
from tokmask_peft.cli.start import E5, make_draft
from tokmask_peft.console import quiet_libraries
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.examples import Example
from tokmask_peft.recipe.data import DataConfig
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import get_task
from tokmask_peft.training.environment import environment

RESULT = Path(__file__).parent / "results" / "own_data.json"
CORPORA: dict[str, dict[str, Any]] = {
    **{name: {"task": "sequence", "path": f"afrisenti/{name}"} for name in ("kin", "swa", "tso", "twi")},
    "sentimix": {"task": "sequence", "path": "sentimix_spanglish", "format": "tsv", "validation": 0.1, "test": "dev"},
    "mesent": {"task": "sequence", "path": "mesent_mar_eng_sentiment"},
    "trec": {"task": "sequence", "path": "trec6", "validation": 0.1},
    "melid": {"task": "token", "path": "melid_mar_eng"},
    "sagt-lid": {"task": "token", "path": "ud_tur_deu_sagt"},
    "lince-lid": {"task": "token", "path": "lince_lid_spaeng", "validation": 0.1, "test": "validation"},
}
ENGLISH = ("trec",)
SIZES, TESTED = (360, 1000, 5000), 1000


def write_file(path: Path, examples: Sequence[Example], task: str) -> None:
    """Write texts as JSON lines."""
    text, label = get_task(task).text_columns[0], get_task(task).label_columns[0]
    rows = ({text: example.text, label: example.label} for example in examples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw_files(corpus: str, size: int, seed: int, folder: Path, tested: int = TESTED) -> int:
    """Write `train.jsonl` with texts that a seed draws, and `test.jsonl`; return how many texts there are to learn."""
    found = CORPORA[corpus]
    task, path = found["task"], str(Path(os.environ["TOKMASK_DATA"]) / found["path"])
    read = load_corpus(DataConfig(**found | {"path": path, "hygiene": "report"}), 0)
    own, scored = [*read.train, *read.validation], list(read.test or ())
    size = min(size, len(own))
    write_file(folder / "train.jsonl", random.Random(seed).sample(own, size), task)
    write_file(folder / "test.jsonl", random.Random(0).sample(scored, min(tested, len(scored))), task)
    return size


def missing_cells(path: Path, cells: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield each cell that a file lacks, with a folder to run it in; then write it, with what was added to it."""
    for cell in cells:
        if any(cell.items() <= other.items() for other in cells_of(path)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield cell, Path(folder)
        import torch

        cells_now = [*cells_of(path), cell]  # another process may have added some
        write_json(path, {"cells": cells_now, "environment": environment(torch.device("cpu"))}, indent=1)


def cells_of(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def has_all(path: Path, cell: dict[str, Any]) -> bool:
    """Return whether a smaller size has taken all texts of the corpus, so that this one would repeat it."""
    same = (other for other in cells_of(path) if all(other[key] == cell[key] for key in ("arm", "corpus", "seed")))
    return any(other["texts"] < other["size"] < cell["size"] for other in same)


def run_cell(corpus: str, size: int, seed: int, changes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train on a folder with `size` texts as `tokmask train FOLDER` would; return the scores."""
    texts = draw_files(corpus, size, seed, folder)
    place = [f"model.backbone={E5}", f"model.backbone_path={os.environ['TOKMASK_BACKBONES']}/e5-small"]
    given = [*(place if corpus not in ENGLISH else ()), "name=run", f"output_dir={folder}", f"seed={seed}", *changes]
    return train_and_measure(make_draft([folder], given, [], yes=True).recipe)[0] | {"texts": texts}


def train_and_measure(recipe: Recipe) -> tuple[dict[str, Any], Run]:
    """Train; return the scores of a cell, and the run."""
    start, cpu = time.perf_counter(), time.process_time()
    run = train(recipe, quiet=True)
    result = run.result
    baseline, probe = result.baseline or {}, result.probe or {}
    return {
        "f1_macro": result.scored["f1_macro"],
        "accuracy": result.scored["accuracy"],
        "floor": baseline["f1_macro"],
        "interval": baseline["interval"],
        "verdict": baseline["verdict"],
        "probe": probe.get("f1_macro"),
        "constant": any(warning["code"] == "one-label" for warning in result.warnings),
        "warnings": [warning["code"] for warning in result.warnings],
        "decided": {one["what"]: one["choice"] for one in result.decisions},
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }, run


def main() -> None:
    """Run the cells that are missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default=",".join(CORPORA), help="corpora")
    options.add_argument("--sizes", default=",".join(map(str, SIZES)))
    options.add_argument("--seeds", default="1,2,3")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of an arm of its own")
    options.add_argument("--out", type=Path, default=RESULT)
    given = options.parse_args()
    quiet_libraries()
    sizes, seeds = ([int(part) for part in text.split(",")] for text in (given.sizes, given.seeds))
    wanted = itertools.product(seeds, sizes, given.only.split(","))
    arm = " ".join(sorted(given.set))
    cells = ({"arm": arm, "corpus": corpus, "size": size, "seed": seed} for seed, size, corpus in wanted)
    for cell, folder in missing_cells(given.out, (cell for cell in cells if not has_all(given.out, cell))):
        corpus, size, seed = cell["corpus"], cell["size"], cell["seed"]
        cell |= run_cell(corpus, size, seed, given.set, folder)
        print(f"{cell['arm']} {corpus} {size} {seed}: {cell['f1_macro']:.3f}, floor {cell['floor']:.3f}", flush=True)


if __name__ == "__main__":
    main()

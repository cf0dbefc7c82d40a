"""Which backbone to take: MiniLM, multilingual-e5-small and Gemma 3 270M in 4 bits, on 1,000 texts of four corpora.

    TOKMASK_DATA=FOLDER TOKMASK_BACKBONES=FOLDER python benchmarks/backbones.py [--only trec,twi] [--backbones minilm]
        [--seeds 1,2,3] [--texts 1000] [--set KEY=VALUE …] [--out FILE]

A cell is a corpus, a backbone and a seed, which draws the texts and, of these, 15% for validation; the test texts are
the corpus's own, at most 1,000. Everything else is as in `recipes/_backbones`. e5-small and gemma-270m are folders
below TOKMASK_BACKBONES; MiniLM is a Python package. Each cell runs in a process of its own, whose highest memory it
reports. Cells that are in `results/backbones.json` are not run again, so it can be stopped and started at any time.
`--set` and `--texts` are for trying it out: give another `--out` with them. `studies/page.py` writes the table of
docs/backbones.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from own_data import CORPORA, draw_files, missing_cells, train_and_measure

from tokmask_peft.console import quiet_libraries

RESULT = Path(__file__).parent / "results" / "backbones.json"
RECIPES = Path(__file__).parent.parent / "recipes" / "_backbones"
TEXTS = 1000
BACKBONES = {
    "minilm": ("minilm.yaml", "{}"),
    "e5-small": ("e5-small.yaml", "{backbone_path: FOLDER}"),
    "gemma-270m": ("gemma3-270m.yaml", "{backbone_path: FOLDER, quantization: nf4}"),
}
"""The shipped settings, and what else they need, by the name of the folder below TOKMASK_BACKBONES."""
COMPARED = {"trec": "", "twi": "", "sentimix": "", "lince-lid": "label_map: {lang1: lang1, lang2: lang2, '*': other}"}
"""Corpora, with keys of `data` as in recipes/_tasks."""


def run_cell(corpus: str, backbone: str, seed: int, texts: int, changes: list[str], folder: Path) -> dict[str, Any]:
    """Train on `texts` texts; return scores and costs."""
    quiet_libraries()
    from decoders import add_head_for_words

    from tokmask_peft.recipe.loading import load_recipe

    if backbone == "gemma-270m":
        add_head_for_words()
    texts, recipe = draw_files(corpus, texts, seed, folder), folder / "recipe.yaml"
    keys = f"task: {CORPORA[corpus]['task']}, path: {folder}, validation: 0.15, test: test, {COMPARED[corpus]}"
    place, (base, model) = Path(os.environ.get("TOKMASK_BACKBONES", "")) / backbone, BACKBONES[backbone]
    recipe.write_text(
        f"base: {RECIPES / base}\nname: run\noutput_dir: {folder}\nseed: {seed}\n"
        f"model: {model.replace('FOLDER', str(place))}\n"
        f"data: {{{keys}}}\n",
        encoding="utf-8",
    )
    cell, run = train_and_measure(load_recipe(recipe, changes))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return cell | {
        "texts": texts,
        "adapter_bytes": sum(file.stat().st_size for file in run.folder.adapter.rglob("*") if file.is_file()),
        "peak_bytes": 1024 * int(peak[1]) if peak else None,
    }


def main() -> None:
    """Run the cells that are missing."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default=",".join(COMPARED), help="corpora")
    options.add_argument("--backbones", default=",".join(BACKBONES))
    options.add_argument("--seeds", default="1,2,3")
    options.add_argument("--texts", type=int, default=TEXTS)
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    options.add_argument("--out", type=Path, default=RESULT)
    given = options.parse_args()
    if given.out == RESULT and (given.set or given.texts != TEXTS):
        options.error("--set and --texts change what is measured: give another --out")
    wanted = itertools.product(map(int, given.seeds.split(",")), given.backbones.split(","), given.only.split(","))
    cells = ({"corpus": corpus, "backbone": backbone, "seed": seed} for seed, backbone, corpus in wanted)
    for cell, folder in missing_cells(given.out, cells):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            what = cell["corpus"], cell["backbone"], cell["seed"]
            cell |= pool.submit(run_cell, *what, given.texts, given.set, folder).result()
        print(*what, f"{cell['f1_macro']:.3f}, {cell['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

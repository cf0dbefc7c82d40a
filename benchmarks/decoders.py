"""What a decoder gains from labels on a word's last sub-token, and from seeing the whole text: Gemma 3 270M in 4 bits.

    TOKMASK_DATA=FOLDER TOKMASK_BACKBONES=FOLDER python benchmarks/decoders.py [--only lince-lid] [--seeds 1,2,3]

A cell is a corpus, a seed and an arm. The seed draws 500 texts, 75 of them for validation; the test texts are 400 of
the corpus's own. Three epochs, to be affordable on a CPU; all else is as in recipes/_backbones/gemma3-270m.yaml. The
backbone is `gemma-270m` below TOKMASK_BACKBONES. transformers has no head for words on Gemma 3: this file makes one,
as for its other decoders. Cells that are in `results/decoders.json` are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from own_data import draw_files, missing_cells
from transformers import AutoModelForTokenClassification, Gemma3TextConfig
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.gemma3.modeling_gemma3 import Gemma3PreTrainedModel

from tokmask_peft import train
from tokmask_peft.console import quiet_libraries
from tokmask_peft.model.families import FAMILIES
from tokmask_peft.recipe.loading import load_recipe

RESULT = Path(__file__).parent / "results" / "decoders.json"
BACKBONE = Path(__file__).parent.parent / "recipes" / "_backbones" / "gemma3-270m.yaml"
TEXTS, TESTED, COLUMNS = 500, 400, ("f1_macro", "accuracy", "cpu_seconds")
LABELS = {"lince-lid": "label_map: {lang1: lang1, lang2: lang2, '*': other}"}
"""As in recipes/_tasks/lid_spaeng.yaml; other corpora keep all labels."""
ARMS = {
    "causal, first": ["data.label_on=first"],
    "causal, last": ["data.label_on=last"],
    "bidirectional, last": ["data.label_on=last", "model.attention=bidirectional"],
}


class Gemma3TextForTokenClassification(GenericForTokenClassification, Gemma3PreTrainedModel):  # type: ignore[misc]
    """Gemma 3 with a head for words."""

    config_class = Gemma3TextConfig


def add_head_for_words() -> None:
    """Let transformers load Gemma 3 with a head for words, and pack its texts, as it does with the head for texts."""
    FAMILIES["Gemma3Text"] = replace(FAMILIES["Gemma3Text"], package=__name__)
    AutoModelForTokenClassification.register(Gemma3TextConfig, Gemma3TextForTokenClassification, exist_ok=True)


def run_cell(corpus: str, seed: int, changes: list[str], folder: Path) -> dict[str, Any]:
    """Train on 500 texts; return the scores."""
    draw_files(corpus, TEXTS, seed, folder, TESTED)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"base: {BACKBONE}\nname: run\noutput_dir: {folder}\nseed: {seed}\n"
        f"model: {{backbone_path: {os.environ['TOKMASK_BACKBONES']}/gemma-270m, quantization: nf4}}\n"
        "training: {epochs: 3, baseline: false, eval_batch_size: 16}\n"
        f"data: {{task: token, path: {folder}, validation: 0.15, test: test, {LABELS.get(corpus, '')}}}\n",
        encoding="utf-8",
    )
    start, cpu = time.perf_counter(), time.process_time()
    result = train(load_recipe(recipe, changes), quiet=True).result
    return {
        "f1_macro": result.scored["f1_macro"],
        "accuracy": result.scored["accuracy"],
        "validation": result.validation["f1_macro"],
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Return the mean over seeds of each corpus and arm, with the lowest and highest, as Markdown."""
    lines = ["| corpus | arm | seeds | macro-F1 | accuracy | CPU seconds |", "|" + "---|" * 6]
    for corpus, arm in dict.fromkeys((cell["corpus"], cell["arm"]) for cell in cells):
        rows = [cell for cell in cells if (cell["corpus"], cell["arm"]) == (corpus, arm)]
        score, accuracy, cpu = (statistics.mean(row[key] for row in rows) for key in COLUMNS)
        low, high = (end(row["f1_macro"] for row in rows) for end in (min, max))
        shown = f"{score:.3f} ({low:.3f} to {high:.3f}) | {accuracy:.3f} | {cpu:.0f}"
        lines.append(f"| {corpus} | {arm} | {len(rows)} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are missing, and print all."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="lince-lid", help="corpora, of those of own_data.py with labels on words")
    options.add_argument("--seeds", default="1,2,3")
    given = options.parse_args()
    quiet_libraries()
    add_head_for_words()
    wanted = itertools.product(given.only.split(","), map(int, given.seeds.split(",")), ARMS)
    cells = ({"corpus": corpus, "arm": arm, "seed": seed} for corpus, seed, arm in wanted)
    for cell, folder in missing_cells(RESULT, cells):
        corpus, seed, arm = cell["corpus"], cell["seed"], cell["arm"]
        cell |= run_cell(corpus, seed, ARMS[arm], folder)
        print(f"{corpus} {seed} {arm}: {cell['f1_macro']:.4f}, {cell['seconds']} s", flush=True)
    print(table(json.loads(RESULT.read_text(encoding="utf-8"))["cells"]))


if __name__ == "__main__":
    main()

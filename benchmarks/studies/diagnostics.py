"""The single measurements beside the sweeps: language identification, gradients, robustness, faithfulness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokmask_peft.study.report import markdown, mean_sd, signed
from tokmask_peft.study.statistics import spread


def single_measurements(results: Path) -> list[str]:
    """Return a section for each JSON that is there."""
    parts = {
        "quickstart": _quickstart,
        "main_job": _main_job,
        "lid_spaeng": _language_identification,
        "diagnose_trec": _gradients,
        "robustness_trec": _robustness,
        "faithfulness_trec": _faithfulness,
    }
    found = []
    for name, section in parts.items():
        file = results / f"{name}.json"
        if file.is_file():
            found += section(json.loads(file.read_text(encoding="utf-8")))
    return found


def _quickstart(found: dict[str, Any]) -> list[str]:
    head = ("command", "test macro-F1", "character n-grams", "steps")
    body = [
        [
            f"`{run['command']}`",
            f"{run['test_f1_macro']:.3f}",
            f"{run['baseline_f1_macro']:.3f}",
            str(run["steps"]),
        ]
        for run in found["runs"]
    ]
    return ["## Quickstart", "The built-in corpus of made-up posts, one run each.", markdown((head, body))]


def _main_job(rows: list[dict[str, Any]]) -> list[str]:
    body = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        scores = {
            p: {row["seed"]: row["test_f1_macro"] for row in rows if (row["recipe"], row["p"]) == (recipe, p)}
            for p in (0.0, 0.1)
        }
        floor = spread([row["baseline_f1_macro"] for row in rows if row["recipe"] == recipe])
        changes = [scores[0.1][seed] - scores[0.0][seed] for seed in scores[0.0]]
        cells = [mean_sd(spread(list(scores[p].values()))) for p in (0.0, 0.1)]
        body.append([recipe, f"{floor['mean']:.4f}", *cells, ", ".join(signed(change) for change in changes)])
    head = ("recipe", "character n-grams", "p = 0", "p = 0.1", "difference, seed by seed")
    return [
        "## The recipes as they were, with all their epochs",
        "Test macro-F1, mean ± standard deviation of three seeds, trained by `python benchmarks/main_job.py`. The "
        "recipes then had 0.05 dropout on the adapter's input, which they have no longer.",
        markdown((head, body)),
    ]


def _language_identification(found: dict[str, Any]) -> list[str]:
    rows = [[one["cmi"], f"{one['f1_macro']:.3f}", f"{one['posts']:,}"] for one in found["by_mixing"]]
    return [
        "## Language identification, Spanish-English (LinCE)",
        f"`lid_spaeng/minilm`, one run (seed {found['seed']}, p = {found['p']:g}), development set, all "
        f"{found['test_words']:,} words, {found['without_prediction']} without a prediction: macro-F1 "
        f"{found['test_f1_macro']:.3f}, weighted F1 {found['test_f1_weighted']:.3f}; character n-grams "
        f"{found['baseline_f1_macro']:.3f}. With 0.05 LoRA dropout, which the recipe had then.",
        markdown((("code-mixing index", "macro-F1", "posts"), rows)),
    ]


def _gradients(found: dict[str, Any]) -> list[str]:
    head = (
        "step",
        "p",
        "variance of masks to that of batches",
        "cosine",
        "distance",
        "masks outweigh batches from p =",
    )
    body = []
    for point in found["points"]:
        group = point["groups"]["lora"]
        outweighs = group["outweighs_at"]
        for row in group["rates"]:
            first = row is group["rates"][0]
            body.append(
                [
                    str(point["step"]) if first else "",
                    f"{row['p']:g}",
                    f"{row['ratio']['value']:.2f}",
                    f"{row['cosine']['value']:.2f}",
                    f"{row['distance']['value']:.2f}",
                    _with_interval(outweighs) if first else "",
                ]
            )
    return [
        "## Gradients under masks (TREC)",
        f"`{found['command']}`: {found['batches']} batches of {found['batch_size']}, {found['draws']} mask draws of "
        "each; gradients of the LoRA weights. Cosine and distance are between a batch's gradient averaged over all "
        "masks and its unmasked one, debiased; the distance is in lengths of the unmasked one. The last column has a "
        "95% bootstrap interval over batches (*beyond*: above the highest rate). Trained with 0.05 LoRA dropout.",
        markdown((head, body)),
    ]


def _with_interval(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "none of these"
    low, high = ("beyond" if bound is None else f"{bound:.2f}" for bound in found["interval"])
    return f"{found['value']:.2f} [{low}, {high}]"


def _robustness(found: dict[str, Any]) -> list[str]:
    groups = found["groups"]
    kinds = [(row["kind"], row["at"]) for row in groups[0]["rows"]]
    body = []
    for kind, at in kinds:
        cells = []
        for group in groups:
            row = next(row for row in group["rows"] if (row["kind"], row["at"]) == (kind, at))
            cells.append(f"{row['f1_macro']['mean']:.3f} ± {row['f1_macro']['sd']:.3f}")
        body.append([kind, f"{at:g}" if isinstance(at, float) and at else "", *cells])
    return [
        "## Robustness (TREC)",
        f"`{found['command']}`: test macro-F1, mean ± standard deviation of {len(groups[0]['seeds'])} "
        "seeds. *mask*: that share of sub-tokens masked; *noise*: that share of words misspelt; *seen* and *unseen*: "
        "questions whose words all occur in training, and the others. Trained with 0.05 LoRA dropout.",
        markdown((("test texts", "at", *(f"trained with {group['group']}" for group in groups)), body)),
    ]


def _faithfulness(found: dict[str, Any]) -> list[str]:
    measures = {
        "least_minus_most": "area, least minus most influential first",
        "random_minus_most": "area, random minus most influential first",
        "relative": "relative area",
        "random_fall": "mean fall of the probability under random masks",
    }
    head = ("measure", *(f"p = {run['run']['p']:g} / p = 0 (pair {n})" for n, run in enumerate(found["runs"], 1)))
    body = []
    for key, title in measures.items():
        cells = []
        for pair in found["runs"]:
            one, other, change = (
                pair["run"]["measures"][key],
                pair["against"]["measures"][key],
                pair["difference"][key],
            )
            cells.append(
                f"{one['mean']:.2f} / {other['mean']:.2f} ({change['mean']:+.2f} "
                f"[{change['low']:+.2f}, {change['high']:+.2f}])"
            )
        body.append([title, *cells])
    return [
        "## Faithfulness of word influences",
        f"{found['texts']}. Trained with 0.05 LoRA dropout.",
        markdown((head, body)),
    ]

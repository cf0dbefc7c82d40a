"""Collect the tables of `benchmarks/results/*.json` in one Markdown page: `benchmarks/BENCHMARKS.md`.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path

from workload import RESULTS, markdown

PAGE = Path(__file__).parent / "BENCHMARKS.md"
TITLES = {
    "default_run": "The default run as a whole, beside the tutorials' (CPU seconds of theirs over ours)",
    "padding_free": "Batches without padding",
    "masking": "What masking costs",
    "qlora": "QLoRA bytes and step, shape of Qwen2.5-0.5B, random weights",
    "predict": "Prediction, beside `transformers.pipeline` at its best batch size",
    "predict_file": "Prediction of a file",
    "same_score": "Optimizer steps to the same score, beside the authors' protocol (TREC, MiniLM; not in `make bench`)",
    "same_score_bound": "Optimizer steps to the same score, where the authors' protocol goes on up to ten times ours "
    "(TREC, MiniLM; not in `make bench`)",
    "arms_cost": "CPU time of a step with each regularizer, to that without any (TREC, MiniLM; not in `make bench`)",
    "gpu": "On a GPU (not in `make bench`)",
}


def page() -> str:
    """Return the page."""
    parts = [
        "# Benchmarks",
        "Written by `python benchmarks/tables.py` from the JSON in `benchmarks/results`, which holds every round; "
        "`make bench` measures again, but for what says otherwise. Medians and ranges over rounds that take turns in "
        "one process; CPU time, unless it says otherwise, so that ratios say more than seconds.",
    ]
    for name, title in TITLES.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if "table" not in content:
            continue
        seen = content["environment"]
        texts = content.get("texts", "")
        origin = texts if isinstance(texts, str) else ""
        if isinstance(texts, dict):
            origin = ", ".join(_told(*item) for item in texts.items())
        versions = ", ".join(f"{key} {seen['versions'][key]}" for key in ("torch", "transformers", "peft"))
        parts += [
            f"## {title}",
            markdown(content["table"]),
            f"{versions}; {seen['threads']} thread(s), {seen['device']}{f'; {origin}' if origin else ''}.",
        ]
    return "\n\n".join(parts) + "\n"


def _told(origin: str, texts: dict[str, float]) -> str:
    return f"{origin} (sub-tokens: {texts['mean']:.0f} on average, at most {texts['longest']})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)

"""A made-up run folder, as training leaves one, without training; and what a browser sees of its pages."""

import json
from html.parser import HTMLParser
from pathlib import Path

import yaml

NASTY = '<script>alert("x")</script>'


def part(labels, score=0.61, matrix=None, **more):
    count = len(labels)
    matrix = matrix or [[40 if row == column else row + column for column in range(count)] for row in range(count)]
    return {
        "f1_macro": score,
        "f1_weighted": score + 0.01,
        "accuracy": score + 0.02,
        "items": sum(map(sum, matrix)),
        "without_prediction": 0,
        "per_class": {
            label: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": sum(row)}
            for label, row in zip(labels, matrix, strict=True)
        },
        "confusion": {"labels": list(labels), "matrix": matrix},
        **more,
    }


def calibration_part():
    rows = [{"items": 5, "confidence": 0.55, "accuracy": 0.4}, {"items": 45, "confidence": 0.97, "accuracy": 0.9}]
    figures = {"nll": 0.4321, "ece": 0.0789, "reliability": rows}
    return {"items": 50, "before": figures, "after": {**figures, "ece": 0.0123}}


def result(task="sequence", labels=("bad", "good", NASTY), matrix=None):
    """Return what `result.json` holds; `matrix` has the counts of each true label per predicted label."""
    found = {
        "name": "made-up",
        "task": task,
        "labels": list(labels),
        "seed": 7,
        "validation": part(labels, 0.71, matrix),
        "best_step": 20,
        "steps": 30,
        "test": part(labels, matrix=matrix),
        "calibration": {"temperature": 1.25, "validation": calibration_part(), "test": calibration_part()},
        "baseline": part(labels, 0.51, matrix, method="character n-grams, logistic regression", verdict="beats")
        | {"interval": [0.02, 0.18]},
        "data": {
            "splits": {
                name: {
                    "source": f"/home/someone/private/{name}.tsv",
                    "texts": 1234,
                    "words": 5678,
                    "labels": dict.fromkeys(labels, 411),
                }
                for name in ("train", "validation", "test")
            },
            "truncation": {"train": {"texts_cut": 17, "words_cut": 29}},
            "hygiene": {
                "mode": "remove",
                "duplicates": 31,
                "conflicting": 4,
                "validation_shared": 5,
                "test_shared": 926,
                "validation_in_test": 0,
                "removed_from_train": 87,
                "removed_from_validation": 0,
                "examples": {"train_in_test": [f"a shared text {NASTY}"]},
            },
            "label_map": {"train": {"so-so -> bad": 12, "good -> good": 3}},
            "warnings": [f"a warning {NASTY}"],
        },
        "decisions": [{"what": "device", "choice": "cpu", "reason": f"no GPU {NASTY}"}],
        "speed": {
            "step_seconds": 61.0,
            "steps": 30,
            "tokens_per_second": 595.0,
            "peak_memory": {"bytes": 2**30, "of": "process, resident"},
            "environment": {"versions": {"tokmask-peft": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "threads": 1},
        },
    }
    if task == "token":
        rows = [("0", 0.9), ("0 to 15", 0.8), ("45 to 100", 0.7)]
        found["test"]["by_mixing"] = [
            {"cmi": cmi, "posts": 5, "words": 50, "f1_macro": score, "f1_weighted": score} for cmi, score in rows
        ]
    return found


def log():
    lines = [{"step": step, "loss": 1 / step, "masking_rate": step / 300} for step in range(1, 31)]
    return [*lines, *({"step": step, "eval_loss": 0.5, "eval_f1_macro": step / 50} for step in (10, 20, 30))]


def write_run(folder: Path, found=None, lines=None, task="sequence", masking=0.1) -> Path:
    """Write a run folder whose adapter is a stub."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text("{}")
    recipe = {
        "name": "made-up",
        "seed": 7,
        "model": {"backbone": "someone/tiny-bert"},
        "masking": {"p": masking},
        "data": {"path": "nowhere", "task": task, "max_length": 99},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "result.json").write_text(json.dumps(result(task) if found is None else found))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (log() if lines is None else lines)))
    return folder


class Outline(HTMLParser):
    """Collects what a browser would see of HTML, and complains about tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "br", "input", "link", "img", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

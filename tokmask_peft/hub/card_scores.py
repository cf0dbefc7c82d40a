"""The scores of a model card: tables, the spread over seeds, and the confusion matrix as a picture or a table."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURE = "confusion_matrix.png"
SCORES = ("f1_macro", "f1_weighted", "accuracy")
_TABLE_LABELS = 12  # a wider table is unreadable
_NUMBERED_LABELS = 24  # beyond, the cells of the picture are too small for numbers


def score_table(result: Mapping[str, Any], seeds: Sequence[Mapping[str, float]] = ()) -> str:
    """Return the scores per split, the baseline's, and the spread over seeds.

    Args:
        result: what `result.json` holds.
        seeds: test scores of runs that differ only in their seed, this run's among them.
    """
    rows = ["| split | macro-F1 | weighted F1 | accuracy |", "|---|---|---|---|"]
    names = {"validation": "validation (selected the checkpoint)", "test": "test"}
    if floor := result.get("baseline"):
        names["baseline"] = f"baseline: {floor['method']}"
    for key, name in names.items():
        if part := result.get(key):
            rows.append(f"| {cell(name)} | {' | '.join(f'{part[score]:.4f}' for score in SCORES)} |")
        if key == "test" and len(seeds) > 1:
            spread = " | ".join(_spread([scores[score] for scores in seeds]) for score in SCORES)
            rows.append(f"| test, {len(seeds)} seeds: mean ± standard deviation, 95% interval of the mean | {spread} |")
    return "\n".join(rows)


def _spread(values: Sequence[float]) -> str:
    """Return mean, standard deviation and Student's interval of a few values."""
    from scipy.stats import t  # comes with scikit-learn

    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return f"{mean:.4f} ± {deviation:.4f} [{mean - half:.4f}, {mean + half:.4f}]"


def class_table(part: Mapping[str, Any]) -> str:
    """Return precision, recall and F1 of every class."""
    rows = ["| label | precision | recall | F1 | in the split |", "|---|---|---|---|---|"]
    for label, found in part["per_class"].items():
        figures = " | ".join(f"{found[key]:.4f}" for key in ("precision", "recall", "f1"))
        rows.append(f"| {cell(label)} | {figures} | {found['support']:,} |")
    return "\n".join(rows)


def confusion_table(confusion: Mapping[str, Any]) -> str:
    """Return the confusion matrix as Markdown; empty when there are too many labels for a table."""
    labels = [cell(label) for label in confusion["labels"]]
    if len(labels) > _TABLE_LABELS:
        return ""
    rows = [f"| true label \\ predicted | {' | '.join(labels)} |", "|---|" + "---|" * len(labels)]
    for label, counts in zip(labels, confusion["matrix"], strict=True):
        rows.append(f"| {label} | {' | '.join(f'{count:,}' for count in counts)} |")
    return "\n".join(rows)


def draw_confusion(confusion: Mapping[str, Any], path: Path) -> bool:
    """Draw the confusion matrix, shaded by the share of the true label; needs the extra `plots`.

    Returns:
        Whether there is a picture: not without matplotlib, and not when its font lacks a letter of the labels.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    labels, matrix = list(confusion["labels"]), confusion["matrix"]
    count = len(labels)
    side = min(max(3.6, 0.62 * count + 1.8), 14.0)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    shares = [[100 * number / max(sum(row), 1) for number in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    size = 9 if count <= _NUMBERED_LABELS else 6
    for axis, what in ((axes.xaxis, "predicted label"), (axes.yaxis, "true label")):
        axis.set_ticks(range(count), [_short(label) for label in labels], fontsize=size, parse_math=False)
        axis.set_label_text(what)
    if count * max(map(len, labels)) > 40:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    if count <= _NUMBERED_LABELS:
        for row, numbers in enumerate(matrix):
            for column, number in enumerate(numbers):
                colour = "white" if shares[row][column] > 55 else "black"
                axes.text(column, row, f"{number:,}", ha="center", va="center", color=colour, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label("% of the true label")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        try:
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
        except UserWarning:
            path.unlink(missing_ok=True)
            return False
    return True


def cell(text: object) -> str:
    """Return a text that stays inside its cell of a Markdown table."""
    flat = " ".join(str(text).split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def _short(label: str, width: int = 18) -> str:
    return label if len(label) <= width else label[: width - 1] + "…"

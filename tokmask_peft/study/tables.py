"""Tables of a sweep's report: the same cells as Markdown, LaTeX and plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
}

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Write an interval of differences."""
    return "" if bounds is None else f"[{signed(bounds[0])}, {signed(bounds[1])}]"


def mean_sd(found: dict[str, Any]) -> str:
    """Write mean ± standard deviation."""
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def level(found: dict[str, Any]) -> str:
    """Write the 95% interval of a mean."""
    return "" if found["interval"] is None else f"[{found['interval'][0]:.4f}, {found['interval'][1]:.4f}]"


def score_table(analysis: dict[str, Any]) -> Table:
    """Return mean, deviation and interval of each arm."""
    head = ("arm", "seeds", "macro-F1", "95% interval", "weighted F1", "95% interval", "validation macro-F1", "cost")
    body = []
    for row in analysis["rows"]:
        cost = "1" if row["is_reference"] else ("" if row.get("cost") is None else f"{row['cost']:.2f}")
        macro, weighted = row["f1_macro"], row["f1_weighted"]
        cells = [row["label"], str(len(row["seeds"])), mean_sd(macro), level(macro), mean_sd(weighted), level(weighted)]
        body.append([*cells, mean_sd(row["validation_f1_macro"]), cost])
    return head, body


def difference_table(analysis: dict[str, Any], metric: str) -> Table:
    """Return the paired differences from the arm without masking."""
    head = ("arm", "seeds", "difference", "95% t", "95% bootstrap", "p", "p (Holm)", "g_z")
    body = []
    for row in analysis["rows"]:
        found = row.get("difference", {}).get(metric)
        if not found:
            continue
        effect = found["effect_size"]
        body.append(
            [
                row["label"],
                str(found["n"]),
                signed(found["mean"]) + ("" if found["sd"] is None else f" ± {found['sd']:.4f}"),
                interval(found["interval"]),
                interval(found["bootstrap"]),
                f"{found['p_value']:.3g}",
                f"{found['p_holm']:.3g}",
                "" if effect is None else f"{effect:+.2f}".replace("-", "−"),
            ]
        )
    return head, body


def needed_table(analysis: dict[str, Any]) -> Table:
    """Return how many seeds would show each of the paper's gains."""
    gains = analysis["paper"]["gains"]
    head = ("arm", "sd of the differences", *(f"{name} ({signed(gain)})" for name, gain in gains.items()))
    body = []
    for row in analysis["paper"]["rows"]:
        counts = [_count(row["needed"][name]) for name in gains]
        body.append([row["label"], f"{row['sd']:.4f}", *counts])
    return head, body


def _count(found: dict[str, Any]) -> str:
    low, high = ("over a million" if bound is None else f"{bound:,}" for bound in found["interval"])
    middle = "over a million" if found["seeds"] is None else f"{found['seeds']:,}"
    return f"{middle} ({low} to {high})"


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    head, body = table
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def plain(table: Table) -> str:
    """Write a table for a terminal."""
    head, body = table
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *body)]
    return "\n".join(line.rstrip() for line in lines)


def latex(table: Table, caption: str) -> str:
    """Write a table in LaTeX, for the package booktabs."""
    head, body = table
    columns = "l" + "r" * (len(head) - 1)
    rows = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in body]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_tex(cell) for cell in head) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_tex(caption)}}}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _tex(text: str) -> str:
    return re.sub("[" + re.escape("".join(LATEX)) + "]", lambda found: LATEX[found[0]], text)

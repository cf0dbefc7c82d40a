"""What robustness says: tables, findings, Markdown."""

from __future__ import annotations

from typing import Any

from tokmask_peft.study.tables import Table, level, markdown, mean_sd, plain

SHOWN = 5e-5
"""The least difference that four decimals show."""


def label(row: dict[str, Any], task: str) -> str:
    """Name a condition."""
    if row["kind"] == "mask":
        return f"{row['at']:.0%} of sub-tokens masked"
    if row["kind"] == "noise":
        return f"{row['at']:.0%} of words misspelt"
    if row["kind"] == "clean":
        return "as they are"
    if task == "token":
        return f"{row['kind']} words ({row['items']:,.0f})"
    has = "no" if row["kind"] == "seen" else "an"
    return f"texts with {has} unseen word ({row['items']:,.0f})"


def score_table(analysis: dict[str, Any], metric: str = "f1_macro") -> Table:
    """Return a row per condition and a column per group."""
    groups = analysis["groups"]
    body = []
    for kind, at in dict.fromkeys((row["kind"], row["at"]) for group in groups for row in group["rows"]):
        found = [next((row for row in one["rows"] if (row["kind"], row["at"]) == (kind, at)), None) for one in groups]
        first = next(row for row in found if row is not None)
        cells = ["" if row is None else f"{mean_sd(row[metric])} {level(row[metric])}".strip() for row in found]
        body.append([label(first, analysis["task"]), *cells])
    return ["texts", *(_head(group) for group in groups)], body


def _head(group: dict[str, Any]) -> str:
    seeds = len(group["seeds"])
    return f"trained with {group['group']}" + (f", {seeds} seeds" if seeds > 1 else f", seed {group['seeds'][0]}")


def findings(analysis: dict[str, Any]) -> list[str]:
    """Say in sentences what masking and noise cost each group."""
    lines = []
    for group in analysis["groups"]:
        parts = []
        for kind, name in (("mask", "masked sub-tokens"), ("noise", "misspelt words")):
            rows = [row for row in group["rows"] if row["kind"] == kind]
            if rows:
                parts.append(f"{rows[-1]['loss']['mean']:.4f} at {rows[-1]['at']:.0%} {name}")
        if parts:
            clean = next(row for row in group["rows"] if row["kind"] == "clean")
            lines.append(f"{group['group']}: macro-F1 {clean['f1_macro']['mean']:.4f}; loses {' and '.join(parts)}.")
    return lines


def cautions(analysis: dict[str, Any]) -> list[str]:
    """Say what limits the scores."""
    what = analysis["disturbances"]
    lines = [
        f"Scores are means over {what['draws']} draws of masks and misspellings, the same for every run. Texts longer "
        "than those of training are read in windows, as `tokmask predict` does.",
        "Misspellings are made up (a swapped, dropped, inserted or replaced letter in a word), not people's.",
        "Texts with unseen words differ from the others in more than that, as in length and in labels: compare a row "
        "between models, not the two rows of one model. Macro-F1 of a part is over the classes that occur in it.",
    ]
    if analysis["split"] != "test":
        lines.append("There are no test texts: these are validation scores, which also chose the checkpoints.")
    reported = [(run["clean"]["f1_macro"], run.get("reported")) for run in analysis["runs"]]
    apart = [abs(found - before) for found, before in reported if before is not None]
    if max(apart, default=0.0) >= SHOWN:
        lines.append(
            f"{sum(one >= SHOWN for one in apart)} of {len(apart)} runs score up to {max(apart):.4f} otherwise on the "
            "texts as they are than their result.json says: bf16 rounds otherwise in predictions than in evaluation, "
            "and nothing is cut here."
        )
    fewest = min(len(group["seeds"]) for group in analysis["groups"])
    if fewest < 2:
        lines.append("One run per line: nothing is known about how much another seed would differ.")
    elif fewest < 5:
        lines.append(f"{fewest} seeds: the intervals are wide, and rest on normally distributed scores.")
    return lines


def summary(analysis: dict[str, Any]) -> str:
    """Return the text for a terminal."""
    parts = [f"Macro-F1 on {analysis['texts']:,} {analysis['split']} texts", plain(score_table(analysis)), ""]
    parts += [*findings(analysis), "", *(f"Caution: {line}" for line in cautions(analysis)), ""]
    return "\n".join(parts)


def markdown_report(analysis: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = ["# Robustness", "", *(f"- {line}" for line in findings(analysis)), ""]
    parts += ["![F1 on disturbed texts](robustness.png)", ""]
    parts += [
        f"Mean ± standard deviation over seeds, with 95% intervals of the mean (Student's t); {analysis['texts']:,} "
        f"{analysis['split']} texts.",
        "",
    ]
    for metric, name in (("f1_macro", "Macro-F1"), ("f1_weighted", "Weighted F1")):
        parts += [f"## {name}", "", markdown(score_table(analysis, metric)), ""]
    mask = analysis["mask_token"]
    parts += [
        "## Methods",
        "",
        *([f"- Masked: by the rule of training (unit {mask['unit']}); {mask['token']}."] if mask else []),
        "- Misspelt: in a share of the words that have a letter, two neighbouring letters are swapped, one is dropped, "
        "inserted or replaced. New letters are of the same script and take the case of their place; marks stay with "
        "their letter.",
        "- Unseen: words that no training text of the run holds, case and punctuation at the ends aside.",
        "",
        "## Cautions",
        "",
        *(f"- {line}" for line in cautions(analysis)),
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in analysis['versions'].items())}.",
        "",
    ]
    return "\n".join(parts)

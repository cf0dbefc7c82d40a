"""What `tokmask predict` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tokmask_peft.data.texts import TextFile
from tokmask_peft.inference.classifier import Answer, Classifier, Prediction
from tokmask_peft.inference.files import FileReport, as_record, predict_file


def print_answers(texts: Sequence[str], answers: Sequence[Answer], as_json: bool) -> None:
    """Print label, probability and text per answer, between tabs; in token tasks word, label and probability."""
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if as_json:
            typer.echo(json.dumps(as_record(text, answer), ensure_ascii=False))
        elif isinstance(answer, Prediction):
            typer.echo(f"{answer.label}\t{answer.probabilities[answer.label]:.4f}\t{text}")
        else:
            if number:
                typer.echo()
            for word, label, row in zip(answer.words, answer.labels, answer.probabilities, strict=True):
                typer.echo(f"{word}\t{label}\t{row[label]:.4f}")


def predict_with_bar(classifier: Classifier, source: TextFile, out: Path, force: bool, batch_size: int) -> FileReport:
    """Classify a file with a progress bar on standard error, and say there what could not be read."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]} texts"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=source.total, rows="0")

        def move(report: FileReport) -> None:
            bar.update(task, completed=source.done, rows=f"{report.rows:,}")

        report = predict_file(classifier, source, out, force=force, batch_size=batch_size, progress=move)
    for problem in report.problems:
        console.print(f"unreadable: {problem.where}: {problem.problem}", markup=False)
    if report.unreadable > len(report.problems):
        console.print(f"unreadable: and {report.unreadable - len(report.problems):,} more rows", markup=False)
    said = f"{report.rows:,} rows"
    if report.unreadable:
        said += f", {report.unreadable:,} of them unreadable (with the key 'error')"
    console.print(f"{out}: {said}", markup=False)
    return report

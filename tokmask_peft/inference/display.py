"""What is shown of answers and explanations: in a terminal, as JSON, and on a page of one file, without scripts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from tokmask_peft.console import SafeConsole, echo, printable
from tokmask_peft.data.readers import TextFile
from tokmask_peft.examples import Pair, Unreadable, WordPredictions
from tokmask_peft.html import FAINTEST, environment, strength_of
from tokmask_peft.inference.classifier import Answer, Classifier
from tokmask_peft.inference.explain import Explanation
from tokmask_peft.inference.files import Columns, FileReport, answer_record, answered, json_parts, predict_file
from tokmask_peft.tasks import get_task

_FOR, _AGAINST = (33, 102, 172), (214, 96, 77)  # blue and orange-red, which colour-blind readers can distinguish


def print_answers(texts: Sequence[str | Pair], answers: Sequence[Answer], as_json: bool) -> None:
    """Print label, probability and text of each answer; in token tasks a line per word, then one with # per entity."""
    for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if as_json:
            _echo_json(answer_record(text, answer))
        elif isinstance(answer, WordPredictions):
            if number:
                echo()
            for word, label, row in zip(answer.words, answer.labels, answer.probabilities, strict=True):
                echo(f"{word}\t{label}\t{row[label]:.4f}")
            for entity in answer.entities:
                echo(f"# {entity.type}\t{entity.text}\t{entity.confidence:.4f}")
        else:
            echo(f"{answer.label}\t{answer.confidence:.4f}\t{text}")


def _echo_json(record: dict[str, Any]) -> None:
    text = ""
    for part in json_parts(record):  # of a long text there are many
        text += part
        if len(text) > 1 << 16:
            echo(text, end="")
            text = ""
    echo(text)


def print_file(classifier: Classifier, source: TextFile, as_json: bool, batch_size: int) -> FileReport:
    """Print the answers to a file as they come, as `print_answers` does; a row without one has an empty line."""
    report, columns = FileReport(), Columns(source) if as_json else None
    for found, answer in chain.from_iterable(answered(classifier, source, batch_size)):
        if columns is not None:
            _echo_json(columns.record(found, answer))
        elif isinstance(found, Unreadable) or answer is None:
            echo("" if get_task(classifier.task).words_given else "\t\t")
        else:
            if report.rows and isinstance(answer, WordPredictions):
                echo()
            print_answers([" ".join(found.string.split())], [answer], as_json=False)
        report.count(found)
        if columns is None:
            source.rows.clear()
    _print_problems(report, source, SafeConsole(stderr=True, highlight=False, soft_wrap=True))
    return report


def predict_with_bar(classifier: Classifier, source: TextFile, out: Path, force: bool, batch_size: int) -> FileReport:
    """Classify a file with a progress bar on standard error, and report there what could not be read."""
    console = SafeConsole(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rows]} texts"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=source.total, rows="0")

        def move(report: FileReport) -> None:
            bar.update(task, completed=source.done, rows=f"{report.rows:,}")

        report = predict_file(classifier, source, out, force=force, batch_size=batch_size, progress=move)
    _print_problems(report, source, console)
    unreadable = f", {report.unreadable:,} of them without an answer (see 'error')" if report.unreadable else ""
    console.print(f"{out}: {report.rows:,} texts{unreadable}", markup=False)
    return report


def _print_problems(report: FileReport, source: TextFile, console: Console) -> None:
    for what, choice, reason in map(astuple, source.decisions):
        console.print(f"{what}: {choice} ({reason})", markup=False)
    for problem in report.problems:
        console.print(f"unreadable: {problem.where}: {problem.problem}", markup=False)
    if report.unreadable > len(report.problems):
        console.print(f"unreadable: and {report.unreadable - len(report.problems):,} more rows", markup=False)


def print_json(explanations: Sequence[Explanation]) -> None:
    """Print a JSON line per text, with numbers to 6 digits and without what is empty."""
    for explanation in explanations:
        record = {key: value for key, value in asdict(explanation).items() if value not in (None, ())}
        rounded = json.loads(json.dumps(record), parse_float=lambda number: round(float(number), 6))
        echo(json.dumps(rounded, ensure_ascii=False))


def print_explanations(explanations: Sequence[Explanation], console: Console) -> None:
    """Print words coloured by influence or, without colours, a line per word with its numbers."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    for number, explanation in enumerate(explanations):
        if number:
            console.print()
        (_print_coloured if coloured else _print_plain)(explanation, console)
    if coloured:
        legend = Text("speaks for the label", style=_style(1.0))
        console.print(legend.append("  ", style="default on default").append("against it", style=_style(-1.0)))


def _print_coloured(explanation: Explanation, console: Console) -> None:
    line = Text()
    colours = map(strength_of, explanation.influences)
    for index, (word, strength) in enumerate(zip(explanation.words, colours, strict=True)):
        line.append(printable(word), style=_style(strength) + (" underline" if index == explanation.word else ""))
        if explanation.labels and explanation.word is None:
            line.append(printable(f"/{explanation.labels[index]}"), style="dim")
        line.append(" ")
    console.print(Text(printable(explanation.headline), style="bold"))
    console.print(line)


def _style(strength: float) -> str:
    """Mix a colour with white, under black letters, whatever the terminal's own colours are."""
    share = 0.75 * abs(strength)
    if abs(strength) < FAINTEST:
        return ""
    red, green, blue = (round(255 + (part - 255) * share) for part in (_FOR if strength >= 0 else _AGAINST))
    return f"rgb(0,0,0) on rgb({red},{green},{blue})"


def _print_plain(explanation: Explanation, console: Console) -> None:
    labels = [f"\t{label}" for label in explanation.labels] or [""] * len(explanation.words)
    echo(explanation.headline)
    echo("word" + ("\tlabel" if explanation.labels else "") + "\tinfluence\tprobability without it")
    for index, (word, label) in enumerate(zip(explanation.words, labels, strict=True)):
        numbers = f"{explanation.influences[index]:+z.2f}\t{explanation.without[index]:.3f}"
        echo(f"{word}{label}\t" + ("cannot be masked" if index in explanation.unmasked else numbers))


def explanations_page(model: str, explanations: Sequence[Explanation], note: str) -> str:
    """Return the page as HTML: a name for the model, a section per text, and in a sentence how words were masked."""
    template = environment().get_template("explain_page.html")
    return template.render(model=model, note=note, items=explanations)

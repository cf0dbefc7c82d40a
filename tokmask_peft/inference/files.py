"""Predict a file of any length: read, classify and write a limited number of texts at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokmask_peft.data.readers import TextFile, line_number
from tokmask_peft.errors import DataError, whole
from tokmask_peft.inference.classifier import BATCH_SIZE, Answer, Classifier
from tokmask_peft.inference.export import check_output
from tokmask_peft.tasks import Example, Unreadable, WordPredictions

CHUNK_BATCHES, CHUNK_CHARACTERS = 32, 2_000_000
SHOWN_PROBLEMS = 5


@dataclass(slots=True)
class FileReport:
    """What became of a file."""

    rows: int = 0  # written, unreadable ones included
    unreadable: int = 0  # rows without an answer
    problems: list[Unreadable] = field(default_factory=list)  # the first few of them


def predict_file(
    classifier: Classifier,
    source: TextFile,
    out: str | Path,
    *,
    force: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[FileReport], None] | None = None,
) -> FileReport:
    """Classify the texts of a file, in its order, into JSON lines.

    A line per text: `line`, the text or its words, and the answer; for a row that cannot be read `line` and `error`.
    `out` appears when all is done, in place of an old one if `force` says so; until then, a temporary file in the same
    folder is written. At most 32 batches of texts are in memory at a time. `progress` is called after each such chunk.

    Raises:
        DataError: `out` cannot be written, or the file as a whole cannot be read.
    """
    path = check_output(out, source.path, force)
    report = FileReport()
    with whole(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for chunk in _chunks(source, batch_size * CHUNK_BATCHES):
            texts: list[Any] = [found.text for found in chunk if isinstance(found, Example)]
            found_answers = classifier.predict(texts, batch_size) if texts else []
            if len(found_answers) != len(texts):
                problem = f"{len(texts)} texts got {len(found_answers)} answers, first of them {chunk[0].where}"
                raise DataError(problem, code="row-count", texts=len(texts), answers=len(found_answers))
            answers = iter(found_answers)
            for found in chunk:
                record: dict[str, Any] = {"line": line_number(found.where)}
                if isinstance(found, Example):
                    record |= answer_record(found.string, next(answers))
                else:
                    record["error"] = found.problem
                    report.unreadable += 1
                    report.problems += [found] if len(report.problems) < SHOWN_PROBLEMS else []
                report.rows += 1
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if progress is not None:
                progress(report)
    return report


def _chunks(source: TextFile, count: int) -> Iterator[list[Example | Unreadable]]:
    """Yield lists of at most `count` texts, and of about 2 million characters."""
    chunk: list[Example | Unreadable] = []
    characters = 0
    for found in source:
        chunk.append(found)
        characters += len(found.string) if isinstance(found, Example) else 0
        if len(chunk) >= count or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def answer_record(text: str, answer: Answer) -> dict[str, Any]:
    """Return the JSON form of an answer, with probabilities to 6 digits."""

    def rounded(row: dict[str, float]) -> dict[str, float]:
        return {label: round(value, 6) for label, value in row.items()}

    if isinstance(answer, WordPredictions):
        rows = [rounded(row) for row in answer.probabilities]
        return {"words": list(answer.words), "labels": list(answer.labels), "probabilities": rows}
    return {"text": text, "label": answer.label, "probabilities": rounded(answer.probabilities)}

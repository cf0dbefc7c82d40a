"""What a finished run left behind, read back for its report. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokmask_peft.errors import RunError
from tokmask_peft.recipe import Recipe
from tokmask_peft.training.run_folder import RunFolder, open_finished


def is_run(folder: str | Path) -> bool:
    """Return whether `folder` is the folder of one run."""
    return (Path(folder) / "recipe.yaml").is_file()


@dataclass(frozen=True, slots=True)
class Record:
    """A finished run as it lies on disk.

    Attributes:
        run: its folder.
        recipe: the resolved recipe.
        result: what `result.json` holds.
        log: the lines of `log.jsonl`; empty where there is none.
    """

    run: RunFolder
    recipe: Recipe
    result: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read a run.

        Raises:
            RunError: the folder is no finished run, or its files cannot be read.
        """
        run = open_finished(folder)
        if not run.finished():
            raise RunError(f"the run {folder} is not finished; finish it with `tokmask train {run.recipe} --resume`")
        try:
            result = json.loads(run.result.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{run.result} is not JSON: {error}") from error
        if not isinstance(result, dict) or "validation" not in result or "labels" not in result:
            raise RunError(f"{run.result} holds no scores of a run (validation, labels)")
        return cls(run, Recipe.load(run.recipe), result, _read_log(run.log))

    @property
    def split(self) -> str:
        """The split whose scores count: test where there is one, else validation."""
        return "test" if self.result.get("test") else "validation"

    @property
    def scores(self) -> dict[str, Any]:
        """The scores of that split."""
        return dict(self.result[self.split])


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the log that are JSON objects with a step; a killed run may leave half a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found

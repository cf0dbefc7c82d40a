"""The folder of a run: where things lie, who may write, and what an interrupted run leaves."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmask_peft.errors import RunError
from tokmask_peft.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths in a run folder."""

    root: Path

    @property
    def adapter(self) -> Path:
        """The adapter with tokenizer, labels and model card: a folder to push as it is."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def result(self) -> Path:
        """Scores and everything that was measured."""
        return self.root / "result.json"

    @property
    def predictions(self) -> Path:
        """Gold and predicted label ids per text of validation and test."""
        return self.root / "predictions.json"

    @property
    def log(self) -> Path:
        """A JSON line per logged step."""
        return self.root / "log.jsonl"

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        found = [
            (int(folder.name.removeprefix("checkpoint-")), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.removeprefix("checkpoint-").isdigit() and _is_json(folder / "trainer_state.json")
        ]
        return max(found)[1] if found else None

    def finished(self) -> bool:
        """Return whether the run has its result."""
        return self.result.is_file()


def check_run(recipe: Recipe, resume: bool) -> RunFolder:
    """Return the run folder of a recipe, if it may be written; nothing is made yet.

    Raises:
        RunError: the name is taken and `resume` is off; or there is nothing to resume, the run is finished, or it
            was started with another recipe.
    """
    from tokmask_peft.recipe.io import differences, load_recipe

    run = RunFolder(recipe.run_dir)
    ground = next(place for place in (run.root, *run.root.absolute().parents) if place.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        raise RunError(f"{run.root} cannot be a run folder: {ground} is a file or cannot be written; set output_dir")
    if not run.root.exists() or not any(run.root.iterdir()):
        if resume:
            raise RunError(f"there is no run to resume in {run.root}; start it without --resume")
        return run
    if not resume:
        what = "is finished" if run.finished() else "was not finished"
        remedy = "" if run.finished() else "continue it with --resume, or "
        raise RunError(f"the run {run.root} exists and {what}: {remedy}choose another name (name=…) or remove it")
    if run.finished():
        raise RunError(f"the run {run.root} is finished: its scores are in {run.result}; there is nothing to resume")
    if run.recipe.is_file():
        changed = differences(load_recipe(run.recipe), recipe)
        if changed:
            raise RunError(
                f"the run {run.root} was started with another recipe; resuming would mix two runs. "
                f"Differences: {'; '.join(changed)}. Use `tokmask train {run.recipe} --resume`, or another name."
            )
    return run


def start_run(run: RunFolder, recipe_text: str) -> None:
    """Make the run folder with its recipe; one that is being resumed keeps its own.

    Raises:
        RunError: the folder cannot be made or written.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        if not run.recipe.is_file():
            write_whole(run.recipe, recipe_text)
    except OSError as error:
        raise RunError(f"the run folder {run.root} cannot be made ({error.strerror}); set output_dir") from error


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write JSON as `write_whole` does; in one line without `indent`."""
    write_whole(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it, and after a power cut, too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_json(path: Path) -> bool:
    """Return whether a file is there and whole; the Trainer's may be empty after a power cut."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def open_finished(folder: str | Path) -> RunFolder:
    """Return the run in `folder`.

    Raises:
        RunError: the folder is no run, or the run has no adapter yet.
    """
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        raise RunError(f"{folder} is not a run folder (it holds no recipe.yaml)")
    if not (run.adapter / "adapter_config.json").is_file():
        raise RunError(f"the run {folder} has no adapter yet; finish it with `tokmask train {run.recipe} --resume`")
    return run

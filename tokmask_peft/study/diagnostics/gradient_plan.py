"""What `tokmask diagnose` will measure, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tokmask_peft.errors import RecipeError, RunError
from tokmask_peft.recipe import Recipe
from tokmask_peft.study.axes import read_rates, split_values


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """Rates, draws, batches and points of a measurement.

    Attributes:
        folder: to write to.
        rates: masking rates above 0, ascending; 0 is always measured.
        draws: mask draws per batch and rate.
        batches: batches of training texts.
        shares: of the training's steps, ascending.
    """

    LEAST_BATCHES: ClassVar[int] = 4

    folder: Path
    rates: tuple[float, ...]
    draws: int
    batches: int
    shares: tuple[float, ...]

    @classmethod
    def make(cls, recipe: Recipe, p: str, draws: int, batches: int, at: str, out: Path | None) -> GradientPlan:
        """Read the options of the command line.

        Raises:
            RecipeError: with every problem found.
            RunError: the folder holds a diagnosis already, or cannot be written.
        """
        problems: list[str] = []
        rates = sorted(float(rate) for rate in read_rates(p, problems))
        if not problems and not any(rates):
            problems.append(f"--p {p}: give a rate above 0; the gradient without masking is always measured beside it")
        shares = []
        for text in split_values(at):
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if not 0.0 <= share <= 1.0:
                problems.append(f"--at {at}: '{text}' is no share of the training; expected 0 to 1, as 0,0.5,1")
            shares.append(share)
        if not shares:
            problems.append("--at: expected shares of the training, as 0,0.5,1")
        if draws < 2:
            problems.append(f"--draws {draws}: 2 are the least, because variance needs pairs of draws")
        if batches < cls.LEAST_BATCHES:
            problems.append(f"--batches {batches}: {cls.LEAST_BATCHES} are the least, because intervals need them")
        if problems:
            raise RecipeError(dict.fromkeys(problems), source="diagnose")
        folder = out or recipe.run_dir.with_name(f"{recipe.run_dir.name}-diagnose")
        check_free(folder, "gradients.json")
        return cls(folder, tuple(rate for rate in rates if rate > 0), draws, batches, tuple(sorted(set(shares))))


def check_free(folder: Path, file: str) -> None:
    """Check that a folder can take a measurement.

    Raises:
        RunError: it holds one, or is a file.
    """
    if (folder / file).exists():
        raise RunError(f"{folder} holds a {file} already: choose another folder with --out, or remove that file")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose a folder with --out")

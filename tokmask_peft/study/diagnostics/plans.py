"""Which runs `tokmask robustness` compares, and how; checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tokmask_peft.artifacts import RunFolder, open_finished
from tokmask_peft.errors import RecipeError, RunError
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.plan import read_rates, split_values


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


_MAY_DIFFER = ("masking.p", "seed", "masking.seed")


@dataclass(frozen=True, slots=True)
class Member:
    """A run, and the line of the comparison that it belongs to.

    Attributes:
        group: runs of one group differ by their seed alone.
        run: its folder.
        recipe: its resolved recipe.
    """

    group: str
    run: RunFolder
    recipe: Recipe


def find_members(folders: Sequence[str]) -> list[Member]:
    """Return the runs of sweeps, or single runs grouped by their masking rate.

    Raises:
        RunError: a folder is neither, or the runs are not comparable.
        SweepError: a sweep has no finished run, or is no grid.
    """
    from tokmask_peft.recipe.loading import differences

    members: list[Member] = []
    single: list[Member] = []
    for folder in dict.fromkeys(folders):
        if (Path(folder) / "sweep.json").is_file():
            if len(folders) > 1:
                raise RunError(f"{folder} is a sweep: give one sweep, or several runs")
            members.extend(_of_sweep(Path(folder)))
            continue
        run = open_finished(folder)
        recipe = Recipe.load(run.recipe)
        schedule = "" if recipe.masking.schedule == "constant" else f", {recipe.masking.schedule}"
        single.append(Member(f"p = {recipe.masking.p:g}{schedule}", run, recipe))
    for member in single[1:]:
        other = [
            line for line in differences(single[0].recipe, member.recipe) if line.partition(":")[0] not in _MAY_DIFFER
        ]
        if other:
            raise RunError(
                f"{single[0].run.root} and {member.run.root} differ in more than masking.p and seed, so their scores "
                f"cannot be laid to masking: {'; '.join(other)}"
            )
    members.extend(sorted(single, key=lambda member: (member.recipe.masking.p, member.recipe.seed)))
    return members


def _of_sweep(folder: Path) -> list[Member]:
    from tokmask_peft.study.results import read_sweep

    results = read_sweep(folder)
    found = []
    for row, runs in results.runs.items():
        for seed in runs:
            run = results.folders[row, seed]
            found.append(Member(row.label, open_finished(run.root), Recipe.load(run.recipe)))
    return found


def read_amounts(option: str, text: str, problems: list[str]) -> tuple[float, ...]:
    """Read masking rates or shares of words; 0, the text as it is, is scored anyway and left out."""
    if option == "--p":
        return tuple(sorted(float(rate) for rate in read_rates(text, problems) if float(rate) > 0))
    found = []
    for part in split_values(text):
        try:
            share = float(part)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            problems.append(f"{option} {text}: '{part}' is no share of words; expected 0 to 1, as 0.1,0.2")
            break
        found.append(share)
    return tuple(sorted({share for share in found if share > 0}))


def read_options(p: str, noise: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read `--p` and `--noise`.

    Raises:
        RecipeError: with every problem found.
    """
    problems: list[str] = []
    rates, shares = read_amounts("--p", p, problems), read_amounts("--noise", noise, problems)
    if problems:
        raise RecipeError(problems, source="robustness")
    return rates, shares


def choose_folder(folders: Sequence[str], out: Path | None) -> Path:
    """Return the folder to write to.

    Raises:
        RunError: several runs, and no folder is given; or it is a file.
    """
    if out is None and len(set(folders)) > 1:
        raise RunError("with several runs say where to write: --out FOLDER")
    folder = out or Path(folders[0]) / "robustness"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose a folder with --out")
    return folder

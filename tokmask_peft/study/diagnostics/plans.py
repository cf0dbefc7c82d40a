"""What `tokmask diagnose` and `tokmask robustness` will do, checked before anything heavy is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokmask_peft.artifacts import RunFolder, open_finished
from tokmask_peft.errors import RecipeError, RunError
from tokmask_peft.recipe.loading import differences
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.plan import SWEEP_FILE, number, read_rates, split_values

LEAST_BATCHES = 4


def _shares(option: str, text: str, of: str, problems: list[str]) -> tuple[float, ...]:
    """Read numbers from 0 to 1, ascending and without doubles."""
    values = split_values(text)
    if wrong := [value for value in values if not 0 <= number(value) <= 1]:
        problems.append(f"{option} {text}: '{wrong[0]}' is not a share of {of}; expected 0 to 1, as 0,0.5,1")
        return ()
    return tuple(sorted({float(value) for value in values}))


def folder_of(out: Path | None, default: Path | None) -> Path:
    """Return the folder to write to, or raise a RunError if neither is given or if it is a file."""
    folder = out or default
    if folder is None:
        raise RunError("several runs need a folder for the report: --out FOLDER", code="out-is-missing")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose a folder with --out", code="out-is-a-file")
    return folder


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """Where and with what gradients are measured, at `shares` of the steps; rates are above 0 and ascend."""

    folder: Path
    rates: tuple[float, ...]
    draws: int
    batches: int
    shares: tuple[float, ...]

    @classmethod
    def make(cls, recipe: Recipe, p: str, draws: int, batches: int, at: str, out: Path | None) -> Self:
        """Read options; RecipeError with every problem, RunError if the folder is a file or holds a measurement."""
        problems: list[str] = []
        rates = sorted(rate for text in read_rates(p, problems) if (rate := float(text)) > 0)
        if not problems and not rates:
            problems.append(f"--p {p}: give a rate above 0; the gradient without masking is always measured too")
        shares = _shares("--at", at, "the training", problems)
        if not split_values(at):
            problems.append("--at: expected shares of the training, as 0,0.5,1")
        if draws < 2:
            problems.append(f"--draws {draws}: at least 2, because variance needs pairs of draws")
        if batches < LEAST_BATCHES:
            problems.append(f"--batches {batches}: at least {LEAST_BATCHES}, because intervals need them")
        if problems:
            raise RecipeError(problems, "diagnose", code="diagnose-options")
        folder = folder_of(out, recipe.run_dir.with_name(f"{recipe.run_dir.name}-diagnose"))
        if (folder / "gradients.json").exists():
            remedy = "choose another folder with --out, or remove that file"
            raise RunError(f"{folder} already holds a gradients.json: {remedy}", code="out-is-taken")
        return cls(folder, tuple(rates), draws, batches, shares)


@dataclass(frozen=True, slots=True)
class Perturbations:
    """Masking rates and shares of misspelt words, above 0, how often each is drawn, and the most texts scored."""

    rates: tuple[float, ...]
    noise: tuple[float, ...]
    draws: int
    seed: int = 0
    limit: int | None = None

    @classmethod
    def make(cls, p: str, noise: str, draws: int, seed: int, limit: int | None) -> Self:
        """Read the options of the command line, or raise a RecipeError; 0, the text as it is, is always scored."""
        problems: list[str] = []
        rates = sorted(rate for text in read_rates(p, problems) if (rate := float(text)) > 0)
        shares = tuple(share for share in _shares("--noise", noise, "words", problems) if share > 0)
        if problems:
            raise RecipeError(problems, "robustness", code="robustness-options")
        return cls(tuple(rates), shares, draws, seed, limit)


@dataclass(frozen=True, slots=True)
class Member:
    """A run with its resolved recipe, and its line in the comparison: runs of one group differ only by their seed."""

    group: str
    run: RunFolder
    recipe: Recipe

    @classmethod
    def open(cls, folder: str | Path, group: str | None = None) -> Self:
        """Read a run; without a group that is its masking rate and schedule."""
        run = open_finished(folder)
        recipe = Recipe.load(run.recipe)
        schedule = "" if recipe.masking.schedule == "constant" else f", {recipe.masking.schedule}"
        return cls(group or f"p = {recipe.masking.p:g}{schedule}", run, recipe)


def find_members(folders: Sequence[str]) -> list[Member]:
    """Return a sweep's runs, by arm, or single comparable ones, by masking rate; otherwise RunError or SweepError."""
    if sweeps := [folder for folder in folders if (Path(folder) / SWEEP_FILE).is_file()]:
        from tokmask_peft.study.results import read_sweep

        if len(folders) > 1:
            raise RunError(f"{sweeps[0]} is a sweep: give one sweep, or several runs", code="mixed-runs")
        results = read_sweep(Path(sweeps[0]))
        cells = [(row, seed) for row, runs in results.runs.items() for seed in runs]
        return [Member.open(results.folders[row, seed].root, row.label) for row, seed in cells]
    members = [Member.open(folder) for folder in dict.fromkeys(folders)]
    for member in members[1:]:
        found = differences(members[0].recipe, member.recipe)
        if other := [line for line in found if line.partition(":")[0] not in ("masking.p", "seed", "masking.seed")]:
            problem = f"{members[0].run.root} and {member.run.root} differ in more than masking.p and seed"
            effect = f"so their scores cannot be attributed to masking: {'; '.join(other)}"
            raise RunError(f"{problem}, {effect}", code="not-comparable", differences=other)
    return sorted(members, key=lambda member: (member.recipe.masking.p, member.recipe.seed))

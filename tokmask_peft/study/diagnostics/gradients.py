"""`tokmask diagnose`: what masking does to the gradients of the adapter, at several points of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokmask_peft.console import make_console
from tokmask_peft.errors import DataError, RunError
from tokmask_peft.masking import MaskToken
from tokmask_peft.recipe import Recipe
from tokmask_peft.study.diagnostics.estimates import MEANING, REPLICATES, summarise
from tokmask_peft.study.diagnostics.gradient_plan import GradientPlan
from tokmask_peft.study.diagnostics.gradient_plot import plot_gradients
from tokmask_peft.study.diagnostics.gradient_report import markdown_report, summary
from tokmask_peft.study.diagnostics.meter import GROUPS, GradientMeter
from tokmask_peft.training.environment import versions
from tokmask_peft.training.fit import train_only
from tokmask_peft.training.run_folder import write_json
from tokmask_peft.training.trainer import OrderedEvalTrainer


@dataclass(frozen=True, slots=True)
class GradientReport:
    """Where the report lies, and what it says in short."""

    markdown: Path
    statistics: Path
    plots: tuple[Path, ...]
    summary: str


def diagnose(recipe: Recipe, plan: GradientPlan, *, quiet: bool = False) -> GradientReport:
    """Train as the recipe says, stop at the shares of the plan to measure, and write the report.

    Raises:
        RecipeError, DataError, ModelError, RunError: with what to do.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{plan.folder} cannot be made ({error.strerror}); choose a folder with --out") from error
    console = make_console(quiet)
    points: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}

    def observers(trainer: OrderedEvalTrainer, mask: MaskToken | None) -> list[TrainerCallback]:
        texts = draw_batches(len(trainer.train_dataset), plan.batches, recipe.training.batch_size, recipe.seed)
        meter = GradientMeter(trainer, texts, plan.rates, plan.draws, recipe.masking, mask, recipe.seed)
        sizes.update(meter.sizes)

        def measure(step: int, share: float) -> None:
            count = plan.batches * (1 + plan.draws * len(plan.rates))
            memory = f"{meter.bytes / 2**20:,.0f} MiB"
            told = f"Measuring at step {step}: {count:,} gradients of {sizes['all']:,} values ({memory} at a time)"
            console.print(told, markup=False)
            found = meter.measure()
            points.append(
                {"share": share, "step": step, "groups": {group: summarise(found[group]) for group in GROUPS}}
            )

        return [_Looks(plan.shares, measure)]

    decided = train_only(recipe, plan.folder, observers, quiet=quiet)
    analysis = {
        "recipe": decided.model_dump(mode="json"),
        "rates": list(plan.rates),
        "draws": plan.draws,
        "batches": plan.batches,
        "batch_size": recipe.training.batch_size,
        "parameters": sizes,
        "points": points,
        "meaning": MEANING,
        "replicates": REPLICATES,
        "versions": versions(),
    }
    write_json(plan.folder / "gradients.json", analysis)
    plots = plot_gradients(analysis, plan.folder)
    (plan.folder / "gradients.md").write_text(markdown_report(analysis), encoding="utf-8")
    return GradientReport(plan.folder / "gradients.md", plan.folder / "gradients.json", tuple(plots), summary(analysis))


def draw_batches(texts: int, batches: int, size: int, seed: int) -> list[list[int]]:
    """Draw disjoint batches of training texts, as an epoch has them.

    Raises:
        DataError: there are too few texts.
    """
    if batches * size > texts:
        most = texts // size
        remedy = f"--batches {most}, or " if most >= GradientPlan.LEAST_BATCHES else ""
        raise DataError(
            f"{batches} batches of {size} texts need {batches * size}, but there are {texts} training texts: "
            f"{remedy}training.batch_size={max(texts // batches, 1)}"
        )
    order = np.random.default_rng([seed, 0xD1A6]).permutation(texts)[: batches * size]
    return [[int(index) for index in row] for row in order.reshape(batches, size)]


class _Looks(TrainerCallback):
    """Calls `measure(step, share)` before the steps at which a share of the training is done, and after the last."""

    def __init__(self, shares: Sequence[float], measure: Any) -> None:
        self._shares, self._measure = shares, measure
        self._due: dict[int, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn shares into steps; of two that fall on one step the first counts."""
        for share in self._shares:
            self._due.setdefault(round(share * state.max_steps), share)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look before the step."""
        self._look(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look after the last step."""
        self._look(state)

    def _look(self, state: TrainerState) -> None:
        if state.global_step in self._due:
            self._measure(state.global_step, self._due.pop(state.global_step))

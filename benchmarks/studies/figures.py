"""The figures of the masking studies, read from `benchmarks/results/masking*/*.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tokmask_peft.study.statistics import holm, sign_flip_p, spread

RESULTS = Path(__file__).parent.parent / "results"
TITLES = {
    "trec": "TREC question types, English",
    "trec-500": "TREC, 500 training texts",
    "trec-500-long": "TREC, 500 training texts, 30 epochs",
    "mesent_mareng": "MeSent sentiment, Marathi-English",
    "afrisenti_twi": "AfriSenti sentiment, Twi",
    "afrisenti_twi-500": "AfriSenti Twi, 500 training texts",
    "ud_tur_deu_lid": "UD SAGT languages, Turkish-German",
    "ud_tur_deu_pos": "UD SAGT parts of speech, Turkish-German",
    "ud_tur_deu_lid-tuned": "UD SAGT languages, tuned training",
    "ud_tur_deu_pos-tuned": "UD SAGT parts of speech, tuned training",
}
"""The sweeps over masking rates, in the order of the page."""
SAME_TEXTS = {"ud_tur_deu_lid": "ud_tur_deu", "ud_tur_deu_pos": "ud_tur_deu"}
"""Tasks that are labels of the same texts, which count as one when tasks are averaged."""
OWN = ("annealed", "twice")
"""Arms of the second study that change the recipe, so that each is a sweep of one row (`benchmarks/gpu/study.py`)."""


def read(name: str) -> Any:
    """Return the content of a JSON file below `benchmarks/results`; None if there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def sweep_files() -> list[Path]:
    """Return the files of the sweeps of both studies."""
    return sorted(RESULTS.glob("masking*/*.json"))


@dataclass(frozen=True, slots=True)
class Study:
    """What was collected: the content of the JSON files by the names of the sweeps."""

    sweeps: dict[str, dict[str, Any]]

    @classmethod
    def read(cls) -> Study:
        """Read the sweeps that have run."""
        found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sweep_files()}
        return cls({name: content for name, content in found.items() if "analysis" in content})

    @property
    def tasks(self) -> list[str]:
        """Names of the sweeps over masking rates that have run."""
        return [name for name in TITLES if name in self.sweeps]

    @property
    def whole_tasks(self) -> list[str]:
        """Those with all training texts, without the longer trainings."""
        return [name for name in self.tasks if "-" not in name]

    def analysis(self, name: str) -> dict[str, Any]:
        """Return the statistics of a sweep, as `tokmask report` writes them."""
        return self.sweeps[name]["analysis"]

    def row(self, name: str, p: float) -> dict[str, Any] | None:
        """Return the row of a masking rate with everything else as in the recipe; None if it has not run."""
        rows = self.analysis(name)["rows"] if name in self.sweeps else []
        return next((row for row in rows if row["p"] == p and row["regularizers"] == "recipe"), None)

    def masked_rates(self) -> list[float]:
        """Return the rates above 0."""
        return sorted({row["p"] for name in self.tasks for row in self.analysis(name)["rows"] if row["p"] > 0})

    def difference(self, name: str, p: float, metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return the paired differences of a rate from p = 0."""
        return ((self.row(name, p) or {}).get("difference") or {}).get(metric)

    def changes(self, name: str, p: float, metric: str = "f1_macro") -> dict[int, float]:
        """Return the paired difference of a rate from p = 0 for each seed; empty if there is no such rate."""
        found, row = self.difference(name, p, metric), self.row(name, p) or {}
        return {} if found is None else dict(zip(row["difference"]["seeds"], found["by_seed"], strict=True))

    def contrast(self, one: str, other: str, p: float) -> dict[str, Any] | None:
        """Return spread of the difference that masking makes in `one` minus that in `other`, over seeds of both.

        `one` and `other` in the answer are the mean differences over these seeds. None with fewer than two of them.
        """
        first, second = _of_all_seeds([self.changes(one, p), self.changes(other, p)])
        if len(first) < 2:
            return None
        gaps = [a - b for a, b in zip(first, second, strict=True)]
        return {**spread(gaps), "one": float(np.mean(first)), "other": float(np.mean(second))}

    def arm_contrast(self, name: str, arms: Sequence[str], other: str) -> dict[str, Any]:
        """Return spread and values of the mean of some arms' macro-F1 minus that of another arm, seed by seed."""
        rows = {row["label"]: row for row in self.analysis(name)["rows"]}
        scores = [
            dict(zip(row["seeds"], row["f1_macro"]["by_seed"], strict=True)) for row in map(rows.get, (*arms, other))
        ]
        *found, plain = _of_all_seeds(scores)
        values = (np.mean(found, axis=0) - plain).tolist()
        return {**spread(values), "by_seed": values}

    def arms(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a sweep over arms, with the log-losses on test, and those of `OWN`: `NAME-annealed`.

        The latter are compared with `none` of the sweep, seed by seed: with a seed, both have the same texts, head and
        dropout draws. Holm's correction is over all arms.

        Raises:
            SystemExit: an arm was trained on other texts, on another device or in another precision.
        """
        rows, plain = list[dict[str, Any]](), dict[int, float]()
        for sweep, arm in ((name, ""), *((f"{name}-{arm}", arm) for arm in OWN)):
            for row in self.analysis(sweep)["rows"] if sweep in self.sweeps else ():
                if _kind(self.sweeps[sweep]) != _kind(self.sweeps[name]):
                    raise SystemExit(f"{sweep} has other texts, another device or another precision than {name}")
                losses = [run["log_loss"]["test"] for run in self.sweeps[sweep]["runs"] if run["arm"] == row["label"]]
                rows.append({**row, "label": arm or row["label"], "log_losses": losses})
                scores = dict(zip(row["seeds"], row["f1_macro"]["by_seed"], strict=True))
                if rows[-1]["label"] == "none":
                    plain = scores
                elif arm and (seeds := sorted({*scores} & {*plain})):
                    values = [scores[seed] - plain[seed] for seed in seeds]
                    test = {"by_seed": values, **spread(values), "p_value": float(sign_flip_p(values))}
                    rows[-1]["difference"] = {"seeds": seeds, "f1_macro": test}
        tested = [row for row in rows if row.get("difference", {}).get("f1_macro")]
        found = [row["difference"]["f1_macro"] for row in tested]
        for row, one, adjusted in zip(tested, found, holm([one["p_value"] for one in found]), strict=True):
            row["difference"] = {**row["difference"], "f1_macro": {**one, "p_holm": adjusted}}
        return rows

    def together(self, p: float, names: list[str], metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return spread and sign-flip p-value of the mean difference over tasks, one value per seed.

        Tasks are averaged first: their runs of one seed share the initial weights, and some their texts, so that they
        are not independent. Tasks with the same texts count as one. Seeds that a task lacks are left out.
        """
        corpora: dict[str, list[list[float]]] = {}
        for name, changes in zip(names, _of_all_seeds([self.changes(name, p, metric) for name in names]), strict=True):
            corpora.setdefault(SAME_TEXTS.get(name, name), []).append(changes)
        values = np.mean([np.mean(group, axis=0) for group in corpora.values()], axis=0).tolist() if corpora else []
        return {**spread(values), "p_value": float(sign_flip_p(values)), "by_seed": values} if len(values) > 1 else None

    def same_seeds(self, names: Iterable[str], p: float) -> list[dict[str, Any]]:
        """Return macro-F1 of sweeps at a rate, over the seeds that all have; empty if there are none."""
        rows = [self.row(name, p) for name in names]
        scores = [dict(zip(row["seeds"], row["f1_macro"]["by_seed"], strict=True)) if row else {} for row in rows]
        return [{"by_seed": values, **spread(values)} for values in _of_all_seeds(scores) if values]


def _of_all_seeds(by_seed: list[dict[int, float]]) -> list[list[float]]:
    """Return the values of the seeds that all have, in their order."""
    seeds = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    return [[values[seed] for seed in seeds] for values in by_seed]


def _kind(sweep: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the runs of sweeps that are compared must have in common."""
    devices = {one["device"] for one in sweep["environments"]}
    return sweep["texts"], devices, {run["precision"] for run in sweep["runs"]}


def pooled(effects: Sequence[float], variances: Sequence[float]) -> dict[str, Any]:
    """Return the mean of the effects on data sets by random effects, with their standard deviation `tau` (REML).

    `interval` and `p_value` are Hartung and Knapp's (2001); `prediction` is where the effect on another data set is
    expected (95%; Higgins, Thompson and Spiegelhalter 2009), None for two data sets.
    """
    y, v, count = np.asarray(effects), np.asarray(variances), len(effects)
    squared = float(y.var(ddof=1))
    for _ in range(1000):  # steps to where the restricted likelihood is highest (Viechtbauer 2005)
        weights = 1 / (v + squared)
        mean = weights @ y / weights.sum()
        own = weights**2 @ ((y - mean) ** 2 - v) / (weights**2).sum()
        squared = max(0.0, float(own + 1 / weights.sum()))
    error = math.sqrt(weights @ (y - mean) ** 2 / ((count - 1) * weights.sum()))
    bounds = [float(mean + side * stats.t.ppf(0.975, count - 1) * error) for side in (-1, 1)]
    expected = None
    if count > 2:
        reach = stats.t.ppf(0.975, count - 2) * math.hypot(error, math.sqrt(squared))
        expected = [float(mean - reach), float(mean + reach)]
    p_value = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else 0.0
    return {
        "mean": float(mean), "tau": math.sqrt(squared), "interval": bounds, "prediction": expected, "p_value": p_value
    }  # fmt: skip


def clear(found: dict[str, Any]) -> bool:
    """Return whether the t interval and the bootstrap interval of a difference exclude 0 on the same side."""
    bounds = [*(found["interval"] or [0]), *(found["bootstrap"] or [0])]
    return min(bounds) > 0 or max(bounds) < 0


def paired(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return spread and values of `one` minus `other`, both with the same seeds."""
    values = [a - b for a, b in zip(one["by_seed"], other["by_seed"], strict=True)]
    return {**spread(values), "by_seed": values}

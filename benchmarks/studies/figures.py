"""The figures of the masking study, read from `benchmarks/results/masking/*.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokmask_peft.study.statistics import sign_flip_p, spread

RESULTS = Path(__file__).parent.parent / "results"
STUDY = RESULTS / "masking"
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
SHORT = {
    "trec": "TREC",
    "afrisenti_twi": "AfriSenti Twi",
}
"""Tasks that were trained with 500 texts, too."""
COSTS_OF = "trec-500-arms"
"""The sweep whose texts `benchmarks/arms_cost.py` takes."""
SAME_TEXTS = {"ud_tur_deu_lid": "ud_tur_deu", "ud_tur_deu_pos": "ud_tur_deu"}
"""Tasks that are labels of the same texts, which count as one where tasks are averaged."""


@dataclass(frozen=True, slots=True)
class Study:
    """What was collected.

    Attributes:
        sweeps: content of the JSON by name of the sweep.
        costs: CPU time of an optimizer step by regularizers, as a multiple of that without any, on `COSTS_OF`.
    """

    sweeps: dict[str, dict[str, Any]]
    costs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path = STUDY) -> Study:
        """Read what is there; sweeps that have not run are left out of the page."""
        files = sorted(folder.glob("*.json"))
        sweeps = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
        cost = folder.parent / "arms_cost.json"
        table = json.loads(cost.read_text(encoding="utf-8"))["table"] if cost.is_file() else []
        return cls(sweeps, {row["what"]: row["median"] for row in table})

    def costs_of(self, name: str) -> dict[str, float]:
        """Return what the arms of a sweep cost; nothing where that was not measured on its texts."""
        return self.costs if name == COSTS_OF else {}

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
        found: dict[str, Any] = self.sweeps[name]["analysis"]
        return found

    def row(self, name: str, p: float) -> dict[str, Any] | None:
        """Return the line of a masking rate, everything else as the recipe has it; none where it has not run."""
        rows = self.analysis(name)["rows"] if name in self.sweeps else []
        return next((row for row in rows if row["p"] == p and row["regularizers"] == "recipe"), None)

    def masked_rates(self) -> list[float]:
        """Return the rates above 0."""
        found = {row["p"] for name in self.tasks for row in self.analysis(name)["rows"] if row["p"] > 0}
        return sorted(found)

    def difference(self, name: str, p: float, metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return the paired differences of a rate from p = 0."""
        found: dict[str, Any] | None = ((self.row(name, p) or {}).get("difference") or {}).get(metric)
        return found

    def changes(self, name: str, p: float, metric: str = "f1_macro") -> dict[int, float]:
        """Return the paired difference of a rate from p = 0 for each seed; none where there is no such rate."""
        found = self.difference(name, p, metric)
        if found is None:
            return {}
        row = self.row(name, p) or {}
        return dict(zip(row["difference"]["seeds"], found["by_seed"], strict=True))

    def contrast(self, one: str, other: str, p: float, metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return spread of the difference that masking makes in `one` minus that in `other`, over seeds of both.

        Besides, the mean differences `one` and `other` over these seeds. None with less than two of them.
        """
        first, second = self.changes(one, p, metric), self.changes(other, p, metric)
        seeds = sorted({*first} & {*second})
        if len(seeds) < 2:
            return None
        return {
            **spread([first[seed] - second[seed] for seed in seeds]),
            "one": float(np.mean([first[seed] for seed in seeds])),
            "other": float(np.mean([second[seed] for seed in seeds])),
        }

    def together(self, p: float, names: list[str], metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return spread and sign-flip p-value of the mean difference over tasks, a value per seed.

        Tasks are averaged first: their runs of one seed share the initial weights, and some their texts, so they are
        no observations of their own. Tasks with the same texts count as one. Seeds that a task lacks are left out.
        """
        changes = {name: self.changes(name, p, metric) for name in names}
        seeds = sorted(set.intersection(*map(set, changes.values()))) if changes else []
        if len(seeds) < 2:
            return None
        corpora: dict[str, list[str]] = {}
        for name in names:
            corpora.setdefault(SAME_TEXTS.get(name, name), []).append(name)
        values = [
            float(np.mean([np.mean([changes[name][seed] for name in group]) for group in corpora.values()]))
            for seed in seeds
        ]
        return {**spread(values), "p_value": float(sign_flip_p(values)), "by_seed": values}


def counted(number: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def clear(found: dict[str, Any]) -> bool:
    """Tell whether the t interval and the bootstrap interval of a difference both leave out 0, on the same side."""
    if not found["interval"] or not found["bootstrap"]:
        return False
    (low, high), (least, most) = found["interval"], found["bootstrap"]
    return (low > 0 and least > 0) or (high < 0 and most < 0)


def with_seeds(row: dict[str, Any], seeds: Iterable[int], metric: str = "f1_macro") -> dict[str, Any]:
    """Return the scores of a row for those of its seeds that are asked for."""
    kept = {seed: value for seed, value in zip(row["seeds"], row[metric]["by_seed"], strict=True) if seed in seeds}
    return {"seeds": list(kept), metric: {"by_seed": list(kept.values()), **spread(list(kept.values()))}}


def paired(one: dict[str, Any], other: dict[str, Any], metric: str = "f1_macro") -> dict[str, Any]:
    """Return spread and values of `one` minus `other`, over the seeds that both rows have."""
    first, second = (dict(zip(row["seeds"], row[metric]["by_seed"], strict=True)) for row in (one, other))
    values = [first[seed] - second[seed] for seed in first if seed in second]
    return {**spread(values), "by_seed": values}

"""The figures of the masking study, read from `benchmarks/results/masking/*.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
}
"""The sweeps over masking rates, in the order of the page."""


@dataclass(frozen=True, slots=True)
class Study:
    """What was collected.

    Attributes:
        sweeps: content of the JSON by name of the sweep.
    """

    sweeps: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path = STUDY) -> Study:
        """Read what is there; sweeps that have not run are left out of the page."""
        files = sorted(folder.glob("*.json"))
        return cls({file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files})

    @property
    def tasks(self) -> list[str]:
        """Names of the sweeps over masking rates that have run."""
        return [name for name in TITLES if name in self.sweeps]

    @property
    def whole_tasks(self) -> list[str]:
        """Those with all training texts."""
        return [name for name in self.tasks if "-500" not in name]

    def analysis(self, name: str) -> dict[str, Any]:
        """Return the statistics of a sweep, as `tokmask report` writes them."""
        found: dict[str, Any] = self.sweeps[name]["analysis"]
        return found

    def row(self, name: str, p: float) -> dict[str, Any] | None:
        """Return the line of a masking rate, everything else as the recipe has it."""
        rows = self.analysis(name)["rows"]
        return next((row for row in rows if row["p"] == p and row["regularizers"] == "recipe"), None)

    def masked_rates(self) -> list[float]:
        """Return the rates above 0."""
        found = {row["p"] for name in self.tasks for row in self.analysis(name)["rows"] if row["p"] > 0}
        return sorted(found)

    def difference(self, name: str, p: float, metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return the paired differences of a rate from p = 0."""
        found: dict[str, Any] | None = ((self.row(name, p) or {}).get("difference") or {}).get(metric)
        return found

    def together(self, p: float, names: list[str], metric: str = "f1_macro") -> dict[str, Any] | None:
        """Return spread and sign-flip p-value of the mean difference over tasks, a value per seed.

        Tasks are averaged first: their runs of one seed share the initial weights, and some their texts, so they are
        no observations of their own. Seeds that a task lacks are left out.
        """
        found = [one for name in names if (one := self.row(name, p)) and self.difference(name, p, metric)]
        changes = [
            dict(zip(one["difference"]["seeds"], one["difference"][metric]["by_seed"], strict=True)) for one in found
        ]
        seeds = sorted(set.intersection(*map(set, changes))) if changes else []
        if len(seeds) < 2 or len(found) < len(names):
            return None
        values = [float(np.mean([one[seed] for one in changes])) for seed in seeds]
        return {**spread(values), "p_value": float(sign_flip_p(values)), "by_seed": values}

    def is_clear(self, name: str, p: float, metric: str = "f1_macro") -> bool:
        """Tell whether both the t interval over seeds and the bootstrap over seeds and texts leave out 0."""
        found = self.difference(name, p, metric)
        if not found or not found["interval"] or not found["bootstrap"]:
            return False
        (low, high), (least, most) = found["interval"], found["bootstrap"]
        return (low > 0 and least > 0) or (high < 0 and most < 0)


def paired(one: dict[str, Any], other: dict[str, Any], metric: str = "f1_macro") -> dict[str, Any]:
    """Return spread and values of `one` minus `other`, over the seeds that both rows have."""
    first, second = (dict(zip(row["seeds"], row[metric]["by_seed"], strict=True)) for row in (one, other))
    values = [first[seed] - second[seed] for seed in first if seed in second]
    return {**spread(values), "by_seed": values}

"""Read what a sweep goes over from the command line: lists, ranges, seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokmask_peft.recipe import Recipe
from tokmask_peft.recipe.errors import all_fields, section_of

RESERVED = {
    "seed": "--seeds 1,2,3",
    "masking.p": "--p 0,0.1",
    "name": "--name NAME (each run is named by its place in the grid)",
    "output_dir": "output_dir=FOLDER, for the whole sweep",
}

_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"


@dataclass(frozen=True, slots=True)
class Axis:
    """A recipe key and the values that it takes.

    Attributes:
        key: dotted.
        values: as they were written; empty for a range.
        low: lower bound of a range.
        high: its upper bound.
        log: draw the logarithm uniformly.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    log: bool = False

    def suggest(self, trial: Any) -> str:
        """Let an Optuna trial choose a value; return it as text."""
        if self.values:
            return str(trial.suggest_categorical(self.key, list(self.values)))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return str(trial.suggest_int(self.key, self.low, self.high, log=self.log))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        if self.values:
            return {"values": list(self.values)}
        return {"low": self.low, "high": self.high, "log": self.log}


def read_axis(text: str, problems: list[str]) -> Axis | None:
    """Read `key=1,2,3`, or a range `key=low..high` or `key=low..high:log`, of `--grid`."""
    key, sign, written = text.partition("=")
    key = key.strip()
    if not sign or not key or not written.strip():
        problems.append(f"--grid {text}: expected dotted.key=value,value, as training.learning_rate=1e-4,3e-4")
        return None
    if key in RESERVED:
        problems.append(f"--grid {key}: use {RESERVED[key]}")
        return None
    field = next((field for name, field in Recipe.model_fields.items() if name == key), None)
    if field is not None and section_of(field.annotation) is not None:
        known = [path for path, _ in all_fields() if path.startswith(f"{key}.")]
        problems.append(f"--grid {key}: is a section; name a key in it, such as {', '.join(known[:3])}")
        return None
    found = re.fullmatch(rf"\s*({_NUMBER})\.\.({_NUMBER})(:log)?\s*", written)
    return _range(key, found, problems) if found else _listed(key, written, problems)


def read_rates(text: str, problems: list[str]) -> tuple[str, ...]:
    """Read the masking rates of `--p`."""
    rates = split_values(text)
    for rate in rates:
        try:
            if 0 <= float(rate) < 1:
                continue
        except ValueError:
            pass
        problems.append(f"--p {text}: '{rate}' is no masking rate; expected numbers from 0 to below 1, as 0,0.1,0.2")
        return ()
    if len({float(rate) for rate in rates}) < len(rates) or not rates:
        problems.append(f"--p {text}: {'a rate is given twice' if rates else 'expected rates, as 0,0.1,0.2'}")
        return ()
    return rates


def read_seeds(text: str, problems: list[str]) -> tuple[int, ...]:
    """Read `--seeds`: a number n means the seeds 1 to n; several, those."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) and int(part) < 2**32 for part in parts if part) or not any(parts):
        problems.append(f"--seeds {text}: expected how many (5 is the seeds 1 to 5), or which: 11,12,13 (one: 11,)")
        return ()
    seeds = [int(part) for part in parts if part]
    if len(parts) == 1:
        if not 1 <= seeds[0] <= 1000:
            problems.append(f"--seeds {text}: expected 1 to 1000 seeds; for the one seed {text} write {text},")
            return ()
        return tuple(range(1, seeds[0] + 1))
    if len(set(seeds)) < len(seeds):
        problems.append(f"--seeds {text}: a seed is given twice")
    return tuple(seeds)


def split_values(text: str) -> tuple[str, ...]:
    """Split at commas, but not at those inside brackets, braces or quotes."""
    found = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*'|[^,])+", text)
    return tuple(part.strip() for part in found if part.strip())


def _listed(key: str, written: str, problems: list[str]) -> Axis | None:
    values = split_values(written)
    if len(set(values)) < len(values):
        problems.append(f"--grid {key}: a value is given twice in {written}")
        return None
    return Axis(key, values)


def _range(key: str, found: re.Match[str], problems: list[str]) -> Axis | None:
    whole = all(re.fullmatch(r"[-+]?\d+", part) for part in found.group(1, 2))
    low, high = ((int if whole else float)(part) for part in found.group(1, 2))
    if low >= high or (found[3] and low <= 0):
        rule = "above 0 and rising" if found[3] else "rising"
        problems.append(f"--grid {key}: the range {found[0].strip()} is not {rule}")
        return None
    return Axis(key, (), low, high, bool(found[3]))

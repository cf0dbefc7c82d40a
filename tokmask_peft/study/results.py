"""From the runs of a sweep to what may be said about its arms."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokmask_peft.artifacts import Result, RunFolder, read_log
from tokmask_peft.errors import SweepError, boundary, read_json
from tokmask_peft.study import statistics
from tokmask_peft.study.plan import AS_RECIPE, NONE, SWEEP_FILE, Arm
from tokmask_peft.study.statistics import MEANINGS, spread
from tokmask_peft.training.metrics import (
    METRICS,
    Predictions,
    bootstrap_differences,
    entity_counts,
    percentile_interval,
    text_counts,
)

REPLICATES = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """What is compared over seeds: one arm (see `plan.Arm`) under one setting of the `--grid` axes."""

    setting: tuple[tuple[str, str], ...]
    regularizers: str
    p: float

    @property
    def is_reference(self) -> bool:
        """Whether other arms of the setting are compared with this one."""
        return self.p == 0 and self.regularizers in (NONE, AS_RECIPE)

    @property
    def label(self) -> str:
        """Name of the arm, and its setting."""
        arm = Arm(self.regularizers, str(self.p)).name
        return "; ".join([arm, *(f"{key.rpartition('.')[2]} = {value}" for key, value in self.setting)])


@dataclass(frozen=True, slots=True)
class SweepResults:
    """The finished runs of a sweep by row and seed, rows in the sweep's order, and the cells without a result."""

    name: str
    task: str
    runs: dict[Row, dict[int, Result]]
    folders: dict[tuple[Row, int], RunFolder]
    missing: tuple[str, ...]

    @property
    def all_runs(self) -> list[Result]:
        """The results of all rows and seeds."""
        return [run for runs in self.runs.values() for run in runs.values()]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What arms are compared by: F1 of entities, too, if all runs were scored by it."""
        found = all("f1_entities" in part for run in self.all_runs for part in (run.scored, run.validation))
        return (*METRICS, "f1_entities") if found else METRICS

    @property
    def split(self) -> str:
        """The split that the report is about: test if every run was scored on it."""
        return "test" if all(run.test is not None for run in self.all_runs) else "validation"

    def scores(self, row: Row, metric: str, split: str | None = None) -> dict[int, float]:
        """Return the scores of a row by seed."""
        return {seed: float(getattr(run, split or self.split)[metric]) for seed, run in self.runs[row].items()}


def read_sweep(folder: Path) -> SweepResults:
    """Read a sweep's folder; rows by setting and regularizers in the sweep's order, then by rate, references first.

    SweepError if it is not a sweep, has no finished run, or has no arms; RunError if a result cannot be read.
    """
    file = folder / SWEEP_FILE
    if not file.is_file():
        raise SweepError(f"{folder} is not the folder of a sweep (it holds no {SWEEP_FILE})", code="not-a-sweep")
    sweep, folders = read_json(file, SweepError, "bad-sweep"), dict[tuple[Row, int], RunFolder]()
    with boundary(f"reading {file}", SweepError, "bad-sweep"):
        if sweep["sampler"] != "grid":
            problem = f"drew its values ({sweep['sampler']}), so there are no arms to compare seed by seed"
            remedy = "Its trials are in its storage; compare the best values with a grid over seeds."
            raise SweepError(f"the sweep {sweep['name']} {problem}. {remedy}", code="no-arms")
        for name, cell in sweep["cells"].items():
            row = Row(tuple(sorted(cell["setting"].items())), cell["arm"]["regularizers"], float(cell["arm"]["p"]))
            folders[row, int(cell["seed"])] = RunFolder(folder / name)
    missing = tuple(run.root.name for run in folders.values() if not run.finished())
    finished = {key: run for key, run in folders.items() if run.finished()}
    if not finished:
        remedy = "run it with the command that began it"
        raise SweepError(f"the sweep {folder} has no finished run yet; {remedy}", code="no-finished-run")
    rows = [row for row, _ in finished]
    settings, kinds = ([getattr(row, name) for row in rows] for name in ("setting", "regularizers"))

    def place(row: Row) -> tuple[Any, ...]:
        return settings.index(row.setting), not row.is_reference, row.p > 0, kinds.index(row.regularizers), row.p

    runs: dict[Row, dict[int, Result]] = {row: {} for row in sorted(rows, key=place)}
    for row, seed in sorted(finished, key=lambda key: key[1]):
        runs[row][seed] = Result.read(finished[row, seed].result)
    return SweepResults(sweep["name"], sweep["recipe"]["data"]["task"], runs, finished, missing)


def analyse(results: SweepResults) -> dict[str, Any]:
    """Return everything that the report says, JSON-able."""
    rows: dict[Row, dict[str, Any]] = {}
    for row, runs in results.runs.items():
        speeds = [run.speed for run in runs.values() if run.speed.get("steps")]
        seconds = [speed["step_seconds"] / speed["steps"] for speed in speeds]  # a resumed run timed its last steps
        by_seed = {metric: results.scores(row, metric) for metric in results.metrics}
        by_seed["validation_f1_macro"] = results.scores(row, "f1_macro", "validation")
        rows[row] = {
            "arm": Arm(row.regularizers, str(row.p)).name,
            "label": row.label,
            "setting": dict(row.setting),
            "regularizers": row.regularizers,
            "p": row.p,
            "is_reference": row.is_reference,
            "seeds": list(runs),
            **{name: {"by_seed": [*of.values()], **spread([*of.values()])} for name, of in by_seed.items()},
            "seconds_per_step": float(np.median(seconds)) if seconds else None,
        }
    references = {row.setting: row for row in reversed(rows) if row.is_reference}  # of several the first
    for setting, reference in references.items():
        others = [row for row in rows if row.setting == setting and row != reference]
        for row in others:
            rows[row]["difference"] = _difference(results, reference, row)
            part, whole = rows[row]["seconds_per_step"], rows[reference]["seconds_per_step"]
            rows[row]["cost"] = part / whole if part and whole else None
        for metric in results.metrics:
            tested = [found[metric] for row in others if metric in (found := rows[row]["difference"])]
            for one, adjusted in zip(tested, statistics.holm([one["p_value"] for one in tested]), strict=True):
                one["p_holm"] = adjusted
    floors = [run.baseline for run in results.all_runs if run.baseline and results.split == "test"]
    baseline = {name: float(np.mean([floor[name] for floor in floors])) for name in results.metrics if floors}
    versions: dict[str, set[str]] = {}
    for run in results.all_runs:
        for package, version in run.speed.get("environment", {}).get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    return {
        "sweep": results.name,
        "task": results.task,
        "scored_on": results.split,
        "seeds": sorted({seed for runs in results.runs.values() for seed in runs}),
        "rows": list(rows.values()),
        "chosen_by_validation": _choice(results),
        "paper": _paper(results.task, list(rows.values())),
        "signs": _signs(results, rows),
        "baseline": baseline or None,
        "missing": list(results.missing),
        "versions": {package: sorted(found) for package, found in versions.items()},
        "methods": MEANINGS["sweep"],
    }


def _signs(results: SweepResults, rows: dict[Row, dict[str, Any]]) -> dict[str, Any]:
    """Return what the paper says a failure of masking looks like, where the sweep shows it (arXiv 2505.11746).

    `falling`: arms whose mean macro-F1 falls with every rate, of three at least. `stuck`: arms whose training loss in
    the last tenth of the run is at least .95 of that in the first, on average over seeds. `unshown`: settings in which
    no difference is established, with the differences that the seeds would mostly show (paired t-test, at the level
    that Holm's correction gives the clearest arm), and whether the sign-flip test can establish any (`reachable`).
    """
    found: dict[str, Any] = {"falling": [], "stuck": [], "unshown": []}
    for setting in dict.fromkeys(row.setting for row in rows):
        of_setting = {row: about for row, about in rows.items() if row.setting == setting}
        for kind in dict.fromkeys(row.regularizers for row in of_setting):
            by_rate = sorted((row for row in of_setting if row.regularizers == kind), key=lambda row: row.p)
            scores = [of_setting[row]["f1_macro"]["mean"] for row in by_rate]
            if len(scores) > 2 and by_rate[0].p == 0 and all(a > b for a, b in itertools.pairwise(scores)):
                rates = [row.p for row in by_rate]
                found["falling"].append({"label": by_rate[-1].label, "rates": rates, "f1_macro": scores})
        differences = (about.get("difference", {}).get("f1_macro") for about in of_setting.values())
        shown = [one for one in differences if one]
        sds = [one["sd"] for one in shown if one["sd"]]
        if sds and all(one["p_holm"] > 0.05 for one in shown):
            seeds = min(one["n"] for one in shown if one["sd"])
            gains = [statistics.smallest_gain(sd, seeds, alpha=0.05 / len(shown)) for sd in (min(sds), max(sds))]
            reachable = len(shown) * min(one["smallest_p"] for one in shown) <= 0.05
            about = {"setting": dict(setting), "seeds": seeds, "gains": gains, "reachable": reachable}
            found["unshown"].append(about)
    for row, runs in results.runs.items():
        shares = []
        for seed in () if row.is_reference else runs:
            losses = [line["loss"] for line in read_log(results.folders[row, seed].log) if line.get("loss") is not None]
            tenth = math.ceil(len(losses) / 10)
            if len(losses) >= 5 and (first := float(np.mean(losses[:tenth]))) > 0:
                shares.append(float(np.mean(losses[-tenth:])) / first)
        if shares and np.mean(shares) >= 0.95:
            found["stuck"].append({"label": row.label, "share": float(np.mean(shares))})
    return found


def _difference(results: SweepResults, reference: Row, row: Row) -> dict[str, Any]:
    """Return the differences of a row from the reference, seed by seed; without a bootstrap, the reason."""
    seeds = [seed for seed in results.runs[reference] if seed in results.runs[row]]
    if not seeds:
        return {"seeds": seeds}
    replicates, problem = _replicates(results, reference, row, seeds)
    differences: dict[str, Any] = {"seeds": seeds, "bootstrap_problem": problem or None}
    for metric in results.metrics:
        before, after = results.scores(reference, metric), results.scores(row, metric)
        values = [after[seed] - before[seed] for seed in seeds]
        differences[metric] = {
            "by_seed": values,
            **spread(values),
            "bootstrap": percentile_interval(replicates[metric]) if replicates else None,
            "p_value": float(statistics.sign_flip_p(values)),
            "smallest_p": statistics.smallest_p(len(seeds)),
            "effect_size": statistics.hedges_gz(values),
        }
    return differences


def _replicates(results: SweepResults, reference: Row, row: Row, seeds: list[int]) -> tuple[dict[str, Any], str]:
    """Return bootstrap replicates of the differences of a row from the reference by metric, or none and the reason."""
    counts: dict[Row, list[Any]] = {reference: [], row: []}
    entities: dict[Row, list[Any]] = {reference: [], row: []}
    gold = None
    for one, folder in ((one, results.folders[one, seed]) for one in counts for seed in seeds):
        file = folder.predictions
        saved = read_json(file, SweepError, "bad-predictions") if file.is_file() else {}
        if results.split not in saved:
            return {}, f"{folder.root.name} has no predictions.json"
        found = saved[results.split]
        if gold not in (None, found["gold"]):
            return {}, f"the {results.split} texts differ between seeds"
        gold = found["gold"]
        counts[one].append(text_counts(gold, found["predicted"], len(saved["labels"])))
        if "f1_entities" in results.metrics:
            entities[one].append(entity_counts(Predictions.from_dict(found), saved["labels"]))
    replicates: dict[str, Any] = bootstrap_differences(counts, reference, REPLICATES)[row]
    if "f1_entities" in results.metrics:  # the same draws, since the seed is the same
        replicates["f1_entities"] = bootstrap_differences(entities, reference, REPLICATES)[row]["f1_macro"]
    return replicates, ""


def _choice(results: SweepResults) -> dict[str, Any]:
    """Return what validation would have chosen, for each seed and over all, and its scores."""
    validation = {row: results.scores(row, "f1_macro", "validation") for row in results.runs}
    seeds = sorted({seed for scores in validation.values() for seed in scores})
    whole = [seed for seed in seeds if all(seed in scores for scores in validation.values())]
    references = [row for row in results.runs if row.is_reference]
    scored = {metric: {row: results.scores(row, metric) for row in results.runs} for metric in results.metrics}
    per_seed: list[dict[str, Any]] = []
    for seed in whole:  # of equals the first, which is the one with less masking
        chosen = max(results.runs, key=lambda row: validation[row][seed])
        scores = {metric: scored[metric][chosen][seed] for metric in results.metrics}
        per_seed.append({"seed": seed, "label": chosen.label, "p": chosen.p, **scores})
        if references:
            plain = max(references, key=lambda row: validation[row][seed])
            per_seed[-1]["gain"] = scores["f1_macro"] - scored["f1_macro"][plain][seed]
    found: dict[str, Any] = {"per_seed": per_seed, "seeds_left_out": sorted(set(seeds) - set(whole))}
    if whole:
        for metric in (*results.metrics, *(["gain"] if references else [])):
            found[metric] = spread([one[metric] for one in per_seed])
        best = max(results.runs, key=lambda row: np.mean([validation[row][seed] for seed in whole]))
        overall = {metric: spread([scored[metric][best][seed] for seed in whole]) for metric in results.metrics}
        found["overall"] = {"label": best.label, "p": best.p, **overall}
    return found


def _paper(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many seeds would show the gains that the authors report, given how much the differences vary here."""
    paper, needed = MEANINGS["paper"].get(task, {"task": "", "scores": {}}), []
    gains = {backbone: after - before for backbone, (before, after) in paper["scores"].items()}
    for row in rows:
        found = row.get("difference", {}).get("f1_macro")
        if gains and row["p"] > 0 and found and found["sd"] is not None:
            sds, counts = (found["sd"], *statistics.sd_interval(found["sd"], found["n"])), {}
            for backbone, gain in gains.items():
                seeds, *ends = (statistics.seeds_needed(gain, sd) for sd in sds)
                counts[backbone] = {"seeds": seeds, "interval": ends}
            needed.append({"label": row["label"], "sd": sds[0], "sd_interval": list(sds[1:]), "needed": counts})
    return {"task": paper["task"], "gains": gains, "rows": needed}

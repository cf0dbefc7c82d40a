"""What the masking study found, in sentences that are made from its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from figures import SHORT, TITLES, Study, clear, counted

from tokmask_peft.study.report import interval, signed
from tokmask_peft.study.statistics import smallest_p

CLEAR = (
    "Clear: the 95% t interval of the paired differences over seeds and the bootstrap interval over seeds and texts "
    "both leave out 0, without a correction for the number of comparisons."
)

LONGER = {
    "long": ("Longer training", "masking loses less, so part of its loss may be time, but these seeds cannot tell"),
    "tuned": (
        "Training tuned on validation (batches of 8 at 1e-3; the others 32 at 5e-4)",
        "masking loses less, so part of its loss may lie in how the first runs trained, but these seeds cannot tell",
    ),
}
"""How sweeps with such a suffix train, beside those without; and what to say where the seeds do not decide."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence.

    Attributes:
        text: what was found, without its full stop.
        details: the figures behind it.
        after: a sentence to follow.
        short: whether it stands where there is room for few lines.
    """

    text: str
    details: str = ""
    after: str = ""
    short: bool = True

    def __str__(self) -> str:
        told = f"{self.text} ({self.details})." if self.details else f"{self.text}."
        return f"{told} {self.after}".rstrip()


def findings(study: Study) -> list[Finding]:
    """Return the first lines of the page, the unfavourable too."""
    parts = (_overall, _clear, _tests, _pooled, _lid_and_pos, _less_data, _longer, _regularizers, _chosen, _floor)
    return [line for part in parts for line in part(study)]


def _comparisons(study: Study) -> list[tuple[str, float, dict[str, Any]]]:
    pairs = [(name, p) for name in study.tasks for p in study.masked_rates()]
    return [(name, p, found) for name, p in pairs if (found := study.difference(name, p))]


def _overall(study: Study) -> list[Finding]:
    found = _comparisons(study)
    if not found:
        return []
    means = [one["mean"] for _, _, one in found]
    sure = [one["mean"] for _, _, one in found if clear(one)]
    up, down = (sum(sign * mean > 0 for mean in sure) for sign in (1, -1))
    verdict = {(True, True): "here helped and there hurt", (True, False): "helped", (False, True): "lowered scores"}
    most = 2 * sum(mean > 0 for mean in means) > len(means), 2 * sum(mean < 0 for mean in means) > len(means)
    clearly = (up > 0, down > 0)
    against = sum(clearly) == 1 and clearly != most  # a few clear ones among many that go the other way
    said = "went no way clearly" if against else verdict.get(clearly, "changed no score clearly")
    about = f"{counted(len(study.tasks), 'sweep')}, {counted(len(study.masked_rates()), 'masking rate')}"
    text = (
        f"**Masking {said}.** Of {len(found)} comparisons with "
        f"p = 0 ({about}), mean test macro-F1 was higher with masking in {sum(mean > 0 for mean in means)}, clearly so "
        f"in {up}, and lower in {sum(mean < 0 for mean in means)}, clearly so in {down}"
    )
    return [Finding(text, after=CLEAR)]


def _clear(study: Study) -> list[Finding]:
    lines = []
    for sign, side in ((1, "higher"), (-1, "lower")):
        listed = []
        for name in study.tasks:
            rates = [(p, one["mean"]) for task, p, one in _comparisons(study) if task == name and clear(one)]
            if parts := [f"{signed(mean)} at p = {p:g}" for p, mean in rates if sign * mean > 0]:
                listed.append(f"{TITLES[name]} ({', '.join(parts)})")
        if listed:
            lines.append(Finding(f"Clearly {side}: {'; '.join(listed)}", short=False))
    return lines


def _tests(study: Study) -> list[Finding]:
    found = [(name, p, one) for name, p, one in _comparisons(study) if "p_holm" in one]
    if not found:
        return []
    reached = [f"{TITLES[name]} at p = {p:g}" for name, p, one in found if one["p_holm"] <= 0.05]
    text = (
        f"The exact sign-flip test reaches .05 after Holm's correction over the rates in {len(reached)} of {len(found)}"
    )
    most = max(one["n"] for _, _, one in found)
    cannot = f"With at most {most} seeds it cannot: {smallest_p(most):.3g} is the least before the correction."
    return [Finding(text, "; ".join(reached), cannot if smallest_p(most) > 0.05 else "", short=False)]


def _pooled(study: Study) -> list[Finding]:
    parts = []
    for p in study.masked_rates():
        if found := study.together(p, study.whole_tasks):
            up = sum(value > 0 for value in found["by_seed"])
            parts.append(f"p = {p:g} {signed(found['mean'])} (higher in {up} of {found['n']} seeds)")
    if not parts:
        return []
    text = "Mean change over the tasks with all training texts, which says nothing of others"
    return [Finding(f"{text}: {', '.join(parts)}", short=False)]


def _lid_and_pos(study: Study) -> list[Finding]:
    lid, pos = "ud_tur_deu_lid", "ud_tur_deu_pos"
    parts, sides = [], []
    for p in study.masked_rates():
        found = study.contrast(pos, lid, p)
        if found is None:
            continue
        gap = f"{signed(found['mean'])} {interval(found['interval'])}"
        parts.append(
            f"at p = {p:g} languages {signed(found['other'])}, parts of speech {signed(found['one'])}, the second "
            f"minus the first {gap}"
        )
        sides.append(tuple(_side(study, name, p) for name in (lid, pos)))
    if not parts:
        return []
    if (1, -1) in sides or (-1, 1) in sides:
        verdict = "masking clearly helps one and hurts the other"
    elif set(sides) == {(-1, -1)}:
        verdict = "masking clearly hurts both"
    elif set(sides) == {(1, 1)}:
        verdict = "masking clearly helps both"
    else:
        verdict = "there is no rate at which masking clearly helps one and hurts the other"
    return [Finding(f"Languages and parts of speech of the same Turkish-German sentences: {verdict}", "; ".join(parts))]


def _side(study: Study, name: str, p: float) -> int:
    """Return 1 where a rate is clearly higher, -1 where it is clearly lower, else 0."""
    found = study.difference(name, p)
    return 0 if not found or not clear(found) else 1 if found["mean"] > 0 else -1


def _less_data(study: Study) -> list[Finding]:
    lines = []
    for name, short in SHORT.items():
        parts, gaps = _contrasts(study, f"{name}-500", name, "with 500 texts", "with all")
        if not parts:
            continue
        verdict = _verdict(gaps, "masking does clearly better with fewer", "masking does clearly worse with fewer")
        few, whole = (study.sweeps[one]["steps"] for one in (f"{name}-500", name))
        steps = f"The runs differ in steps, too: {few} and {whole}."
        text = f"Less data, {short}, 500 texts beside all: {verdict}"
        lines.append(Finding(text, f"over {counted(gaps[0]['n'], 'seed')}, {'; '.join(parts)}", steps))
    return lines


def _longer(study: Study) -> list[Finding]:
    lines = []
    for long in study.tasks:
        short, _, how = long.rpartition("-")
        if how not in LONGER or short not in study.tasks:
            continue
        trained, undecided = LONGER[how]
        few, many = (study.sweeps[one]["steps"] for one in (short, long))
        parts, gaps = _contrasts(study, long, short, f"after {many} steps", f"after {few}")
        if not parts:
            continue
        before = [one["other"] for one in gaps]
        verdict = _verdict(gaps, "masking does clearly better", "masking does clearly worse")
        if max(before) < 0 and min(one["mean"] for one in gaps) > 0 and not any(map(_leaves_out_0, gaps)):
            verdict = undecided
        text = f"{trained}, {TITLES[short]}, {many} steps beside {few}: {verdict}"
        lines.append(Finding(text, f"over {counted(gaps[0]['n'], 'seed')}, {'; '.join(parts)}"))
    return lines


def _contrasts(
    study: Study, one: str, other: str, with_one: str, with_other: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return what masking changes in two sweeps, over the seeds of both, for each rate: as text and as figures."""
    if not {one, other} <= {*study.tasks}:
        return [], []
    gaps = {p: found for p in study.masked_rates() if (found := study.contrast(one, other, p))}
    parts = [
        f"p = {p:g}: {signed(found['one'])} {with_one}, {signed(found['other'])} {with_other}, gap "
        f"{signed(found['mean'])} {interval(found['interval'])}"
        for p, found in gaps.items()
    ]
    return parts, list(gaps.values())


def _leaves_out_0(found: dict[str, Any]) -> bool:
    return not found["interval"][0] <= 0 <= found["interval"][1]


def _verdict(gaps: Sequence[dict[str, Any]], better: str, worse: str) -> str:
    """Say on which side of 0 the intervals of the gaps lie, where one does at all."""
    sides = {found["mean"] > 0 for found in gaps if _leaves_out_0(found)}
    if len(sides) != 1:
        return "no clear difference between the two" if not sides else "better at one rate and worse at another"
    clearly = sum(map(_leaves_out_0, gaps))
    return f"{better if sides == {True} else worse} at {clearly} of {counted(len(gaps), 'rate')}"


def _regularizers(study: Study) -> list[Finding]:
    lines = []
    for name in study.sweeps:
        if not name.endswith("-arms"):
            continue
        rows = [row for row in study.analysis(name)["rows"] if "f1_macro" in row.get("difference", {})]
        found = {row["label"]: row["difference"]["f1_macro"] for row in rows}
        if not found:
            continue
        parts = []
        for sign, side in ((1, "higher"), (-1, "lower")):
            listed = [
                f"{label} ({signed(one['mean'])})"
                for label, one in found.items()
                if sign * one["mean"] > 0 and clear(one)
            ]
            parts.append(f"clearly {side}: {', '.join(listed) or 'none'}")
        best = max(found, key=lambda label: float(found[label]["mean"]))
        known = study.costs_of(name)
        costs = {label: known[label] for label in found if label in known}
        text = (
            f"Beside other regularizers, {TITLES[name.removesuffix('-arms')]}, {len(found)} arms against none at all: "
            f"{'; '.join(parts)}; highest on average: {best} ({signed(found[best]['mean'])})"
        )
        cost = ""
        if costs:
            low, high = (pick(costs, key=lambda label: float(costs[label])) for pick in (min, max))
            span = f"{costs[low]:.2f} ({low}) to {costs[high]:.2f} ({high})"
            cost = f"A step takes {span} times the CPU time of one without."
        lines.append(Finding(text, after=cost))
    return lines


def _chosen(study: Study) -> list[Finding]:
    choices = {name: study.analysis(name)["chosen_by_validation"] for name in study.tasks}
    gains = [one["gain"]["mean"] for one in choices.values() if "gain" in one]
    picks = [pick["p"] for one in choices.values() for pick in one["per_seed"]]
    if not picks or not gains:
        return []
    if not any(picks):
        return [Finding(f"Validation chose p = 0 in every seed of every sweep ({len(picks)} choices)")]
    masked = sum(p > 0 for p in picks)
    text = (
        f"Validation chose a rate above 0 in {masked} of {len(picks)} choices (a choice per sweep and seed); what it "
        f"chose scored {signed(sum(gains) / len(gains))} against no masking on the test texts, mean over "
        f"{counted(len(gains), 'sweep')} (from {signed(min(gains))} to {signed(max(gains))})"
    )
    return [Finding(text)]


def _floor(study: Study) -> list[Finding]:
    scored = {name: study.analysis(name)["baseline"] for name in study.tasks if study.row(name, 0.0)}
    floors = {name: floor for name, floor in scored.items() if floor}
    below = [
        name for name, floor in floors.items() if (study.row(name, 0.0) or {})["f1_macro"]["mean"] < floor["f1_macro"]
    ]
    what = "character n-grams with logistic regression"
    if not floors:
        return []
    if not below:
        return [Finding(f"MiniLM without masking is above {what} in each of {counted(len(floors), 'sweep')}")]
    return [Finding(f"MiniLM without masking stays below {what} on: {'; '.join(TITLES[name] for name in below)}")]

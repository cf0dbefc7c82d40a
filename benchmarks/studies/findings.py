"""What the masking study found, in sentences that are made from its figures."""

from __future__ import annotations

from figures import TITLES, Study, paired

from tokmask_peft.study.tables import signed


def findings(study: Study) -> list[str]:
    """Return the first lines of the page, the unfavourable too."""
    return [
        line
        for part in (_overall, _by_task, _longer, _lid_and_pos, _less_data, _chosen, _floor)
        for line in part(study)
    ]


def _overall(study: Study) -> list[str]:
    pairs = [(name, p) for name in study.tasks for p in study.masked_rates() if study.difference(name, p)]
    means = [study.difference(*pair)["mean"] for pair in pairs]  # type: ignore[index]
    if not pairs:
        return []
    lines = [
        f"Over {_count(len(study.tasks), 'sweep')} and {len(study.masked_rates())} masking rates, test macro-F1 with "
        f"masking was higher on average in {sum(mean > 0 for mean in means)} of {len(means)} comparisons and lower in "
        f"{sum(mean < 0 for mean in means)}."
    ]
    whole = [name for name in study.whole_tasks if all(study.difference(name, p) for p in study.masked_rates())]
    parts = []
    for p in study.masked_rates():
        if found := study.together(p, whole):
            up = sum(value > 0 for value in found["by_seed"])
            parts.append(f"p = {p:g} {signed(found['mean'])} (higher in {up} of {found['n']} seeds)")
    if parts:
        lines.append(f"Mean change over {_count(len(whole), 'task')} with all training texts: {', '.join(parts)}.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _by_task(study: Study) -> list[str]:
    clear: dict[str, list[str]] = {"higher": [], "lower": []}
    count = compared = 0
    for name in study.tasks:
        of_task: dict[str, list[str]] = {"higher": [], "lower": []}
        for p in study.masked_rates():
            found = study.difference(name, p)
            compared += found is not None
            if found and study.is_clear(name, p):
                of_task["higher" if found["mean"] > 0 else "lower"].append(f"{signed(found['mean'])} at p = {p:g}")
                count += 1
        for side, listed in of_task.items():
            if listed:
                clear[side].append(f"{TITLES[name]} ({', '.join(listed)})")
    lines = [
        f"Clearly {side} (the 95% t interval of the paired difference over seeds leaves out 0, and so does the "
        f"bootstrap over seeds and texts): {'; '.join(listed) or 'nowhere'}."
        for side, listed in clear.items()
    ]
    if compared:
        lines[-1] += (
            f" That is {count} of {compared} comparisons, without a correction for their number; those of a task share "
            "their runs without masking. No task on its own reaches .05 in the sign-flip test: five seeds cannot."
        )
    return lines


def _longer(study: Study) -> list[str]:
    short, long = "trec-500", "trec-500-long"
    if short not in study.tasks or long not in study.tasks:
        return []
    parts, smaller = [], 0
    for p in study.masked_rates():
        one, other = study.difference(short, p), study.difference(long, p)
        if one and other:
            parts.append(f"p = {p:g}: {signed(one['mean'])} after 10 epochs, {signed(other['mean'])} after 30")
            smaller += abs(other["mean"]) < abs(one["mean"])
    line = f"Longer training, TREC with 500 texts: {'; '.join(parts)}."
    if parts and smaller == len(parts):
        line += " Longer, the difference was smaller: part of what masking loses is time."
    return [line]


def _lid_and_pos(study: Study) -> list[str]:
    names = ("ud_tur_deu_lid", "ud_tur_deu_pos")
    if not all(name in study.tasks for name in names):
        return []
    parts = []
    for name, what in zip(names, ("languages", "parts of speech"), strict=True):
        means = [signed(found["mean"]) for p in study.masked_rates() if (found := study.difference(name, p))]
        parts.append(f"{what} {', '.join(means)}")
    listed = ", ".join(f"{p:g}" for p in study.masked_rates())
    return [f"The same Turkish-German sentences, change in macro-F1 at p = {listed}: {'; '.join(parts)}."]


def _less_data(study: Study) -> list[str]:
    lines = []
    for name in ("trec", "afrisenti_twi"):
        few = f"{name}-500"
        if name not in study.tasks or few not in study.tasks:
            continue
        parts = []
        for p in study.masked_rates():
            one, other = study.difference(few, p), study.difference(name, p)
            if one and other:
                parts.append(f"p = {p:g}: {signed(one['mean'])} with 500, {signed(other['mean'])} with all")
        lines.append(f"Less data, {TITLES[name]}: {'; '.join(parts)}.")
    return lines


def _chosen(study: Study) -> list[str]:
    choices = {name: study.analysis(name)["chosen_by_validation"] for name in study.tasks}
    gains = [one["gain"]["mean"] for one in choices.values() if "gain" in one]
    picks = [pick["p"] for one in choices.values() for pick in one["per_seed"]]
    if not picks or not gains:
        return []
    if not any(picks):
        return [f"Validation chose p = 0 in every seed of every sweep ({len(picks)} choices)."]
    masked = sum(p > 0 for p in picks)
    return [
        f"Validation chose a rate above 0 in {masked} of {len(picks)} choices (a choice per sweep and seed); what it "
        f"chose scored {signed(sum(gains) / len(gains))} against no masking on the test texts, mean over "
        f"{_count(len(gains), 'sweep')} (from {signed(min(gains))} to {signed(max(gains))})."
    ]


def _floor(study: Study) -> list[str]:
    below = []
    for name in study.tasks:
        floor, row = study.analysis(name)["baseline"], study.row(name, 0.0)
        if floor and row and row["f1_macro"]["mean"] < floor["f1_macro"]:
            below.append(TITLES[name])
    if not below:
        return ["MiniLM is above character n-grams with logistic regression on every task."]
    return [f"MiniLM without masking stays below character n-grams with logistic regression on: {'; '.join(below)}."]


def defaults_found(study: Study) -> list[str]:
    """Say whether the fast defaults cost score."""
    lines = []
    for suffix, what in (("", "bf16 without padding"), ("-top", "bf16 without padding, upper half of the layers")):
        parts = []
        for name in study.tasks:
            plain, fast = study.sweeps.get(f"{name}-plain"), study.sweeps.get(f"{name}{suffix}")
            if plain is None or fast is None:
                continue
            rows = [next(row for row in one["analysis"]["rows"] if row["p"] == 0.1) for one in (fast, plain)]
            found = paired(*rows)
            parts.append(f"{TITLES[name]} {signed(found['mean'])}")
        if parts:
            lines.append(f"Against fp32, padded, all layers: {what}: {'; '.join(parts)} (macro-F1, mean of the pairs).")
    return lines

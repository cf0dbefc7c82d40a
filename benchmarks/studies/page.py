"""Write `benchmarks/RESULTS.md` from the committed JSON alone.

    python benchmarks/studies/page.py

What stands in `README.md` between the marks `<!-- results -->`, `<!-- findings -->` and `<!-- speed -->` is written,
too.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from confounds_report import headline, section
from diagnostics import single_measurements
from figures import RESULTS, STUDY, TITLES, Study
from findings import findings
from plot import draw
from sections import chosen, defaults, differences, grouped, how, regularizers, scores, setting
from speed import speed_table
from sweeps import SWEEPS

from tokmask_peft.study.report import interval, markdown, mean_sd, signed

PAGE = RESULTS.parent / "RESULTS.md"
README = RESULTS.parent.parent / "README.md"


def page(study: Study) -> str:
    """Return the page."""
    parts = [
        "# Does token masking help?",
        first_lines(study),
        "One small English encoder, short trainings, hardly tuned: a measurement of this setting, not a verdict on the "
        "method, whose authors trained larger, multilingual models.",
        *setting(study),
        *scores(study),
        *differences(study),
        *chosen(study),
        *regularizers(study),
        *([section(confounds).strip()] if (confounds := _confounds()) else []),
        *defaults(study),
        *grouped(study),
        *single_measurements(RESULTS),
        *how(study, [sweep.name for sweep in SWEEPS]),
    ]
    return "\n\n".join(parts) + "\n"


def _confounds() -> dict[str, Any] | None:
    file = RESULTS / "confounds.json"
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def first_lines(study: Study, short: bool = False) -> str:
    """Return what was found, as a list; in short without the figures behind each sentence."""
    lines = findings(study)
    if confounds := _confounds():
        lines.append(headline(confounds))
    if short:
        return "\n".join(f"- {replace(line, details='')}" for line in lines if line.short)
    return "\n".join(f"- {line}" for line in lines)


def readme_table(study: Study) -> str:
    """Return the table that the README shows."""
    head = ("task", "character n-grams", "p = 0", "p = 0.1", "difference", "higher in")
    body = []
    for name in study.tasks:
        rows, found, floor = [study.row(name, p) for p in (0.0, 0.1)], study.difference(name, 0.1), study.analysis(name)
        if found is None or None in rows:
            continue
        within = interval(found["interval"])
        up = sum(value > 0 for value in found["by_seed"])
        cells = [mean_sd(row["f1_macro"]) for row in rows if row]
        body.append(
            [
                TITLES[name],
                f"{floor['baseline']['f1_macro']:.4f}" if floor["baseline"] else "",
                *cells,
                f"{signed(found['mean'])} {within}".rstrip(),
                f"{up} of {found['n']}",
            ]
        )
    return markdown((head, body))


def in_readme(text: str, study: Study) -> str:
    """Return README's text with its tables and its findings written anew."""
    marks = {
        "results": readme_table(study),
        "findings": first_lines(study, short=True),
        "speed": speed_table(RESULTS),
    }
    for mark, new in marks.items():
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(\n<!-- /{mark} -->)",
            lambda found, new=new: found[1] + new + found[2],  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    return text


def write() -> None:
    """Write page, picture and README's table."""
    study = Study.read()
    text, readme = page(study), in_readme(README.read_text(encoding="utf-8"), study)
    draw(study, STUDY / "differences.svg")
    PAGE.write_text(text, encoding="utf-8")
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    write()
    print(PAGE)

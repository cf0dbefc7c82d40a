"""Write `benchmarks/RESULTS.md` from the committed JSON alone.

    python benchmarks/studies/page.py

The table of `README.md` between the marks `<!-- results -->` is written, too.
"""

from __future__ import annotations

import json
import re

from confounds_report import section as confounds
from diagnostics import single_measurements
from figures import RESULTS, STUDY, TITLES, Study
from findings import findings
from plot import draw
from sections import chosen, defaults, differences, how, regularizers, scores, setting
from sweeps import SWEEPS

from tokmask_peft.study.tables import markdown, mean_sd, signed

PAGE = RESULTS.parent / "RESULTS.md"
README = RESULTS.parent.parent / "README.md"


def page(study: Study) -> str:
    """Return the page."""
    parts = [
        "# Does token masking help?",
        "\n".join(f"- {line}" for line in findings(study)),
        "One small English encoder, short trainings, hardly tuned: a measurement of this setting, not a verdict on the "
        "method, whose authors trained larger, multilingual models.",
        *setting(study),
        *scores(study),
        *differences(study),
        *chosen(study),
        *regularizers(study),
        *_confounds(),
        *defaults(study),
        *single_measurements(RESULTS),
        *how(study, [sweep.name for sweep in SWEEPS]),
    ]
    return "\n\n".join(parts) + "\n"


def _confounds() -> list[str]:
    file = RESULTS / "confounds.json"
    return [confounds(json.loads(file.read_text(encoding="utf-8"))).strip()] if file.is_file() else []


def readme_table(study: Study) -> str:
    """Return the table that the README shows."""
    head = ("task", "character n-grams", "p = 0", "p = 0.1", "difference", "higher in")
    body = []
    for name in study.tasks:
        rows, found, floor = [study.row(name, p) for p in (0.0, 0.1)], study.difference(name, 0.1), study.analysis(name)
        if found is None or None in rows:
            continue
        up = sum(value > 0 for value in found["by_seed"])
        cells = [mean_sd(row["f1_macro"]) for row in rows if row]
        body.append(
            [
                TITLES[name],
                f"{floor['baseline']['f1_macro']:.4f}",
                *cells,
                f"{signed(found['mean'])} [{signed(found['interval'][0])}, {signed(found['interval'][1])}]",
                f"{up} of {found['n']}",
            ]
        )
    return markdown((head, body))


def in_readme(text: str, study: Study) -> str:
    """Return README's text with its table written anew."""
    return re.sub(
        r"(<!-- results -->\n).*?(\n<!-- /results -->)",
        lambda found: found[1] + readme_table(study) + found[2],
        text,
        flags=re.DOTALL,
    )


def write() -> None:
    """Write page, picture and README's table."""
    study = Study.read()
    draw(study, STUDY / "differences.svg")
    PAGE.write_text(page(study), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), study), encoding="utf-8")


if __name__ == "__main__":
    write()
    print(PAGE)

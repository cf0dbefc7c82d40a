"""Write the tables of `docs/results.md`, `docs/speed.md` and `docs/backbones.md` from the committed JSON.

    python benchmarks/studies/page.py

A table goes between its marks, `<!-- NAME -->` and `<!-- /NAME -->`. The sentences around the tables are written by
hand; `tests/unit/benchmarks/test_results_page.py` checks their figures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from figures import RESULTS, TITLES, Study, read
from tables import TABLES

from tokmask_peft.study.report import markdown

ROOT = RESULTS.parent.parent
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("results", "speed", "backbones"))
CORPORA = {
    "trec": TITLES["trec"],
    **{name: f"AfriSenti sentiment, {language}" for name, language in
       {"kin": "Kinyarwanda", "swa": "Swahili", "tso": "Xitsonga", "twi": "Twi"}.items()},
    "sentimix": "SentiMix sentiment, Spanish-English",
    "mesent": TITLES["mesent_mareng"],
    "melid": "MeLID languages of words, Marathi-English",
    "sagt-lid": TITLES["ud_tur_deu_lid"],
    "lince-lid": "LinCE languages of words, Spanish-English",
}  # fmt: skip
BACKBONES = {"minilm": "MiniLM", "e5-small": "e5-small", "gemma-270m": "Gemma 3 270M"}
"""What `benchmarks/own_data.py` and `benchmarks/backbones.py` call their corpora and backbones."""
NOTHING = "Nothing has been measured yet."
CPU = ("default_run", "padding_free", "masking", "qlora", "predict")
BENCHMARKS = (*CPU, "first_answer", "same_score", "same_score_bound", "arms_cost")
SPEED = (
    ("the default run, MiniLM", "a Trainer in fp32, every text padded to 128",
     "{padded to 128, to the default run:.1f} times as fast; {padded to 128, to the default run with the same "
     "dropout:.1f} with the same LoRA dropout; both in fp32 {padded to 128, to the default run in fp32:.1f}"),
    ("the default run, MiniLM", "a Trainer in fp32, padded to the batch's longest",
     "{dynamic padding, to the default run:.1f} times as fast; {dynamic padding, to the default run with the same "
     "dropout:.1f} with the same LoRA dropout; both in fp32 {dynamic padding, to the default run in fp32:.1f}"),
    ("the default run, on shorter posts (Twi)", "the same two",
     "{AfriSenti Twi tweets - padded to 128, to the default run:.1f} and {AfriSenti Twi tweets - dynamic padding, to "
     "the default run:.1f} times as fast; all in fp32 {AfriSenti Twi tweets - padded to 128, to the default run in "
     "fp32:.1f} and {AfriSenti Twi tweets - dynamic padding, to the default run in fp32:.1f}"),
    ("training steps without padding", "a Trainer's steps, padded to the batch's longest",
     "{fp32 - padding-free to a Trainer's step, dynamic padding:.1f} times the sub-tokens in fp32, {bf16 - "
     "padding-free to a Trainer's step, dynamic padding:.1f} in bf16; of our own padded steps {fp32 - padding-free to "
     "padded:.1f} and {bf16 - padding-free to padded:.1f}"),
    ("adapter in the upper half of the layers", "in all",
     "{fp32 - upper half to all layers, padding-free step:.2f} of a step's time in fp32, {bf16 - upper half to all "
     "layers, padding-free step:.2f} in bf16"),
    ("masking, added to an embedding lookup", "NEFTune of transformers",
     "{masker to NEFTune:.2f} of its time, {masker, added to a lookup (ms):.2f} ms, {masker to the collator:.0f} times "
     "that of masking in the collator; {masker, added to a lookup, as a share of a step:.2%} of a step (steps as a "
     "whole: {masked step to unmasked step:.3f} of those without masking)"),
    ("QLoRA, shape of Qwen2.5-0.5B, 16 posts: bytes", "PEFT's preparation, padded to 128",
     "{bytes, to PEFT's preparation:.2f} of them, without checkpointing"),
    ("QLoRA, the same: step", "PEFT's preparation, padded and checkpointed",
     "{step, to PEFT's checkpointed one:.2f} of its time, at {bytes, to PEFT's checkpointed ones:.1f} times its bytes"),
    ("`predict`, MiniLM, with its defaults", "`transformers.pipeline` at its best batch size",
     "{as each comes - classifier bf16 to pipeline fp32:.1f} times as fast; both in fp32 {classifier to pipeline, both "
     "in fp32:.1f}, both in bf16 {classifier to pipeline, both in bf16:.1f}"),
)  # fmt: skip
"""What, compared with what, and how much, with the names of the benchmarks' rows; a colon is written as ` -`."""


def benchmark(name: str) -> str:
    """Return the table of a benchmark, and where it was measured on which texts."""
    content = read(name)
    if content is None:
        return "Not measured."
    rows = []
    for row in content["table"]:
        low, high = row["range"]
        rows.append([row["what"], f"{row['median']:g}", f"{low:g} to {high:g}", row["target"]])
    seen, texts = content["environment"], content.get("texts")
    if isinstance(texts, dict):
        texts = ", ".join(
            f"{origin} (sub-tokens: {found['mean']:.0f} on average, at most {found['longest']})"
            for origin, found in texts.items()
        )
    versions = ", ".join(f"{key} {seen['versions'][key]}" for key in ("torch", "transformers", "peft"))
    origin = f"; {texts}" if isinstance(texts, str) else ""
    table = markdown((("what", "median", "range", "target"), rows))
    return f"{table}\n\n{versions}; {seen['threads']} thread(s), {seen['device']}{origin}."


def speed(found: Callable[[str], Any] = read) -> str:
    """Return the short table of speed and memory.

    A row is left out if this machine did not measure all of it: predictions in bf16, on a CPU without it.
    """
    contents = {name: found(name) or {} for name in CPU}
    rows = [row for content in contents.values() for row in content.get("table", [])]
    figures = {row["what"].replace(": ", " - "): row["median"] for row in rows}
    ours, theirs = (f"{who}, static + saved (MiB)" for who in ("ours", "PEFT's preparation, checkpointed"))
    if ours in figures and theirs in figures:
        figures["bytes, to PEFT's checkpointed ones"] = figures[ours] / figures[theirs]
    body = []
    for what, other, template in SPEED:
        parts = re.split(r"{(.*?):(\.\d[f%])}", template)
        if all(name in figures for name in parts[1::3]):
            values = [format(figures[name], form) for name, form in zip(parts[1::3], parts[2::3], strict=True)]
            body.append([what, other, "".join(a + b for a, b in zip(parts[::3], [*values, ""], strict=True))])
    run = contents["default_run"]
    threads = run.get("environment", {}).get("threads", 1)
    computed = "bf16" if "default run, share of the bf16 matrix rate" in figures else "fp32"
    texts = [f"{name} ({about['mean']:.0f} sub-tokens on average)" for name, about in run.get("texts", {}).items()]
    origin = f" Its texts: {' and '.join(texts)}." if texts else ""
    caption = f"Medians on {threads} thread of a CPU; the default run computes in {computed} there.{origin}"
    return f"{caption}\n\n{markdown((('what', 'compared with', ''), body))}"


def spread_of(scores: Sequence[float]) -> str:
    """Write the mean of some scores, with the lowest and the highest if there are several."""
    return f"{mean(scores):.3f}" + (f" ({min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else "")


def cells_table(content: Any, key: str, head: Sequence[str], line: Callable[[Any, Any], list[str]]) -> str:
    """Return a table of a benchmark's cells: a line for all seeds of a corpus and `key`, or that there are none."""
    content = content or {"cells": []}
    order = lambda cell: ([*CORPORA].index(cell["corpus"]), cell[key])  # noqa: E731
    groups = groupby(sorted((cell for cell in content["cells"] if not cell.get("arm")), key=order), key=order)
    body = [line(rows[0], rows) for rows in ([*group] for _, group in groups)]
    if not body:
        return NOTHING
    seen = content["environment"]
    return f"{markdown((tuple(head), body))}\n\nMeasured on {seen['threads']} thread(s), {seen['device']}."


def backbones(found: Callable[[str], Any] = read) -> str:
    """Return the table of the backbones compared."""

    def line(first: Any, rows: Any) -> list[str]:
        floor, seconds, size, peak = (
            mean(row[key] for row in rows) for key in ("floor", "cpu_seconds", "adapter_bytes", "peak_bytes")
        )
        scores = [spread_of([row["f1_macro"] for row in rows]), f"{floor:.3f}", f"{seconds:,.0f}"]
        named = [CORPORA[first["corpus"]], BACKBONES[first["backbone"]], str(len(rows))]
        return [*named, *scores, f"{size / 1e6:.1f} MB", f"{peak / 1e9:.1f} GB"]

    head = ("corpus", "backbone", "seeds", "macro-F1", "n-grams", "CPU seconds", "adapter", "memory")
    return cells_table(found("backbones"), "backbone", head, line)


def own_data(found: Callable[[str], Any] = read) -> str:
    """Return the table of files of one's own with nothing set."""

    def line(first: Any, rows: Any) -> list[str]:
        floor, seconds = (mean(row[key] for row in rows) for key in ("floor", "cpu_seconds"))
        gain = f"{mean(row['f1_macro'] - row['floor'] for row in rows):+.3f}"
        verdicts = Counter(row["verdict"] for row in rows)
        said = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
        named = [CORPORA[first["corpus"]], f"{max(row['texts'] for row in rows):,}", str(len(rows))]
        scores = [spread_of([row["f1_macro"] for row in rows]), f"{floor:.3f}", gain, said]
        return [*named, *scores, str(sum(row["constant"] for row in rows)), f"{seconds:,.0f}"]

    head = ("corpus", "texts", "seeds", "macro-F1", "n-grams", "difference", "verdicts", "constant", "CPU seconds")
    return cells_table(found("own_data"), "size", head, line)


def made(study: Study) -> str:
    """Return commands, versions, machines and methods."""
    machines: dict[str, list[str]] = {}
    for name, one in study.sweeps.items():
        for found in one["environments"]:
            versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
            machine = f"{found['platform']}, {found['cpu_cores']} CPU cores, threads of a run: {found['threads']}"
            machines.setdefault(f"Versions: {versions}. Machine: {found['device']}; {machine}.", []).append(name)
    methods = study.analysis(study.tasks[0])["methods"]
    commands = "\n".join(found["command"] for found in study.sweeps.values())
    lines = [text + (f" Sweeps: {', '.join(names)}." if len(machines) > 1 else "") for text, names in machines.items()]
    methods_line = "; ".join(f"{name}: {text}" for name, text in methods.items()) + "."
    return "\n\n".join([f"```\n{commands}\n```", *lines, methods_line])


def filled(text: str, study: Study) -> str:
    """Return a page with its tables written anew."""

    def block(name: str) -> str:
        if name in BENCHMARKS:
            return benchmark(name)
        if name in TABLES:
            table = TABLES[name](study)
            return markdown(table) if table[1] else NOTHING
        return {"speed": speed, "backbones": backbones, "own data": own_data, "made": lambda: made(study)}[name]()

    pattern = r"(<!-- ([\w -]+) -->\n).*?(<!-- /\2 -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{block(found[2])}\n{found[3]}", text, flags=re.DOTALL)


def draw(study: Study, path: Path) -> None:
    """Draw the paired differences from p = 0: seeds as ticks, means as points, 95% t intervals as bars."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = study.tasks
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        axes.axhline(0, color="0.5", linewidth=0.8)
        seen = []
        for p in study.masked_rates():
            if not (found := study.difference(name, p)):
                continue
            seen += [*found["by_seed"], *(found["interval"] or [])]
            axes.plot([p] * found["n"], found["by_seed"], "_", color="C0", alpha=0.6, markersize=10)
            axes.plot([p], [found["mean"]], "o", color="C0", markersize=5)
            if found["interval"]:
                axes.plot([p, p], found["interval"], color="C0", linewidth=1.3)
        limit = 1.1 * max(map(abs, seen), default=0.01)
        axes.set_ylim(-limit, limit)
        axes.set_title(TITLES[name].replace(", ", ",\n", 1), fontsize=9)
        axes.set_xticks([0, *study.masked_rates()])
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.supxlabel("masking rate p", fontsize=9)
    figure.supylabel("change in test macro-F1", fontsize=9)
    with mpl.rc_context({"svg.hashsalt": "tokmask", "svg.fonttype": "none"}):  # the same figures make the same file
        figure.savefig(path, metadata={"Date": None})


def write() -> None:
    """Write the tables of all pages, and the picture."""
    study = Study.read()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), study), encoding="utf-8")
        print(page)
    draw(study, ROOT / "docs" / "differences.svg")


if __name__ == "__main__":
    write()

"""README's table of speed and memory, from the JSON of `make bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokmask_peft.study.report import markdown

PEFT = "PEFT's preparation"
LINES = (
    (
        "the default run, MiniLM",
        "a Trainer in fp32, every text padded to 128",
        "{padded to 128, to the default run:.1f} times as fast; "
        "{padded to 128, to the default run with the same dropout:.1f} with the same LoRA dropout; "
        "both in fp32 {padded to 128, to the default run in fp32:.1f}",
    ),
    (
        "the default run, MiniLM",
        "a Trainer in fp32, padded to the batch's longest",
        "{dynamic padding, to the default run:.1f} times as fast; "
        "{dynamic padding, to the default run with the same dropout:.1f} with the same LoRA dropout; "
        "both in fp32 {dynamic padding, to the default run in fp32:.1f}",
    ),
    (
        "the default run, on shorter posts (Twi)",
        "the same two",
        "{AfriSenti Twi tweets - padded to 128, to the default run:.1f} and "
        "{AfriSenti Twi tweets - dynamic padding, to the default run:.1f} times as fast; all in fp32 "
        "{AfriSenti Twi tweets - padded to 128, to the default run in fp32:.1f} and "
        "{AfriSenti Twi tweets - dynamic padding, to the default run in fp32:.1f}",
    ),
    (
        "training steps without padding",
        "a Trainer's steps, padded to the batch's longest",
        "{fp32 - padding-free to a Trainer's step, dynamic padding:.1f} times the sub-tokens in fp32, "
        "{bf16 - padding-free to a Trainer's step, dynamic padding:.1f} in bf16; of our own padded steps "
        "{fp32 - padding-free to padded:.1f} and {bf16 - padding-free to padded:.1f}",
    ),
    (
        "adapter in the upper half of the layers",
        "in all",
        "{fp32 - upper half to all layers, padding-free step:.2f} of a step's time in fp32, "
        "{bf16 - upper half to all layers, padding-free step:.2f} in bf16",
    ),
    (
        "masking, added to an embedding lookup",
        "NEFTune of transformers",
        "{masker to NEFTune:.2f} of its time, {masker, added to a lookup (ms):.2f} ms, "
        "{masker to the collator:.0f} times that of masking in the collator; "
        "{masker, added to a lookup, as a share of a step:.2%} of a step (steps as a whole: "
        "{masked step to unmasked step:.3f} of those without masking)",
    ),
    (
        "QLoRA, shape of Qwen2.5-0.5B, 16 posts - bytes",
        "PEFT's preparation, padded to 128",
        "{bytes, to PEFT's preparation:.2f} of them, without checkpointing",
    ),
    (
        "QLoRA, the same - step",
        "PEFT's preparation, padded and checkpointed",
        "{step, to PEFT's checkpointed one:.2f} of its time, at "
        "{bytes, to PEFT's checkpointed ones:.1f} times its bytes",
    ),
    (
        "`predict`, MiniLM, as each comes",
        "`transformers.pipeline` at its best batch size",
        "{as each comes - classifier bf16 to pipeline fp32:.1f} times as fast; "
        "both in fp32 {classifier to pipeline, both in fp32:.1f}, both in bf16 "
        "{classifier to pipeline, both in bf16:.1f}",
    ),
)
"""What, beside what, and how much, with the names of the benchmarks' rows; a colon is written as ` -`."""


def speed_table(folder: Path) -> str:
    """Return what the benchmarks in `folder` found beside what people would use instead, as Markdown.

    A line is left out where this machine did not measure all of it: predictions in bf16, on a CPU without it.
    """
    figures: dict[str, float] = {}
    for name in ("default_run", "padding_free", "masking", "qlora", "predict"):
        file = folder / f"{name}.json"
        table = json.loads(file.read_text(encoding="utf-8"))["table"] if file.is_file() else []
        figures |= {row["what"].replace(": ", " - "): row["median"] for row in table}
    ours, theirs = (figures.get(f"{what}, static + saved (MiB)") for what in ("ours", f"{PEFT}, checkpointed"))
    if ours and theirs:
        figures["bytes, to PEFT's checkpointed ones"] = ours / theirs
    run = folder / "default_run.json"
    content = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    threads = content.get("environment", {}).get("threads", 1)
    computed = "bf16" if "default run, share of the bf16 matrix rate" in figures else "fp32"
    caption = f"Medians on {threads} thread of a CPU; the default run computes in {computed} there."
    if texts := content.get("texts"):
        told = " and ".join(f"{name} ({about['mean']:.0f} sub-tokens on average)" for name, about in texts.items())
        caption += f" Its texts: {told}."
    lines = [[what.replace(" -", ":"), beside, _filled(said, figures)] for what, beside, said in LINES]
    body = [line for line in lines if line[-1]]
    return f"{caption}\n\n{markdown((('what', 'beside', ''), body))}"


def _filled(said: str, figures: Mapping[str, float]) -> str:
    """Put the figures into a sentence; empty where one is missing."""
    told = []
    for number, part in enumerate(said.replace("}", "{").split("{")):
        if number % 2 == 0:
            told.append(part)
            continue
        name, _, form = part.rpartition(":")
        if name not in figures:
            return ""
        told.append(format(figures[name], form))
    return "".join(told)

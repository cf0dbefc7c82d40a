"""README's table of speed and memory, from the JSON of `make bench`."""

from __future__ import annotations

import json
from pathlib import Path

from tokmask_peft.study.tables import markdown


def speed_table(folder: Path) -> str:
    """Return what the benchmarks in `folder` found beside what people would use instead, as Markdown.

    Raises:
        KeyError: a benchmark no longer measures what is told here.
    """
    found = {
        name: {row["what"]: row["median"] for row in json.loads((folder / f"{name}.json").read_text())["table"]}
        for name in ("default_run", "padding_free_tweets", "masking", "qlora", "predict")
    }
    run, steps, masking, qlora, predict = found.values()
    ours, theirs = (qlora[f"{what}, static + saved (MiB)"] for what in ("ours", "PEFT's preparation, checkpointed"))
    bytes_, step = qlora["bytes, to PEFT's preparation"], qlora["step, to PEFT's checkpointed one"]
    more = masking["masker, added to a lookup (ms)"] - masking["masking in the collator (ms)"]
    padded, dynamic = "padded to 128, to the default run", "dynamic padding, to the default run"
    free = {kind: steps[f"{kind}: padding-free to padded"] for kind in ("fp32", "bf16")}
    half = steps["bf16: upper half to all layers, padding-free step"]
    same = "with the same LoRA dropout"
    head = ("what", "beside", "")
    body = [
        [
            "the default run, MiniLM",
            "a Trainer in fp32, every text padded to 128",
            f"{run[padded]:.1f} times as fast; {run[padded + ' with the same dropout']:.1f} {same}; both in fp32 "
            f"{run[padded + ' in fp32']:.1f}",
        ],
        [
            "the default run, MiniLM",
            "a Trainer in fp32, padded to the batch's longest",
            f"{run[dynamic]:.1f} times as fast; {run[dynamic + ' with the same dropout']:.1f} {same}; both in fp32 "
            f"{run[dynamic + ' in fp32']:.1f}",
        ],
        [
            "training steps without padding",
            "the same, padded to the batch's longest",
            f"{free['fp32']:.1f} times the sub-tokens in fp32, {free['bf16']:.1f} in bf16",
        ],
        ["adapter in the upper half of the layers", "in all", f"{half:.2f} of a step's time"],
        [
            "masking, added to an embedding lookup",
            "NEFTune of transformers",
            f"{masking['masker to NEFTune']:.2f} of its time, {more:.2f} ms more than masking in the collator; a step "
            f"takes {masking['masked step to unmasked step']:.2f} of one without masking",
        ],
        [
            "QLoRA, shape of Qwen2.5-0.5B, 16 posts: bytes",
            "PEFT's preparation, padded to 128",
            f"{bytes_:.2f} of them, without checkpointing",
        ],
        [
            "QLoRA, the same: step",
            "PEFT's preparation, padded and checkpointed",
            f"{step:.2f} of its time, at {ours / theirs:.1f} times its bytes",
        ],
        [
            "`predict`, MiniLM, as each comes (bf16 and fp32)",
            "`transformers.pipeline` at its best batch size",
            f"{predict['as each comes: classifier bf16 to pipeline fp32']:.1f} times as fast; both in fp32 "
            f"{predict['classifier to pipeline, both in fp32']:.1f}, both in bf16 "
            f"{predict['classifier to pipeline, both in bf16']:.1f}",
        ],
    ]
    return markdown((head, body))

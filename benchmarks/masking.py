"""What masking costs: compared with NEFTune of transformers and masking in the collator, and as a share of a step.

    OMP_NUM_THREADS=1 python benchmarks/masking.py

The isolated cost is how much longer an embedding lookup of 32 x 64 sub-tokens takes with the hook, forward pass only,
as the median of many calls; for the collator it is how much longer the batch takes to make. The step is a whole MiniLM
step of the default run, with and without masking in turns on the same batch. torch._dynamo counts the graph breaks of
the lookup.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.integrations.neftune import neftune_post_forward_hook
from workload import CPU, LABELS, MINILM, Stepper, benchmark_texts, interleaved, our_model, packed_batch, ratio, report

from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.recipe.schema import ModelConfig

BATCH, LENGTH, CALLS, ROUNDS, STEPS = 32, 64, 200, 5, 20


def median_time(work: Callable[[], Any]) -> float:
    """Return the median CPU seconds of a call."""
    times = []
    for _ in range(CALLS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def masked_in_collator(ids: Tensor, special: Tensor, mask_id: int) -> Tensor:
    """Mask a padded batch as collators do: draw for every position, spare the special tokens."""
    drawn = torch.bernoulli(torch.full(ids.shape, 0.1)).bool() & ~special[ids]
    return ids.masked_fill(drawn, mask_id)


def attached(backbone: Any) -> TokenMasker:
    """Attach a masker to a backbone."""
    return TokenMasker.attach(backbone.model, backbone.tokenizer, TokenMaskConfig(p=0.1))


def isolated(backbone: Any) -> dict[str, list[float]]:
    """Return the CPU seconds that masker, NEFTune and collator add to a lookup, round by round."""
    embedding, tokenizer = find_embedding(backbone.model), backbone.tokenizer
    ids = torch.randint(1000, len(tokenizer), (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    special = torch.zeros(len(tokenizer), dtype=torch.bool)
    special[tokenizer.all_special_ids] = True
    embedding.train().requires_grad_(False)  # a masker needs gradients to be enabled; the lookup itself builds no graph
    embedding.neftune_noise_alpha = 5.0  # what NEFTune's hook reads

    def lookup(hook: AbstractContextManager[Any]) -> float:
        with hook:
            return median_time(lambda: embedding(ids))

    arms = {
        "plain": lambda: lookup(nullcontext()),
        "masker": lambda: lookup(attached(backbone)),
        "neftune": lambda: lookup(embedding.register_forward_hook(neftune_post_forward_hook)),
        "collator": lambda: median_time(lambda: masked_in_collator(ids, special, tokenizer.mask_token_id)),
    }
    found = interleaved(arms, ROUNDS)
    base = found.pop("plain")
    for name in ("masker", "neftune"):
        found[name] = [value - plain for value, plain in zip(found[name], base, strict=True)]
    return found


def steps() -> Iterator[tuple[float, float]]:
    """Yield, round by round, the median CPU seconds of a masked step and of one without, in turns on one batch."""
    set_seed(0)
    model, backbone = our_model(ModelConfig(**MINILM), masked=False, dropout=0.0)
    _, texts = benchmark_texts(backbone.tokenizer, BATCH)
    batch = packed_batch(texts)
    masker = TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.1))
    stepper = Stepper(model, backbone.dtype == torch.bfloat16, ours=True)
    for _ in range(5):
        stepper.step(batch)
    for _ in range(ROUNDS):
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * STEPS):
            masked = number % 4 in (0, 3)  # neither is always the first of its pair
            start = time.process_time()
            with nullcontext() if masked else masker.paused():
                stepper.step(batch)
            times[masked].append(time.process_time() - start)
        yield statistics.median(times[True]), statistics.median(times[False])


def graph_breaks(backbone: Any) -> int:
    """Return how often torch.compile would leave the graph in a masked lookup."""
    embedding = find_embedding(backbone.model)
    with attached(backbone):
        embedding.train()
        explained = torch._dynamo.explain(embedding)(torch.randint(1000, 2000, (2, 8)))
    return int(explained.graph_break_count)


def main() -> None:
    """Measure, print the table and write the JSON."""
    backbone = load_backbone(ModelConfig(**MINILM), "sequence", LABELS, CPU)
    found, seconds, breaks = isolated(backbone), list(steps()), graph_breaks(backbone)
    masker, step = found["masker"], statistics.median(plain for _, plain in seconds)
    shown = {
        "masker": "masker, added to a lookup (ms)",
        "neftune": "NEFTune, added to a lookup (ms)",
        "collator": "masking in the collator (ms)",
    }
    rows = {what: ([1e3 * value for value in found[name]], "") for name, what in shown.items()}
    rows |= {
        "masker to NEFTune": (ratio(found, "masker", "neftune"), "0.25"),
        "masker to the collator": (ratio(found, "masker", "collator"), ""),
        "masked step to unmasked step": ([masked / plain for masked, plain in seconds], "1.005"),
        "masker, added to a lookup, as a share of a step": ([own / step for own in masker], ""),
        "graph breaks of a compiled lookup": ([float(breaks)], "0"),
    }
    result = {"batch": [BATCH, LENGTH], "added_seconds": found, "step_seconds": seconds, "graph_breaks": breaks}
    report("masking", result, rows)


if __name__ == "__main__":
    main()

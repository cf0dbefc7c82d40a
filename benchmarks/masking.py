"""What masking costs: beside NEFTune of transformers and masking in the collator, and as a share of a training step.

    OMP_NUM_THREADS=1 python benchmarks/masking.py

The isolated cost is the time that an embedding lookup of 32 x 64 sub-tokens takes longer with the hook, forward pass
only, as the median of many calls; for the collator it is the time that making the batch takes longer. The step is a
whole MiniLM step of the default run, with and without masking, in turns on the same batch. Graph breaks are counted by
torch._dynamo on the lookup.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.integrations.neftune import neftune_post_forward_hook
from workload import CPU, MINILM, benchmark_texts, interleaved, report

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import add_adapter, inputs_as_they_come
from tokmask_peft.model.backbone import load_backbone, quick_dropout
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.recipe.schema import AdapterConfig, ModelConfig
from tokmask_peft.training.losses import ClassificationLoss

BATCH, LENGTH, CALLS, ROUNDS, STEPS = 32, 64, 200, 5, 20


def median_time(work: Callable[[], Any], calls: int = CALLS) -> float:
    """Return the median CPU seconds of a call."""
    times = []
    for _ in range(calls):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def masked_in_collator(ids: Tensor, special: Tensor, mask_id: int, p: float = 0.1) -> Tensor:
    """Mask a padded batch as collators do: draw for every position, spare the special tokens."""
    drawn = torch.bernoulli(torch.full(ids.shape, p)).bool() & ~special[ids]
    return ids.masked_fill(drawn, mask_id)


def isolated(backbone: Any) -> dict[str, list[float]]:
    """Return the added CPU seconds of a lookup by each way to disturb it, round by round."""
    embedding = find_embedding(backbone.model)
    tokenizer = backbone.tokenizer
    ids = torch.randint(1000, len(tokenizer), (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    special = torch.zeros(len(tokenizer), dtype=torch.bool)
    special[tokenizer.all_special_ids] = True
    embedding.train().requires_grad_(False)  # a masker needs gradients to be enabled; the lookup itself builds no graph

    def plain() -> float:
        return median_time(lambda: embedding(ids))

    def masker() -> float:
        with TokenMasker.attach(backbone.model, tokenizer, TokenMaskConfig(p=0.1)):
            return median_time(lambda: embedding(ids))

    def neftune() -> float:
        embedding.neftune_noise_alpha = 5.0
        handle = embedding.register_forward_hook(neftune_post_forward_hook)
        try:
            return median_time(lambda: embedding(ids))
        finally:
            handle.remove()

    def collator() -> float:
        return median_time(lambda: masked_in_collator(ids, special, tokenizer.mask_token_id))

    found = interleaved({"plain": plain, "masker": masker, "neftune": neftune, "collator": collator}, ROUNDS)
    base = found.pop("plain")
    for name in ("masker", "neftune"):
        found[name] = [value - plain for value, plain in zip(found[name], base, strict=True)]
    return found


def steps() -> list[tuple[float, float]]:
    """Return, round by round, the CPU time of a masked step and of one without, alternating on one batch."""
    set_seed(0)
    backbone = load_backbone(ModelConfig(**MINILM), "sequence", ("a", "b", "c"), CPU)
    enable_padding_free(backbone.model)
    model, _ = add_adapter(backbone, AdapterConfig(dropout=0.0), "sequence")
    model.train()
    _, texts = benchmark_texts(backbone.tokenizer, BATCH)
    batch = PackedCollator("sequence")([{"input_ids": text, "labels": n % 3} for n, text in enumerate(texts)])
    labels = batch.pop("labels")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, loss = torch.optim.AdamW(trained, lr=1e-4, fused=True), ClassificationLoss()
    masker = TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):
            output = model(**batch)
        loss(output, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with inputs_as_they_come(model, backbone.dtype == torch.bfloat16), quick_dropout(model):
        return [*_step_times(step, masker)]


def _step_times(step: Callable[[], None], masker: TokenMasker) -> Iterator[tuple[float, float]]:
    """Yield, round by round, the medians of masked and unmasked steps."""
    for _ in range(5):
        step()
    for _ in range(ROUNDS):
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * STEPS):
            masked = number % 4 in (0, 3)  # neither is always the first of its pair
            start = time.process_time()
            if masked:
                step()
            else:
                with masker.paused():
                    step()
            times[masked].append(time.process_time() - start)
        yield statistics.median(times[True]), statistics.median(times[False])


def graph_breaks(backbone: Any) -> int:
    """Return how often torch.compile would leave the graph in a masked lookup."""
    embedding = find_embedding(backbone.model)
    with TokenMasker.attach(backbone.model, backbone.tokenizer, TokenMaskConfig(p=0.1)):
        embedding.train()
        explained = torch._dynamo.explain(embedding)(torch.randint(1000, 2000, (2, 8)))
    return int(explained.graph_break_count)


def main() -> None:
    """Measure, print the table and write the JSON."""
    backbone = load_backbone(ModelConfig(**MINILM), "sequence", ("a", "b", "c"), CPU)
    found = isolated(backbone)
    seconds = steps()
    ratios = [masked / plain for masked, plain in seconds]
    share = [own / statistics.median(plain for _, plain in seconds) for own in found["masker"]]
    breaks = graph_breaks(backbone)
    pairs = zip(found["masker"], found["neftune"], found["collator"], strict=True)
    to_neftune, to_collator = zip(*((own / noise, own / other) for own, noise, other in pairs), strict=True)
    rows = {
        "masker, added to a lookup (ms)": ([1e3 * value for value in found["masker"]], ""),
        "NEFTune, added to a lookup (ms)": ([1e3 * value for value in found["neftune"]], ""),
        "masking in the collator (ms)": ([1e3 * value for value in found["collator"]], ""),
        "masker to NEFTune": (to_neftune, "0.25"),
        "masker to the collator": (to_collator, ""),
        "masked step to unmasked step": (ratios, "1.005"),
        "masker, added to a lookup, as a share of a step": (share, ""),
        "graph breaks of a compiled lookup": ([float(breaks)], "0"),
    }
    result = {"batch": [BATCH, LENGTH], "added_seconds": found, "step_seconds": seconds, "graph_breaks": breaks}
    report("masking", result, rows)


if __name__ == "__main__":
    main()

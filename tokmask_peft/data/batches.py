"""Batches: packed into one row, or filled up to a budget of sub-tokens with few long texts or many short ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from tokmask_peft.errors import RecipeError
from tokmask_peft.recipe.schema import Batching
from tokmask_peft.tasks import get_task


class PackedCollator:
    """Packs a batch into one row, for a model that takes packed rows (`model.packed`); the task packs the labels."""

    def __init__(self, task: str) -> None:
        self._task = get_task(task)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build the batch; other columns than `input_ids`, `token_type_ids`, `words` and `labels` are dropped.

        Returns:
            `input_ids` [1, total]; `cu_seqlens` int32 [texts + 1], where each text begins and the last one ends;
            `max_length`, of the longest text; and, if given, `token_type_ids` [1, total], `words` [1, total], which
            differ between texts, and `labels` as `Task.pack_labels` returns them.
        """
        import torch

        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        lengths = [len(text) for text in ids]
        batch: dict[str, Any] = {
            "input_ids": torch.cat(ids).unsqueeze(0),
            "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "max_length": max(lengths),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = torch.cat([torch.as_tensor(row["token_type_ids"]) for row in rows]).unsqueeze(0)
        if "words" in rows[0]:
            starts = zip(accumulate(lengths, initial=0), rows, strict=False)
            batch["words"] = torch.cat([start + torch.as_tensor(row["words"]) for start, row in starts]).unsqueeze(0)
        if "labels" in rows[0]:
            batch["labels"] = self._task.pack_labels([row["labels"] for row in rows])
        return batch


def padded_collator(task: str, tokenizer: Any) -> Callable[..., Any]:
    """Return what pads a batch as its task does, and `words`, if there are, with -1, the number of none."""
    pad, side = get_task(task).collator(tokenizer), tokenizer.padding_side

    def collate(rows: Sequence[Mapping[str, Any]]) -> Any:
        import torch

        batch = pad([{name: part for name, part in row.items() if name != "words"} for row in rows])
        if "words" in rows[0]:
            filled = [(row["words"], [-1] * (batch["input_ids"].shape[1] - len(row["words"]))) for row in rows]
            batch["words"] = torch.tensor([own + rest if side == "right" else rest + own for own, rest in filled])
        return batch

    return collate


MULTIPLE = 8
COUNTED_EPOCHS, DRAWS = 8, 1000
SORTED_TEXTS = 1024  # texts among which `grouped` sorts by length


class TokenBudgetSampler(Sampler[list[int]]):
    """Fills batches in random order until the next text would exceed the budget, of sub-tokens, padding included.

    Every epoch and process has the same number of batches, which the learning rate's schedule relies on: the largest
    that the first epochs need. An epoch that needs fewer has its largest batches halved, and one that would need more
    is drawn again. No text is left out, and none is seen twice unless there are fewer texts than batches. `lengths` are
    those of the texts, in sub-tokens; seed and epoch decide the order. RecipeError if one text exceeds the budget.
    """

    def __init__(
        self, lengths: Sequence[int], budget: int, batching: Batching, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.budget, self.batching, self.seed = budget, batching, seed
        self.rank, self.processes = rank, processes
        self.epoch = 0
        check_budget(int(self.lengths.max()), budget, batching)
        needed = max(len(self._filled(epoch, 0)) for epoch in range(COUNTED_EPOCHS))
        self._batches = -(-needed // processes) * processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of this process in every epoch."""
        return self._batches // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the texts of each batch of this process."""
        yield from self.all_batches(self.epoch)[self.rank :: self.processes]

    def all_batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of all processes in an epoch."""
        draws = (self._filled(epoch, draw) for draw in range(DRAWS))
        batches = next(found for found in draws if len(found) <= self._batches)
        while len(batches) < self._batches:
            at = max(range(len(batches)), key=lambda index: len(batches[index]))
            whole, half = batches[at], max(len(batches[at]) // 2, 1)
            batches[at : at + 1] = [whole[:half], whole[half:] or whole]
        return batches

    def _filled(self, epoch: int, draw: int) -> list[list[int]]:
        random = np.random.default_rng((self.seed, epoch, draw))
        order = random.permutation(len(self.lengths))
        if self.batching == "grouped":
            parts = [order[at : at + SORTED_TEXTS] for at in range(0, len(order), SORTED_TEXTS)]
            order = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])
        batches: list[list[int]] = [[]]
        total = longest = 0
        for text in order.tolist():
            length = int(self.lengths[text])
            total, longest = total + length, max(longest, length)
            if batches[-1] and _cost(total, len(batches[-1]) + 1, longest, self.batching) > self.budget:
                batches.append([])
                total = longest = length
            batches[-1].append(text)
        return [batches[at] for at in random.permutation(len(batches))] if self.batching == "grouped" else batches


def check_budget(longest: int, budget: int, batching: Batching) -> None:
    """Raise a RecipeError if the longest text exceeds the budget."""
    if (needed := _cost(longest, 1, longest, batching)) > budget:
        problem = f"the longest text takes {needed} sub-tokens, more than the {budget} of a batch"
        remedy = "set it higher, or data.max_length lower"
        raise RecipeError([f"training.tokens_per_batch: {problem}; {remedy}"], code="budget-too-small", budget=budget)


def _cost(total: int, texts: int, longest: int, batching: Batching) -> int:
    """Return the sub-tokens of a batch, padding included."""
    return total if batching == "padding_free" else texts * -(-longest // MULTIPLE) * MULTIPLE


def token_budget_loader(dataset: Any, collate: Any, sampler: TokenBudgetSampler, device: Any, pin_memory: bool) -> Any:
    """Return accelerate's loader for batches that already belong to this process; `prepare` would divide them again."""
    from accelerate.data_loader import DataLoaderShard

    options = {"batch_sampler": sampler, "collate_fn": collate, "pin_memory": pin_memory, "num_workers": 0}
    return DataLoaderShard(dataset, device=device, **options)

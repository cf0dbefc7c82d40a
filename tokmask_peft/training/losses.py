"""Losses for classes of unequal frequency: weighted cross entropy and focal loss, over texts or words alike."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.examples import IGNORED


def class_weights(wanted: str | Mapping[str, float], counts: Mapping[str, int]) -> list[float] | None:
    """Return a loss weight per class, in the order of `counts` (of training texts or words); None for equal weights.

    `inverse` is N / (K n_c), `sqrt_inverse` its square root (arXiv 2505.11746), both scaled to sum to K; or `wanted`
    has a weight for every label, taken as it is: a RecipeError names labels that are missing or do not exist.
    """
    if wanted == "none":
        return None
    if isinstance(wanted, str):
        power = 1.0 if wanted == "inverse" else 0.5
        raw = [math.pow(sum(counts.values()) / (len(counts) * max(count, 1)), power) for count in counts.values()]
        return [len(counts) * value / sum(raw) for value in raw]
    key, known = "training.class_weights", f"Labels: {', '.join(counts)}"
    unknown = [label for label in wanted if label not in counts]
    problems = [f"{key}: there is no label '{label}'.{nearest(label, counts)} {known}" for label in unknown]
    problems += [f"{key}: no weight for '{label}'" for label in counts if label not in wanted]
    if problems:
        raise RecipeError(problems, code="class-weights", labels=list(counts))
    return [float(wanted[label]) for label in counts]


class ClassificationLoss:
    """Weighted cross entropy, with an optional focal factor (1 - p_t)^gamma (Lin et al. 2017), in fp32.

    If a text may have several labels, it is the mean of their binary cross entropies. Goes to the Trainer as
    `compute_loss_func`. With a focusing parameter `gamma` of 0 it is plain cross entropy.

    Attributes:
        consistency: weight of the symmetric KL divergence between two views of each text (R-Drop, Wu et al. 2021), of
            which the batch holds first all of one, then all of the other; None for batches of one view.
        seen: which items both views can see, bool `[items of a view]`; None for all.
    """

    def __init__(self, weights: Sequence[float] | None = None, gamma: float = 0.0, smoothing: float = 0.0) -> None:
        self.consistency: float | None = None
        self.seen: Tensor | None = None
        self.weights = None if weights is None else torch.tensor(list(weights), dtype=torch.float32)
        self.gamma = gamma
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the summed loss over the number of labelled items, `num_items_in_batch`.

        That counts the whole accumulated batch, over all devices, so that the gradient is the same however it is split.
        `logits` are `[batch, classes]` or `[batch, seq, classes]`, `labels` `[batch]` or `[batch, seq]`, -100 for none;
        or, if a text may have several, float `[batch, labels]`, 1.0 or 0.0.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        if labels.is_floating_point():
            return self._of_sets(logits.float(), labels.to(logits.device), num_items_in_batch)
        logits = logits.reshape(-1, logits.shape[-1]).float()
        labels = labels.reshape(-1).to(logits.device)
        labels = labels.masked_fill(labels >= logits.shape[-1], IGNORED)  # of validation: no output stands for them
        weights = None if self.weights is None else self.weights.to(logits.device)
        losses = F.cross_entropy(
            logits, labels, weight=weights, label_smoothing=self.smoothing, ignore_index=IGNORED, reduction="none"
        )
        if self.gamma > 0:
            chosen = labels.clamp(min=0).unsqueeze(1)
            p_true = logits.softmax(dim=-1).gather(1, chosen).squeeze(1)
            # at p_true = 1 the power has no finite gradient for gamma below 1
            losses = losses * (1.0 - p_true).clamp(min=1e-7).pow(self.gamma)
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        items = torch.as_tensor(items, dtype=losses.dtype, device=losses.device)
        loss = losses.sum() / items.clamp(min=1)
        if self.consistency is None:
            return loss
        (first, second), both = logits.log_softmax(dim=-1).chunk(2), (labels != IGNORED).view(2, -1).all(dim=0)
        differing = ((first.exp() - second.exp()) * (first - second)).sum(dim=-1) / 2
        both = both if self.seen is None else both & self.seen
        return loss + self.consistency * (differing * both).sum() / (items / 2).clamp(min=1)

    def _of_sets(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Return the mean binary cross entropy; a label has one weight for yes and no, which moves no probability."""
        targets = labels[:, : logits.shape[-1]].float()  # of validation: no output stands for further labels
        weights = None if self.weights is None else self.weights.to(logits.device)
        smooth = targets * (1.0 - self.smoothing) + self.smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, smooth, weight=weights, reduction="none")
        if self.gamma > 0:
            p_true = (logits * (2.0 * targets - 1.0)).sigmoid()
            losses = losses * (1.0 - p_true).clamp(min=1e-7).pow(self.gamma)
        texts = len(labels) if items is None else torch.as_tensor(items, device=losses.device) / labels.shape[-1]
        decisions = torch.as_tensor(texts * logits.shape[-1], dtype=losses.dtype, device=losses.device).clamp(min=1)
        if self.consistency is None:
            return losses.sum() / decisions
        first, second = logits.chunk(2)
        differing = (first.sigmoid() - second.sigmoid()) * (first - second) / 2
        return losses.sum() / decisions + self.consistency * differing.sum() / (decisions / 2)

"""What differs if a text may have several labels, or none: each label is a yes or no of its own.

For scores a text has an item per label: the label's id if the text has it, otherwise `NO_PREDICTION`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokmask_peft.errors import ModelError
from tokmask_peft.examples import IGNORED, NO_PREDICTION, Example, LabelIds, LabelPredictions, WrongLabel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST = 10  # texts with a label, and texts without it, that its threshold is fitted on; with fewer it stays .5


class YesOrNo:
    """Methods of `tasks.Task`, which describes them."""

    several: ClassVar[bool] = True
    problem_type: ClassVar[str | None] = "multi_label_classification"

    def pack_labels(self, labels: Sequence[Any]) -> Any:
        """Return float32 [texts, labels]."""
        import torch

        return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in labels])

    def mark(self, labels: int) -> list[float]:
        return [0.0] * labels

    def wanted(self, labels: Any) -> Any:
        return labels[..., 0] != IGNORED

    def probabilities(self, logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
        import numpy as np
        from scipy.special import expit

        return np.asarray(expit(logits.astype(np.float64) / temperature))

    def competing(self, logits: NDArray[Any], label: int) -> tuple[NDArray[Any], int]:
        """Return the logits of no and of yes, of which the difference is the label's logit."""
        import numpy as np

        return np.stack([np.zeros_like(logits[..., label]), logits[..., label]], axis=-1), 1

    def choose(self, logits: NDArray[Any], cuts: Sequence[float] = (), labels: int = 0) -> NDArray[np.int64]:
        """Return an id for each label of each text, [texts x labels]."""
        import numpy as np

        classes = logits.shape[-1]
        rows = np.where(logits > (np.asarray(cuts) if len(cuts) else 0.0), np.arange(classes), NO_PREDICTION)
        more = max(labels - classes, 0)
        return np.pad(rows, ((0, 0), (0, more)), constant_values=NO_PREDICTION).reshape(-1)

    def likeliest(self, logits: NDArray[Any], cuts: Sequence[float]) -> list[int]:
        """Return the likeliest label that is given, or the likeliest of all if none is."""
        import numpy as np

        given = self.choose(logits, cuts).reshape(logits.shape) >= 0
        return list(np.where(given | ~given.any(-1, keepdims=True), logits, -np.inf).argmax(-1).tolist())

    def answer(
        self, text: Any, chosen: NDArray[np.int64], probabilities: Sequence[dict[str, float]], windows: int
    ) -> LabelPredictions:
        (row,) = probabilities
        given = tuple(label for label, number in zip(row, chosen.tolist(), strict=True) if number >= 0)
        return LabelPredictions(given, row, windows)

    def gold_ids(self, example: Example, ids: LabelIds) -> list[int]:
        return [number if label in example.tags else NO_PREDICTION for label, number in ids.items()]

    def ids_of(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        return np.where(labels > 0.5, np.arange(labels.shape[-1]), NO_PREDICTION).reshape(-1)

    def kept(self, logits: Any) -> Any:
        """Keep the logits, which the thresholds are fitted on."""
        return logits.float()

    def decided(self, kept: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
        """Fit the thresholds, as they will be if this checkpoint is the best: [texts, labels]."""
        cuts = self.fit_cuts(kept, self.ids_of(labels))
        return self.choose(kept, cuts, labels.shape[-1]).reshape(labels.shape)

    def decode(
        self, example: Example, ids: Mapping[str, int], kept: Sequence[int], gold: Any, predicted: Any
    ) -> tuple[list[int], list[int]]:
        return self.gold_ids(example, ids), predicted.tolist()

    def fit_cuts(self, logits: NDArray[Any], gold: NDArray[np.int64]) -> list[float]:
        """Return the logit above which each label's F1 is highest (the closest to 0 of several); 0 if it is rare."""
        yes = self.calibrated(logits, gold)[1].reshape(logits.shape) > 0
        return [_cut(*pair) for pair in zip(logits.T.astype(float), yes.T, strict=True)]

    def cuts_of(self, labels: Sequence[str], calibration: Mapping[str, Any]) -> list[float]:
        """Return the thresholds as logits without the temperature; that of a label without one is .5."""
        known, divisor = calibration.get("thresholds") or {}, calibration.get("temperature", 1.0)
        fits = isinstance(known, dict) and known.keys() <= {*labels}
        chances: list[Any] = [known.get(label, 0.5) for label in labels] if fits else [None]
        if not all(isinstance(chance, float) and 0.0 < chance < 1.0 for chance in chances):
            problem = f"calibration.thresholds is {known}, expected a probability between 0 and 1 for each label"
            raise ModelError(f"tokmask.json cannot be used: {problem}", code="bad-adapter-file", key="thresholds")
        return [divisor * math.log(chance / (1 - chance)) for chance in chances]

    def calibrated(self, logits: NDArray[Any], gold: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return logits of no and yes for each label, and which is right."""
        import numpy as np

        yes = gold.reshape(len(logits), -1)[:, : logits.shape[-1]] >= 0
        return np.stack([np.zeros_like(logits), logits], axis=-1).reshape(-1, 2), yes.reshape(-1).astype(np.int64)

    def more_scores(self, gold: Any, predicted: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Return micro-F1, the mean F1 of texts (1 if none is right or given), and the share with all labels right."""
        import numpy as np

        true, found = (np.reshape(part, (-1, len(labels))) >= 0 for part in (gold, predicted))
        both, total, texts = (true & found).sum(1), true.sum(1) + found.sum(1), max(len(true), 1)
        return {
            "f1_micro": float(2 * both.sum() / max(total.sum(), 1)),
            "f1_samples": float(np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0).sum() / texts),
            "accuracy": float((true == found).all(1).sum() / texts),
            "items": len(true),
            "without_prediction": 0,
            "without_label": int((~true.any(1)).sum()),
            "given": dict(zip(labels, found.sum(0).tolist(), strict=True)),
            "confusion": None,
        }

    def counts_given(self, scores: Mapping[str, Any]) -> dict[str, int]:
        return dict(scores["given"])

    snippet = """\
thresholds = torch.tensor(THRESHOLDS)
inputs = tokenizer(["This phone is bien bonito"], return_tensors="pt", padding=True)
with torch.no_grad():
    probabilities = model(**inputs).logits.sigmoid()
print([[labels[i] for i in row.nonzero().flatten()] for row in probabilities > thresholds])"""
    pipeline_snippet = """\
thresholds = dict(zip(LABELS, THRESHOLDS))
classify = pipeline("text-classification", model=MODEL, top_k=None)
for answers in classify(["This phone is bien bonito"]):
    print([one["label"] for one in answers if one["score"] > thresholds[one["label"]]])"""

    def use(self, snippet: str, labels: Sequence[str], calibration: Mapping[str, Any]) -> str:
        """Fill in the thresholds of probabilities without the temperature."""
        chances = [float(f"{1 / (1 + math.exp(-cut)):.6g}") for cut in self.cuts_of(labels, calibration)]
        return snippet.replace("THRESHOLDS", str(chances)).replace("LABELS", str(list(labels)))

    def mistakes(self, tags: tuple[str, ...], answer: LabelPredictions) -> Iterator[WrongLabel]:
        """Yield each label that is wrongly given or left out; `not LABEL` stands for the other answer."""
        chances = answer.probabilities | {tag: 0.0 for tag in tags if tag not in answer.probabilities}
        for label, chance in chances.items():
            other = f"not {label}" if f"not {label}" not in chances else f"not “{label}”"
            if label in answer.labels and label not in tags:
                yield other, label, chance, 1 - chance, None
            elif label in tags and label not in answer.labels:
                yield label, other, 1 - chance, chance, None


def _cut(logits: NDArray[np.float64], yes: NDArray[np.bool_]) -> float:
    """Return the cut of one label; see `fit_cuts`."""
    import numpy as np

    if not LEAST <= yes.sum() <= len(yes) - LEAST:
        return 0.0
    order = np.argsort(-logits, kind="stable")
    ranked, right = logits[order], yes[order].cumsum()
    ends = np.flatnonzero(ranked[:-1] > ranked[1:])  # the last text above a cut
    cuts = np.append((ranked[ends] + ranked[ends + 1]) / 2, 0.0)
    given, found = np.append(ends + 1, (logits > 0).sum()), np.append(right[ends], yes[logits > 0].sum())
    f1 = 2 * found / (given + yes.sum())
    best = cuts[f1 >= f1.max() - 1e-12]
    return float(best[np.abs(best).argmin()])

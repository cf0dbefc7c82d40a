"""A trained adapter as a classifier: texts in, labels and calibrated probabilities out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tokmask_peft.console import Decision
from tokmask_peft.data.encoding import Encoder, Window
from tokmask_peft.data.files import unicode_problem
from tokmask_peft.errors import DataError
from tokmask_peft.inference.forward import Forward
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.occlusion import Occlusion
from tokmask_peft.recipe.schema import Task
from tokmask_peft.training.metrics import probabilities

if TYPE_CHECKING:
    from tokmask_peft.inference.explain import Explanation

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for a text of a sequence task.

    Attributes:
        label: the most probable label.
        probabilities: label -> calibrated probability, in the order of the classifier's labels.
        windows: windows that the text was read in; more than 1 for a text longer than those of training.
    """

    label: str
    probabilities: dict[str, float]
    windows: int = 1


@dataclass(frozen=True, slots=True)
class WordPredictions:
    """The answer for a text of a token task.

    Attributes:
        words: the words, as they were given or split at white space.
        labels: the most probable label of each word.
        probabilities: per word, label -> calibrated probability.
        windows: windows that the text was read in.
    """

    words: tuple[str, ...]
    labels: tuple[str, ...]
    probabilities: tuple[dict[str, float], ...]
    windows: int = 1


Answer = Prediction | WordPredictions


class Classifier:
    """A model that classifies texts; made by `load`.

    Attributes:
        task: `sequence` (one label per text) or `token` (one per word).
        labels: label names in the order of the model's outputs.
        temperature: divides the logits before the softmax; changes no label.
        max_length: sub-tokens per window, special tokens included.
        model: the module, in eval mode.
        tokenizer: its tokenizer.
        decisions: device, precision, quantization, batching and the like, with reasons.
        masking: how tokens were masked in training; none if not known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: Task,
        labels: Sequence[str],
        *,
        max_length: int,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        decisions: tuple[Decision, ...] = (),
        masking: TokenMaskConfig | None = None,
    ) -> None:
        self.model, self.tokenizer, self.task, self.labels = model.eval(), tokenizer, task, tuple(labels)
        self.max_length, self.temperature, self.decisions = max_length, temperature, decisions
        self.device = next(model.parameters()).device
        self.masking = masking
        self.encoder = Encoder(tokenizer, task, max_length)
        self.forward = Forward(self.model, tokenizer.pad_token_id, task, dtype)

    def predict(self, texts: Sequence[str] | Sequence[Sequence[str]], batch_size: int = BATCH_SIZE) -> list[Answer]:
        """Classify texts.

        The answers hang on `batch_size` and the other texts by rounding alone: below 1e-5 of a probability in fp32,
        thousandths in bf16.

        A text longer than `max_length` sub-tokens is read in windows. In sequence tasks their logits are averaged,
        weighted by their sub-tokens; so the temperature changes no label there either. In token tasks the windows
        overlap, and every word gets one label.

        Args:
            texts: strings; in token tasks they are split at white space, or lists of words, taken as they are.
            batch_size: windows per forward pass; windows of similar length go together.

        Returns:
            An answer per text, in their order: `Prediction` in sequence tasks, else `WordPredictions`.

        Raises:
            DataError: a text has no words, or is not valid Unicode; `texts` is one string.
            ModelError: the model gives a logit that is not finite, or memory runs out.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected 1 or more")
        given = self.checked(texts)
        windows = self.encoder.windows(given)
        logits = self.forward.logits(windows, batch_size)
        of_text: list[list[int]] = [[] for _ in given]
        for number, window in enumerate(windows):
            of_text[window.text].append(number)
        return [
            self._answer(text, [windows[n] for n in numbers], [logits[n] for n in numbers])
            for text, numbers in zip(given, of_text, strict=True)
        ]

    def explain(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        *,
        word: int | str | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Explanation]:
        """Say how much each word speaks for the predicted label; see `inference.explain`."""
        from tokmask_peft.inference.explain import explain

        return explain(self, texts, word=word, batch_size=batch_size)

    @functools.cached_property
    def occlusion(self) -> Occlusion:
        """Masks words as the training of this model did.

        Raises:
            MaskTokenError: there is no token to mask with.
        """
        return Occlusion(self.model, self.tokenizer, self.masking)

    def checked(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> list[Any]:
        """Return texts as the task needs them: strings, or lists of words.

        Raises:
            DataError: as `predict` says.
        """
        if isinstance(texts, str):
            raise DataError("expected a list of texts, not one string: [text]")
        return [self._checked(text, index) for index, text in enumerate(texts)]

    def _checked(self, text: str | Sequence[str], index: int) -> Any:
        """Return a text as its task needs it."""
        if not isinstance(text, str) and not (
            isinstance(text, list | tuple) and all(isinstance(word, str) for word in text)
        ):
            raise DataError(f"texts[{index}] is neither a string nor a list of words")
        words = text.split() if isinstance(text, str) else list(text)
        if not words or "" in words:
            raise DataError(f"texts[{index}] " + ("holds an empty word" if words else "is empty: it has no words"))
        running = text if isinstance(text, str) else " ".join(words)
        if problem := unicode_problem(running):
            raise DataError(f"texts[{index}]: {problem}")
        return words if self.task == "token" else running

    def _answer(self, text: Any, windows: list[Window], logits: list[NDArray[np.float32]]) -> Answer:
        if self.task == "sequence":
            sizes = np.array([window.size for window in windows], dtype=np.float64)
            mean = (np.concatenate(logits) * sizes[:, None]).sum(0) / sizes.sum()
            return Prediction(self.labels[int(mean.argmax())], self._named(mean), len(windows))
        rows = np.zeros((len(text), len(self.labels)))
        for window, values in zip(windows, logits, strict=True):
            rows[window.words] = values
        labels = tuple(self.labels[int(best)] for best in rows.argmax(-1))
        return WordPredictions(tuple(text), labels, tuple(self._named(row) for row in rows), len(windows))

    def _named(self, logits: NDArray[Any]) -> dict[str, float]:
        return dict(zip(self.labels, probabilities(logits, self.temperature).tolist(), strict=True))

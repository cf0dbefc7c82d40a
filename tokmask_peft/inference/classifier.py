"""A trained adapter as a classifier: texts in, labels and calibrated probabilities out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokmask_peft.console import Decision
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.data.tables import unicode_problem
from tokmask_peft.errors import DataError
from tokmask_peft.inference.forward import Forward
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import Occlusion
from tokmask_peft.tasks import Prediction, WordPredictions, get_task
from tokmask_peft.training.metrics import probabilities

if TYPE_CHECKING:
    from tokmask_peft.inference.explain import Explanation

BATCH_SIZE = 32
Answer = Prediction | WordPredictions


class Classifier:
    """A model that classifies texts; made by `load`.

    Attributes:
        task: name of the task, a key of `tasks.TASKS`.
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
        task: str,
        labels: Sequence[str],
        *,
        max_length: int,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        decisions: tuple[Decision, ...] = (),
        masking: TokenMaskConfig | None = None,
    ) -> None:
        self.model, self.task = model.eval(), task
        self.tokenizer, self.labels = tokenizer, tuple(labels)
        self.max_length, self.temperature, self.decisions = max_length, temperature, decisions
        self.device = next(model.parameters()).device
        self.masking = masking
        self.encoder = Encoder(tokenizer, task, max_length)
        self.forward = Forward(self.model, tokenizer.pad_token_id, task, dtype)

    def predict(self, texts: Sequence[str] | Sequence[Sequence[str]], batch_size: int = BATCH_SIZE) -> list[Answer]:
        """Classify texts.

        `batch_size` and the other texts change an answer by rounding only: below 1e-5 of a probability in fp32,
        thousandths in bf16.

        A text longer than `max_length` sub-tokens is read in windows. With one label per text, their logits are
        averaged, weighted by their sub-tokens; so the temperature changes no label there either. With one label per
        word, the windows overlap, and every word gets one label.

        Args:
            texts: strings; in token tasks they are split at white space, or lists of words, taken as they are.
            batch_size: windows per forward pass; windows of similar length go together.

        Returns:
            An answer per text, in their order: `WordPredictions` in token tasks, otherwise `Prediction`.

        Raises:
            DataError: a text has no words, or is not valid Unicode; `texts` is one string.
            ModelError: the model gives a logit that is not finite, or memory runs out.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, expected 1 or more", code="batch-size", batch_size=batch_size)
        given, task = self.checked(texts), get_task(self.task)
        windows = self.encoder.windows(given)
        logits = self.forward.logits(windows, batch_size)
        of_text: list[list[int]] = [[] for _ in given]
        for number, window in enumerate(windows):
            of_text[window.text].append(number)
        answers = []
        for text, numbers in zip(given, of_text, strict=True):
            rows = task.join([windows[n] for n in numbers], [logits[n] for n in numbers])
            chances = [
                dict(zip(self.labels, row, strict=True)) for row in probabilities(rows, self.temperature).tolist()
            ]
            answers.append(task.answer(text, rows, chances, len(numbers)))
        return answers

    def explain(
        self,
        texts: Sequence[str] | Sequence[Sequence[str]],
        *,
        word: int | str | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Explanation]:
        """Return how much each word speaks for the predicted label; see `inference.explain`."""
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
            raise DataError("expected a list of texts, not one string: [text]", code="not-a-list")
        found: list[Any] = []
        for index, text in enumerate(texts):
            words = text.split() if isinstance(text, str) else text
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise DataError(f"texts[{index}] is not a string or a list of words", code="not-a-text", index=index)
            if not words:
                raise DataError(f"texts[{index}] is empty: it has no words", code="empty-text", index=index)
            if "" in words:
                raise DataError(f"texts[{index}] has an empty word", code="empty-word", index=index)
            running = text if isinstance(text, str) else " ".join(words)
            if problem := unicode_problem(running):
                raise DataError(f"texts[{index}]: {problem}", code="invalid-unicode", index=index)
            found.append(list(words) if get_task(self.task).words_given else running)
        return found

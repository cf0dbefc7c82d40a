"""A trained adapter as a classifier: texts in, labels and calibrated probabilities out."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from tokmask_peft.artifacts import SavedAdapter, find_saved
from tokmask_peft.console import Decision
from tokmask_peft.data.encoding import Encoder, Window
from tokmask_peft.data.opening import unicode_problem
from tokmask_peft.errors import DataError, ModelError, boundary, first_line
from tokmask_peft.examples import LabelPredictions, Pair, Prediction, Probabilities, WordPredictions
from tokmask_peft.inference.explain import explain
from tokmask_peft.inference.forward import Forward, loading_memory_errors
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import Occlusion
from tokmask_peft.model.adapter import load_adapter, load_merged
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import gpu_problem, kernels_problem, plan_loading
from tokmask_peft.model.layers import average_words
from tokmask_peft.model.location import position_limit
from tokmask_peft.model.packed import choose_batching, enable_padding_free
from tokmask_peft.spans import NO_SPANS, Spans
from tokmask_peft.tasks import get_task

BATCH_SIZE = 32
Answer = Prediction | WordPredictions | LabelPredictions
_WINDOWS = 1024  # encoded and answered at a time, so that memory does not grow with a text's length
_LONGEST = 512  # sub-tokens per window if neither the run nor the model sets a limit


@dataclass(eq=False, repr=False)
class Classifier:
    """A model that classifies texts; made by `load`."""

    model: nn.Module  # put in eval mode
    tokenizer: Any
    task: str  # a key of `tasks.TASKS`
    labels: tuple[str, ...]  # in the order of the model's outputs
    _: KW_ONLY
    max_length: int  # sub-tokens per window, special tokens included
    temperature: float = 1.0  # divides the logits that probabilities are made of; changes no label
    dtype: torch.dtype = torch.float32  # bfloat16 or float16 for autocast
    decisions: tuple[Decision, ...] = ()  # device, precision, quantization, batching and the like, with reasons
    label_on: str = "first"  # which sub-token of a word carries its label
    cuts: Sequence[float] = ()  # the logit above which each label is given, if a text may have several
    masking: TokenMaskConfig | None = None  # how tokens were masked in training, if known
    spans: str = NO_SPANS  # how the labels mark entities, as in `spans.SCHEMES`
    pair: tuple[str, str] | None = None  # the columns of the two texts in training, if it reads pairs

    def __post_init__(self) -> None:
        self.model, self.labels = self.model.eval(), tuple(self.labels)
        self.device = next(self.model.parameters()).device
        self.encoder = Encoder(self.tokenizer, self.task, self.max_length, self.label_on)
        pad_id, side = self.tokenizer.pad_token_id, self.tokenizer.padding_side
        self.legal = None if self.spans == NO_SPANS else Spans(self.spans, self.labels)
        self.forward = Forward(self.model, pad_id, self.task, self.dtype, side)

    @boundary("the prediction")
    def predict(self, texts: Sequence[str] | Sequence[Sequence[str]], batch_size: int = BATCH_SIZE) -> list[Answer]:
        """Classify texts.

        `batch_size` and the other texts change an answer by rounding only: below 1e-5 of a probability in fp32,
        thousandths in bf16.

        A text longer than `max_length` sub-tokens is read in windows. With one label per text, their logits are
        averaged, weighted by their sub-tokens; so the temperature changes no label there either. With one label per
        word, the windows overlap, and every word gets one label; if the labels mark entities, the sequence is made
        legal as `spans` says. A longer pair is cut, see `encoding.Encoder`.

        Args:
            texts: strings; in token tasks they are split at white space, or lists of words, taken as they are; for a
                model of pairs, `(first, second)` each.
            batch_size: windows per forward pass; windows of similar length go together.

        Returns:
            An answer per text, in their order: `WordPredictions` in token tasks, `LabelPredictions` if a text may
            have several labels, otherwise `Prediction`.

        Raises:
            DataError: a text has no words, or is not valid Unicode; `texts` is one string; a text is not a pair.
            ModelError: the model gives a logit that is not finite, or memory runs out.
        """
        given, task = self.checked(texts), get_task(self.task)
        found: list[list[tuple[Window, Any]]] = [[] for _ in given]
        decided: list[list[tuple[Any, Any]]] = [[] for _ in given]  # label ids and probabilities, by parts of a text
        counts, windows = [0] * len(given), self.encoder.windows(given)
        while part := list(itertools.islice(windows, max(_WINDOWS, 8 * batch_size))):
            for window, logits in zip(part, self.forward.logits(part, batch_size), strict=True):
                found[window.text].append((replace(window, ids=[]), logits))
                counts[window.text] += 1
            for text in dict.fromkeys(window.text for window in part if task.words_given):  # a word is in one window
                decided[text].append(self._decided(found[text]))
                found[text] = []
        answers = []
        for text, pairs, parts, count in zip(given, found, decided, counts, strict=True):
            chosen, rows = map(np.concatenate, zip(*(parts or [self._decided(pairs)]), strict=True))
            parts.clear()
            answer = task.answer(text, chosen, Probabilities(self.labels, rows), count)
            if self.legal is not None:
                answer = replace(answer, labels=self.legal.repaired(answer.labels), spans=self.spans)
            answers.append(answer)
        return answers

    def _decided(self, pairs: Sequence[tuple[Window, Any]]) -> tuple[Any, Any]:
        """Return label ids and probabilities, [answers, classes], from windows and their logits."""
        task, (windows, logits) = get_task(self.task), zip(*pairs, strict=True)
        rows = task.join(windows, logits)
        return task.choose(rows, self.cuts), task.probabilities(rows, self.temperature)

    explain = explain

    def __repr__(self) -> str:
        shown = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
        return f"Classifier({get_task(self.task).description}: {shown}; on {self.device})"

    @functools.cached_property
    def occlusion(self) -> Occlusion:
        """Masks words as the training of this model did; MaskTokenError if there is no token to mask with."""
        return Occlusion(self.model, self.tokenizer, self.masking)

    def checked(self, texts: Sequence[str] | Sequence[Sequence[str]]) -> list[Any]:
        """Return texts as the task needs them: strings, pairs, or lists of words; DataError as `predict` says."""
        if isinstance(texts, str):
            raise DataError("expected a list of texts, not one string: [text]", code="not-a-list")
        found: list[Any] = []
        given_words = get_task(self.task).words_given
        for index, text in enumerate(texts):
            if self.pair is not None:
                found.append(_checked_pair(text, f"texts[{index}]", index, self.pair))
                continue
            words = text.split(None, -1 if given_words else 1) if isinstance(text, str) else text
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise DataError(f"texts[{index}] is not a string or a list of words", code="not-a-text", index=index)
            if not words:
                raise DataError(f"texts[{index}] is empty: it has no words", code="empty-text", index=index)
            if "" in words:
                raise DataError(f"texts[{index}] has an empty word", code="empty-word", index=index)
            running = text if isinstance(text, str) else " ".join(words)
            if problem := unicode_problem(running):
                raise DataError(f"texts[{index}]: {problem}", code="invalid-unicode", index=index)
            found.append(list(words) if given_words else running)
        return found


def _checked_pair(given: Any, name: str, index: int, columns: tuple[str, str]) -> Pair:
    parts = tuple(given) if isinstance(given, Pair | list | tuple) else ()
    if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        expected = f"this model reads pairs, ({', '.join(columns)})"
        raise DataError(f"{name} is not a pair of strings: {expected}", code="not-a-pair", index=index)
    for part, column in zip(parts, columns, strict=True):
        if not part.strip():
            raise DataError(f"{name} is empty in '{column}': it has no words", code="empty-text", index=index)
        if problem := unicode_problem(part):
            raise DataError(f"{name}: {problem}", code="invalid-unicode", index=index)
    return Pair(*parts)


@boundary("loading the model")
def load(
    model: str | PathLike[str] | SavedAdapter,
    device: str | torch.device | None = None,
    quantization: str | None = None,
    precision: str | None = None,
    backbone: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Classifier:
    """Load a trained adapter for prediction.

    Args:
        model: a run folder (`runs/NAME`), an adapter folder, or the id of an adapter on the Hub.
        device: `cuda`, `cpu`, …; default: a GPU if there is one.
        quantization: `nf4`, `int8` or `none`; default: that of training if it runs on this device.
        precision: `bf16`, `fp16` (NVIDIA GPUs) or `fp32`; default: that of training if the hardware has it.
        backbone: a Hub id, a folder or `package:NAME/FOLDER` to use instead of what the adapter names.
        trust_remote_code: run the backbone's own code; whatever the run's recipe says, only you can allow it.

    Raises:
        ModelError: there is no adapter or backbone, it cannot be loaded as asked, or memory runs out.
    """
    saved = find_saved(model, backbone, trust_remote_code=trust_remote_code)
    place = _device(device)
    with loading_memory_errors(place), boundary(f"loading the adapter in {saved.folder}", ModelError):
        plan = plan_loading(saved.model, place, quantization, precision)
        loaded = load_backbone(plan.model, saved.info.task, saved.info.labels, place)
        batching = _choose_batching(loaded.model, place)
        average_words(loaded.model, saved.loading.label_on)
        present = "a GPU is there" if place.type == "cuda" else gpu_problem() or "no GPU was found"
        decisions = [Decision("device", str(place), present if device is None else "as asked")]
        if loaded.quantization == "none":
            loaded.model.to(place)
            module, decision = load_merged(loaded, saved.folder, **saved.loading.trained)
            module.to(place)
            decisions.append(decision)
        else:
            module = load_adapter(loaded, saved.folder, **saved.loading.trained)
        made = (one for one in loaded.decisions if one.what != "device")
        decisions += [*(replace(one, reason=plan.reasons.get(one.what, one.reason)) for one in made), batching]
        if "embedding" in plan.reasons:  # loading the backbone reports no resident one
            decisions.append(Decision("embedding", plan.model.embedding, plan.reasons["embedding"]))
        positions = getattr(module.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
        longest = saved.loading.max_length or int(min(_LONGEST, positions, loaded.tokenizer.model_max_length))
        return Classifier(
            module,
            loaded.tokenizer,
            saved.info.task,
            saved.info.labels,
            max_length=min(longest, position_limit(module.config.to_dict()) or longest),
            temperature=saved.info.calibration.temperature,
            dtype=loaded.dtype,
            decisions=tuple(decisions),
            label_on=saved.loading.label_on,
            cuts=get_task(saved.info.task).cuts_of(saved.info.labels, saved.info.calibration.model_dump()),
            masking=saved.info.masking,
            spans=saved.loading.spans,
            pair=saved.info.pair,
        )


def _choose_batching(model: nn.Module, device: torch.device) -> Decision:
    """Choose between packed rows and padded batches, and prepare the model for them."""
    if device.type != "cpu":  # packed answers have not been compared with padded ones there
        return Decision("batching", "padded", f"predictions on packed rows have not been tried on {device.type}")
    decision = choose_batching("padding_free", model)
    if decision.choice == "padding_free":
        enable_padding_free(model)
    return decision


def _device(asked: str | torch.device | None) -> torch.device:
    """Return the device to compute on; a ModelError if there is no such device, or it has no memory left."""
    if asked is None:
        usable = torch.cuda.is_available() and gpu_problem() is None
        return torch.device("cuda", 0) if usable else torch.device("cpu")
    try:
        device = torch.device(asked)
        with loading_memory_errors(device):
            torch.empty(1, device=device)
        if device.type == "cuda" and (problem := kernels_problem(device)):
            raise RuntimeError(problem)
    except (RuntimeError, AssertionError) as error:
        message = f"device {asked} cannot be used: {first_line(error)}"
        raise ModelError(message, code="device-unavailable", device=str(asked)) from error
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device

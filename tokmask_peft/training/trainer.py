"""From a recipe to a `transformers.Trainer`: its texts, its arguments, and where ours differs from it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import LengthGroupedSampler

from tokmask_peft.data.batches import TokenBudgetSampler, token_budget_loader
from tokmask_peft.data.encoding import Encoded, Encoder, Window
from tokmask_peft.errors import DataError, RecipeError, RunError, nearest
from tokmask_peft.examples import IGNORED, NO_PREDICTION, Example
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.model.adapter import inputs_as_they_come
from tokmask_peft.model.layers import quick_dropout, whole_words
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.spans import NO_SPANS, Spans
from tokmask_peft.tasks import Task, get_task
from tokmask_peft.training.metrics import Predictions, entity_counts, f1_of, task_scores


class Split:
    """The texts of a split as the Trainer reads them: cut to learn and to choose the checkpoint, in windows to score.

    Rows are in order of length (ties in their order), so that evaluation wastes little on padding.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        task: str,
        labels: Sequence[str],
        max_length: int,
        label_on: str = "first",
        spans: Spans | None = None,
    ) -> None:
        """`labels` has the classifier's first; with `spans`, predictions are repaired as those of `predict` are."""
        self.examples, self.labels, self.task, self.spans = examples, labels, get_task(task), spans
        self._encoder = Encoder(tokenizer, task, max_length, label_on)
        self._ids = {label: number for number, label in enumerate(labels)}

    @cached_property
    def encoded(self) -> Encoded:
        """The texts in their own order, cut at `max_length`."""
        return self._encoder.cut(self.examples, self.labels)

    @property
    def lengths(self) -> list[int]:
        """Sub-tokens of each cut text, in the order of the texts."""
        return list(self.encoded.dataset["length"])

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The index of the text of each row of `dataset`."""
        return np.argsort(self.lengths, kind="stable").astype(np.int64)

    @cached_property
    def dataset(self) -> Dataset:
        """The cut texts, the shortest first."""
        return self.encoded.dataset.select(self.order)

    @cached_property
    def windows(self) -> list[Window]:
        """The texts whole, in windows as `predict` reads them, the shortest window first."""
        texts: list[Any] = [example.text for example in self.examples]
        return sorted(self._encoder.windows(texts, strict=False), key=lambda window: len(window.ids))

    @cached_property
    def window_dataset(self) -> Dataset:
        """The windows; `labels` only mark where an answer is wanted."""
        rows = []
        for window in self.windows:
            marks = np.full(len(window.ids), IGNORED)
            marks[window.positions] = 0
            labels = marks.tolist() if self.task.words_given else self.task.mark(len(self.labels))
            row = {"input_ids": window.ids, "labels": labels, "token_type_ids": window.types, "words": window.numbers}
            rows.append({name: part for name, part in row.items() if part is not None})
        return Dataset.from_list(rows)

    def joined(
        self, logits: NDArray[np.float32], cuts: Sequence[float] = ()
    ) -> tuple[Predictions, NDArray[np.float64], NDArray[np.int64]]:
        """Return the predictions for each text, logits `[items, classes]`, and gold label ids `[items]`.

        `logits` are those of the wanted answers in the order of `windows`; `cuts` those of `Task.fit_cuts`. A word
        without a sub-token has none. If a text has an item per label, its logits are one row.
        """
        ends = np.cumsum([max(len(window.words), 1) for window in self.windows])
        parts: list[list[tuple[Window, NDArray[np.float32]]]] = [[] for _ in self.examples]
        for window, rows in zip(self.windows, np.split(logits, ends[:-1]), strict=True):
            parts[window.text].append((window, rows))
        found, answers, golds = Predictions([], []), [], []
        for example, pairs in zip(self.examples, parts, strict=True):
            gold = np.array(self.task.gold_ids(example, self._ids), dtype=np.int64)
            predicted = np.full(len(gold), NO_PREDICTION)
            if pairs:
                own = [window for window, _ in pairs]
                kept = np.arange(len(gold))
                if self.task.words_given:
                    kept = np.sort(np.concatenate([window.words for window in own]))
                answers.append(self.task.join(own, [rows for _, rows in pairs]))
                golds.append(gold[kept])
                predicted[kept] = self.task.choose(answers[-1], cuts, len(self.labels))
            found.gold.append(gold)
            found.predicted.append(self._legal(predicted))
        return found, np.concatenate(answers), np.concatenate(golds)

    def cut_predictions(self, predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> Predictions:
        """Return predictions for the cut texts, in the order of the texts.

        Both are `[texts]`, `[texts, seq]` or `[texts, labels]` in the order of `dataset`; `gold` is what the model saw,
        -100 for none.
        """
        found = Predictions([], [])
        for text, row in enumerate(np.argsort(self.order)):
            kept = self.encoded.kept[text] if self.encoded.kept is not None else ()
            decoded = self.task.decode(self.examples[text], self._ids, kept, gold[row], predicted[row])
            wanted, answers = (np.array(items, dtype=np.int64) for items in decoded)
            found.gold.append(wanted)
            found.predicted.append(self._legal(answers))
        return found

    def _legal(self, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
        return predicted if self.spans is None else np.array(self.spans.repaired_ids(predicted.tolist()), np.int64)

    def metrics(self, output: Any) -> dict[str, float]:
        """Return macro and weighted F1, accuracy and F1 of entities on the cut texts, for the Trainer."""
        kept = self.task.decided(output.predictions, output.label_ids)
        predictions = self.cut_predictions(kept, output.label_ids)
        found = task_scores(self.task, predictions, self.labels)
        values = {key: found[key] for key in ("f1_macro", "f1_weighted", "accuracy")}
        if self.spans is not None:
            values["f1_entities"] = float(f1_of(entity_counts(predictions, self.labels).sum(1))["f1_macro"])
        return values


class SeededLengthGrouping(LengthGroupedSampler):
    """Batches of similar length in an order that depends only on seed and epoch.

    The Trainer's own draws from torch's global random state, which dropout also moves: two runs of one seed whose
    regularizers differ would see different batches from the second epoch on.
    """

    def __init__(self, usual: LengthGroupedSampler, seed: int) -> None:
        """Adopt batch size and lengths of the Trainer's sampler."""
        super().__init__(usual.batch_size, lengths=usual.lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; accelerate calls this before each."""
        self.generator = torch.Generator().manual_seed((self.seed << 20) + epoch)


class OrderedEvalTrainer(Trainer):
    """A Trainer that evaluates in the order of the dataset, padded, however it batches the training texts."""

    compute_metrics: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        train_collator: Any = None,
        batches: TokenBudgetSampler | None = None,
        memory_errors: Callable[[], AbstractContextManager[None]] = nullcontext,
        views: int = 1,
        views_masked: str = "one",
        consistency: float = 1.0,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the trainer; further arguments are the Trainer's.

        `train_collator` makes the training batches, if they differ from those of evaluations, and `batches` chooses
        them, if not by number of texts; they hold each text `views` times. Evaluations run inside of `memory_errors()`.
        Without a `task`, an item has one label.
        """
        self.task = task or Task()
        super().__init__(*args, preprocess_logits_for_metrics=self._label_ids, **kwargs)
        collate = train_collator or self.data_collator
        self.train_collator = collate if views == 1 else lambda rows: collate([*rows] * views)
        self.views, self.views_masked, self.consistency = views, views_masked, consistency
        self.batches = batches
        self.memory_errors = memory_errors
        self._logits: list[NDArray[np.float32]] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; a training that raises leaves no noise of NEFTune on the embedding."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenMaskCallback):
                callback.hides_labels = True  # see `get_batch_samples`
        try:
            with inputs_as_they_come(self.model, self.args.bf16 or self.args.fp16), quick_dropout(self.model):
                return super().train(*args, **kwargs)
        except BaseException:
            if (handle := getattr(self, "neftune_hook_handle", None)) is not None:
                handle.remove()
            raise

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of an optimizer step, and how many labelled items they have that are not hidden."""
        if self.control.should_training_stop:  # resumed at its end; the Trainer itself stops after a step only
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        masking = self._masking()
        if masking is None or not masking.masker.hides_labels or not any(_labels_words(batch) for batch in batches):
            return batches, items
        rate, step = masking.upcoming(self.args, self.state)
        for number, batch in enumerate(batches):
            self.hide_labels(batch, masking.masker, step + number, rate)
        return batches, self._get_num_items_in_batch(batches, device)

    def hide_labels(
        self, batch: dict[str, Any], masker: TokenMasker, step: int | None = None, rate: float | None = None
    ) -> None:
        """Leave the masked words of a training batch out of its labels, if the masker asks for that."""
        masker.clean_texts = self._clean_texts(batch)
        if masker.hides_labels and _labels_words(batch):
            masked = whole_words(batch, masker.pattern_of(batch, step, rate))
            batch["labels"] = batch["labels"].masked_fill(masked, IGNORED)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, which holds two views of each text if it is for training and `views` is 2."""
        loss, masking = self.compute_loss_func, self._masking() if model.training else None
        reacts = masking is not None and masking.schedule.reacts
        scale = None if masking is None else masking.schedule.class_scale()
        if not model.training or not (reacts or scale is not None or self.views > 1):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch, masked = dict(inputs), None
        if masking is not None:
            masking.masker.clean_texts = self._clean_texts(batch)
            if scale is not None:
                masking.masker.scale = torch.tensor(scale, device=self.args.device)[batch["labels"]]
            masked = whole_words(batch, masking.masker.pattern_of(batch))
        if self.views > 1:
            loss.consistency = self.consistency
            loss.seen = None if masked is None or not _labels_words(batch) else ~masked.view(2, -1).any(dim=0)
        try:
            found, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            loss.consistency = loss.seen = None
        if masking is not None and reacts:
            answers = _answers(outputs["logits"], batch["labels"], masking.masker.in_masked_texts(batch, masked))
            masking.observe(self.accelerator.reduce(answers, "sum"))
        return (found, outputs) if return_outputs else found

    def _masking(self) -> Any:
        """Return the callback that masks this training, or None."""
        callbacks = self.callback_handler.callbacks
        found = next((each for each in callbacks if isinstance(each, TokenMaskCallback)), None)
        return None if found is None or found.masker is None else found

    def _clean_texts(self, batch: Mapping[str, Any]) -> int:
        """Return how many texts, the first of a training batch, are not masked."""
        if self.views == 1 or self.views_masked == "both":
            return 0
        bounds = batch.get("cu_seqlens")
        texts = len(batch["input_ids"]) if bounds is None else len(bounds) - 1
        return texts // 2 if self.views_masked == "one" else texts

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict."""
        with self.memory_errors(), inputs_as_they_come(self.model, self.args.bf16 or self.args.fp16):
            return super().evaluation_loop(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training batches."""
        if self.batches is not None:
            dataset, pin = self._remove_unused_columns(self.train_dataset), self.args.dataloader_pin_memory
            return token_budget_loader(dataset, self.train_collator, self.batches, self.args.device, pin)
        usual, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "words"])]  # see `average_words`

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        usual = super()._get_train_sampler(train_dataset)
        if isinstance(usual, LengthGroupedSampler):
            return SeededLengthGrouping(usual, self.args.data_seed)
        return usual

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def predict_windows(
        self, split: Split, cuts: Sequence[float] = ()
    ) -> tuple[Predictions, NDArray[np.float64], NDArray[np.int64]]:
        """Return what `Split.joined` does of the model's answers to a split's windows."""
        return split.joined(self.answers(split.window_dataset)[0], cuts)

    def answers(self, dataset: Dataset) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the model's outputs where an answer is wanted, `[answers, outputs]`, and their labels."""
        self._logits = []
        compute, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.predict(dataset)
            shares = gather_object([self._logits])
        finally:
            self._logits, self.compute_metrics = None, compute
        labelled = self.task.wanted(output.label_ids)
        predicted = output.predictions[labelled]
        logits = in_order(shares, len(predicted))
        expected, of_predicted = logits, predicted
        if predicted.ndim < logits.ndim:
            expected, of_predicted = logits.max(-1), np.take_along_axis(logits, predicted[:, None], axis=-1)[:, 0]
        if not np.array_equal(of_predicted, expected, equal_nan=True):
            problem = "the logits of the final evaluation are not in the order of its texts; please report this"
            raise RunError(problem, code="wrong-order")
        return logits, output.label_ids[labelled]

    def _label_ids(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return what the task keeps of logits; labelled ones are stored if asked, not all, which are large."""
        first = logits[0] if isinstance(logits, tuple) else logits  # models with further outputs give a tuple
        if self._logits is not None:
            self._logits.append(first[self.task.wanted(labels)].float().cpu().numpy())
        return self.task.kept(first)


def _labels_words(batch: Mapping[str, Any]) -> bool:
    return batch["labels"].shape == batch["input_ids"].shape and not batch["labels"].is_floating_point()


@torch.no_grad()
def _answers(logits: Tensor, labels: Tensor, masked: Tensor) -> Tensor:
    """Count the answers to a batch as `Answers` holds them, [6, classes].

    `labels` are -100 for none; `masked` says whether an item is in a masked text, in the shape of `labels`.
    """
    classes, labels = logits.shape[-1], labels.reshape(-1)
    logits, at = logits.reshape(-1, classes).float(), labels.clamp(min=0)
    losses = F.cross_entropy(logits, at, reduction="none")
    kinds = torch.stack([torch.ones_like(losses), (logits.argmax(dim=-1) == at).float(), losses])
    groups = torch.stack([(labels != IGNORED) & ~masked.reshape(-1), (labels != IGNORED) & masked.reshape(-1)])
    values = (groups.unsqueeze(1) * kinds).flatten(0, 1)
    return values.new_zeros(6, classes).index_add(1, at, values)


def in_order(shares: Sequence[Sequence[NDArray[np.float32]]], items: int) -> NDArray[np.float32]:
    """Return the rows of all processes in the order of the dataset; of R, process r has the batches r, r + R, …."""
    rounds = itertools.zip_longest(*shares)
    return np.concatenate([batch for one in rounds for batch in one if batch is not None])[:items]


def training_arguments(
    recipe: Recipe, checkpoints: Path, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    """Return the Trainer's arguments, for matrix products of a `dtype`; a DataError if no entities can be scored."""
    training = recipe.training
    if training.best_metric == "f1_entities" and recipe.data.spans == NO_SPANS:  # which the labels have decided
        problem = "training.best_metric is f1_entities, but the labels of the data mark no entities (B-TYPE, I-TYPE, O)"
        problem += ": set it to f1_macro, or data.label_column to the labels that do"
        raise DataError(problem, code="no-entities", field="training.best_metric")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        run_name=recipe.name,
        seed=recipe.seed,
        data_seed=recipe.seed,
        num_train_epochs=1.0 if training.epochs == "auto" else training.epochs,  # decided if this is for training
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch,
        per_device_eval_batch_size=training.eval_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        train_sampling_strategy="group_by_length" if training.batching == "grouped" else "random",
        length_column_name="length",
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        # below 1 this is a share of the steps, from 1 on a number of steps
        warmup_steps=min(training.warmup, 0.999),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_alpha,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        eval_strategy="epoch",
        save_strategy="epoch",
        # with 1 the Trainer ends by removing all but the best, also the checkpoint that Ctrl-C left to continue from
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=training.best_metric,
        greater_is_better=True,
        # PEFT hides the model's signature; without this there is no eval loss and no metric (transformers#33420)
        label_names=["labels"],
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would log the mean of the losses before in place of one that is not finite
        disable_tqdm=True,
        report_to=list(training.report_to) or "none",
        ddp_find_unused_parameters=False,
    )
    # One process uses one GPU. The Trainer would spread it over all with nn.DataParallel, which is slower than
    # torchrun and copies the masker to every GPU with the same pattern.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise a RecipeError that names the experiment trackers that do not exist or are not installed."""
    installed = get_available_reporting_integrations()
    known = sorted({*INTEGRATION_TO_CALLBACK, *installed})
    missing = [name for name in names if name not in installed]
    problems = [
        f"training.report_to: '{name}' is not installed (pip install {name})"
        if name in known
        else f"training.report_to: there is no tracker '{name}'.{nearest(name, known)} Known: {', '.join(known)}"
        for name in missing
    ]
    if problems:
        raise RecipeError(problems, code="no-tracker", trackers=missing)

"""From a recipe to a `transformers.Trainer`: its texts, its arguments, and where ours differs from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import LengthGroupedSampler

from tokmask_peft.data.batches import TokenBudgetSampler, token_budget_loader
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.errors import RecipeError, RunError, nearest
from tokmask_peft.model.adapter import inputs_as_they_come
from tokmask_peft.model.layers import quick_dropout
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.tasks import IGNORED, Example, get_task
from tokmask_peft.training.metrics import Predictions, scores


class Split:
    """Encoded texts in order of length, so that evaluation wastes little on padding.

    `encoded` holds the texts in their own order, `dataset` the shortest first (ties in their order); `order` `[texts]`
    is the index of the text of each row of `dataset`.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Any, task: str, labels: tuple[str, ...], max_length: int
    ) -> None:
        """Encode and sort; `labels` are in the order of the classifier's outputs."""
        self.examples, self.labels, self.task = examples, labels, get_task(task)
        self.encoded = Encoder(tokenizer, task, max_length).cut(examples, labels)
        self.order = np.argsort(np.asarray(self.encoded.dataset["length"]), kind="stable").astype(np.int64)
        self.dataset = self.encoded.dataset.select(self.order)

    @property
    def lengths(self) -> list[int]:
        """Sub-tokens of each text, in the order of the texts."""
        return list(self.encoded.dataset["length"])

    def predictions(self, predicted: NDArray[np.int64], gold: NDArray[np.int64]) -> Predictions:
        """Return predictions per text, in the order of the texts.

        Args:
            predicted: `[texts]` or `[texts, seq]` label ids in the order of `dataset`.
            gold: the label ids that the model saw, of the same shape; -100 for none.
        """
        ids = {label: i for i, label in enumerate(self.labels)}
        found = Predictions([None] * len(self.order), [None] * len(self.order))  # type: ignore[list-item]
        for row, text in enumerate(self.order):
            kept = self.encoded.kept[text] if self.encoded.kept is not None else ()
            decoded = self.task.decode(self.examples[text], ids, kept, gold[row], predicted[row])
            found.gold[text], found.predicted[text] = (np.array(items, dtype=np.int64) for items in decoded)
        return found

    def metrics(self, output: Any) -> dict[str, float]:
        """Return macro and weighted F1 and accuracy, as the Trainer's `compute_metrics`."""
        found = scores(*self.predictions(output.predictions, output.label_ids).flat(), self.labels)
        return {key: found[key] for key in ("f1_macro", "f1_weighted", "accuracy")}


class SeededLengthGrouping(LengthGroupedSampler):
    """Batches of similar length in an order that depends only on seed and epoch.

    The Trainer's own draws from torch's global random state, which dropout moves, too: two runs of one seed would see
    different batches from the second epoch on as soon as their regularizers differ.
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

    def __init__(
        self,
        *args: Any,
        train_collator: Any = None,
        batches: TokenBudgetSampler | None = None,
        memory_errors: Callable[[], AbstractContextManager[None]] = nullcontext,
        **kwargs: Any,
    ) -> None:
        """Create the trainer; further arguments are the Trainer's.

        `train_collator` makes the training batches, if they differ from those of evaluations, and `batches` chooses
        them, if they are not of `per_device_train_batch_size` texts. Evaluations run inside of `memory_errors()`.
        """
        super().__init__(*args, preprocess_logits_for_metrics=self._label_ids, **kwargs)
        self.train_collator = train_collator or self.data_collator
        self.batches = batches
        self.memory_errors = memory_errors
        self._logits: list[NDArray[np.float32]] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; a training that raises leaves no noise of NEFTune on the embedding."""
        try:
            with inputs_as_they_come(self.model, self.args.bf16), quick_dropout(self.model):
                return super().train(*args, **kwargs)
        except BaseException:
            if (handle := getattr(self, "neftune_hook_handle", None)) is not None:
                handle.remove()
            raise

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict."""
        with self.memory_errors(), inputs_as_they_come(self.model, self.args.bf16):
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        usual = super()._get_train_sampler(train_dataset)
        if isinstance(usual, LengthGroupedSampler):
            return SeededLengthGrouping(usual, self.args.data_seed)
        return usual

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def predict_with_logits(self, split: Split) -> tuple[Predictions, NDArray[np.float32], NDArray[np.int64]]:
        """Return the predictions for a split, logits `[items, classes]` and gold label ids `[items]`.

        Logits and gold ids are those of the labelled positions, in the order of `split.dataset`.

        Raises:
            RunError: the logits do not belong to the predictions.
        """
        self._logits = []
        compute, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.predict(split.dataset)
            shares = gather_object([self._logits])
        finally:
            self._logits, self.compute_metrics = None, compute
        predicted, gold = output.predictions, output.label_ids
        labelled = gold != IGNORED
        logits = in_order(shares, int(labelled.sum()))
        of_predicted = np.take_along_axis(logits, predicted[labelled][:, None], axis=-1)[:, 0]
        if not np.array_equal(of_predicted, logits.max(-1), equal_nan=True):
            problem = "the logits of the final evaluation are not in the order of its texts; please report this"
            raise RunError(problem, code="wrong-order")
        return split.predictions(predicted, gold), logits, gold[labelled]

    def _label_ids(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return the predicted label ids of a batch, `[batch, …]`; the logits of labelled positions are kept if asked.

        Padded logits of all positions would take the longest text's length times the classes for every text.
        """
        first = logits[0] if isinstance(logits, tuple) else logits  # models with further outputs give a tuple
        if self._logits is not None:
            self._logits.append(first[labels != IGNORED].float().cpu().numpy())
        return first.argmax(dim=-1)


def in_order(shares: Sequence[Sequence[NDArray[np.float32]]], items: int) -> NDArray[np.float32]:
    """Return the rows of all processes' batches in the order of the dataset, `[items, classes]`.

    Process r of R sees the batches r, r + R, …; what the last ones are filled up with is left out.
    """
    rounds = itertools.zip_longest(*shares)
    return np.concatenate([batch for one in rounds for batch in one if batch is not None])[:items]


def training_arguments(recipe: Recipe, checkpoints: Path, device: torch.device, bf16: bool) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe."""
    training = recipe.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        run_name=recipe.name,
        seed=recipe.seed,
        data_seed=recipe.seed,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
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
        bf16=bf16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        eval_strategy="epoch",
        save_strategy="epoch",
        # with 1 the Trainer ends by removing all but the best, also the checkpoint that Ctrl-C left to continue from
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="f1_macro",
        greater_is_better=True,
        # PEFT hides the model's signature; without this there is no eval loss and no metric (transformers#33420)
        label_names=["labels"],
        logging_steps=training.logging_steps,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=list(training.report_to) or "none",
        ddp_find_unused_parameters=False,
    )
    # One process uses one GPU. The Trainer would spread it over all with nn.DataParallel, which is slower than
    # torchrun and copies the masker to every GPU with the same pattern.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that the experiment trackers exist and are installed.

    Raises:
        RecipeError: names those that do not, or are not.
    """
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

"""From a recipe to a `transformers.Trainer`: its arguments, and the places where we differ from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from tokmask_peft.recipe import Recipe
from tokmask_peft.training.metrics import Predictions
from tokmask_peft.training.splits import Split


class OrderedEvalTrainer(Trainer):
    """A Trainer that evaluates in the order of the dataset, padded, however it batches the training texts."""

    compute_metrics: Any
    data_collator: Any

    def __init__(self, *args: Any, train_collator: Any = None, **kwargs: Any) -> None:
        """Make the trainer; `train_collator` makes the training batches, where they differ from the evaluation's."""
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator or self.data_collator

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training batches."""
        usual, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def predict_split(self, split: Split) -> Predictions:
        """Return the model's predictions for a split, without scoring them."""
        compute, self.compute_metrics = self.compute_metrics, None
        try:
            output = self.predict(split.dataset)
        finally:
            self.compute_metrics = compute
        return split.predictions(output.predictions, output.label_ids)


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
        # below 1 it is a share of the steps, from 1 on a number of steps
        warmup_steps=min(training.warmup, 0.999),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        neftune_noise_alpha=training.neftune_alpha,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=recipe.model.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.model.gradient_checkpointing else None,
        dataloader_pin_memory=device.type == "cuda",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
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


def collator(tokenizer: Any, task: str) -> Any:
    """Return the collator of a task: right padding to the longest text of the batch."""
    return DataCollatorForTokenClassification(tokenizer) if task == "token" else DataCollatorWithPadding(tokenizer)


def argmax_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Keep the predicted label ids only: `[batch, …, classes]` to `[batch, …]`."""
    first = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(dim=-1)


def scorer(split: Split) -> Callable[[Any], dict[str, float]]:
    """Return the Trainer's `compute_metrics` for a split: macro and weighted F1, and accuracy."""
    from tokmask_peft.training.metrics import scores

    def compute(output: Any) -> dict[str, float]:
        found = scores(*split.predictions(output.predictions, output.label_ids).flat(), split.labels)
        return {key: found[key] for key in ("f1_macro", "f1_weighted", "accuracy")}

    return compute

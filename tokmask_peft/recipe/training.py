"""The section `training`: batches, optimisation, loss, evaluation and reporting."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool

from tokmask_peft.recipe.section import Rate, Section, Share

Batching = Literal["grouped", "padding_free", "padded"]
Weights = Annotated[
    dict[str, Annotated[float, Field(ge=0.0)]], Field(title="a weight per label, as {en: 1.0, es: 2.0}")
]


class TrainingConfig(Section):
    """Optimisation, loss, evaluation and reporting."""

    epochs: float = Field(6.0, gt=0, description="passes over the training texts")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimizer steps; wins over epochs")
    batch_size: int = Field(32, ge=1, description="texts per forward pass and device")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes per optimizer step")
    tokens_per_batch: int | None = Field(
        None,
        ge=16,
        description="sub-tokens per forward pass and device, padding included, in place of batch_size texts: few long "
        "texts or many short ones",
    )
    auto_batch: StrictBool = Field(
        False,
        description="where memory runs out, go on with a smaller batch_size and as much more gradient_accumulation; "
        "not where the kernel kills the process instead, as Linux does on CPUs",
    )
    batching: Batching = Field(
        "padding_free",
        description="padding_free: random batches without padding, as one row with attention per text (BERT, XLM-R, "
        "DistilBERT, Llama, Mistral, Qwen2 and Qwen3; else, and with NEFTune, padded); padded: the same batches, "
        "padded to their longest text; grouped: random batches of similar length, but a label that goes with the "
        "length of a text then comes in clumps, which has kept runs from learning anything",
    )
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of AdamW, for adapter and head")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="how the learning rate moves after it has risen; constant has no rise"
    )
    warmup: Share = Field(0.06, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay; norms and biases are left out")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 is off")
    loss: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="focal: Lin et al. 2017")
    focal_gamma: float = Field(1.0, ge=0, description="focusing parameter of the focal loss")
    label_smoothing: Rate = Field(0.0, description="share of the target that is spread over all classes; 0 is off")
    class_weights: Literal["none", "inverse", "sqrt_inverse"] | Weights = Field(
        "sqrt_inverse",
        description="loss weight per class: sqrt_inverse is sqrt(N / (K n_c)), scaled to sum to K; or label -> weight",
    )
    neftune_alpha: float | None = Field(None, gt=0, description="NEFTune noise (Jain et al. 2023); null is off")
    patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better validation F1"
    )
    eval_batch_size: int = Field(128, ge=1, description="texts per forward pass and device in evaluation")
    logging_steps: int = Field(20, ge=1, description="optimizer steps between two lines of log.jsonl")
    baseline: StrictBool = Field(
        True, description="also score character n-grams with logistic regression on the same split"
    )
    report_to: tuple[str, ...] = Field(
        (), description="experiment trackers of transformers: wandb, tensorboard, trackio, …"
    )

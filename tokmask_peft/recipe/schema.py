"""The whole recipe: its sections, what must fit between them, and which of its fields are regularizers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, Field, StrictBool, field_validator, model_validator
from pydantic.fields import FieldInfo

from tokmask_peft.masking.config import Rate, Section, Share, TokenMaskConfig
from tokmask_peft.recipe.data import DataConfig
from tokmask_peft.tasks import get_task


@dataclass(frozen=True, slots=True)
class Regularizer:
    """Marks a field as a regularizer that a sweep can compare: `Annotated[float, Regularizer("rdrop", 0.0, 1.0)]`."""

    name: str  # of its arm in `tokmask sweep --arms`
    off: float | None  # the value that switches it off
    usual: float  # the strength of an arm that gives none


Batching = Literal["grouped", "padding_free", "padded"]

# If a field takes more than one kind of value, an error describes each kind by its title.
Modules = Annotated[tuple[str, ...], Field(min_length=1, title="a list of module names, for example [q_proj, v_proj]")]
LayerCount = Annotated[int, Field(ge=1, title="a number of layers, for example 6")]
ShareOfLayers = Annotated[float, Field(gt=0.0, lt=1.0, title="a share of the layers between 0 and 1, for example 0.5")]
Weight = Annotated[float, Field(ge=0.0)]
Epochs = Annotated[float, Field(gt=0, title="a number of epochs, for example 6")]
Texts = Annotated[int, Field(ge=1, title="a number of texts, for example 16")]
Evaluations = Annotated[int, Field(ge=1, title="a number of evaluations, for example 3")]
Weights = Annotated[dict[str, Weight], Field(title="a weight per label, as {en: 1.0, es: 2.0}")]


class ModelConfig(Section):
    """The frozen backbone: which one, and in which precision it is held."""

    backbone: str = Field(
        description="model id on the Hugging Face Hub, a folder, or a .gguf file: here, or "
        "OWNER/REPOSITORY/FILE.gguf on the Hub"
    )
    backbone_path: str | None = Field(
        None, description="load the backbone from here instead: a folder, or package:NAME/FOLDER of a Python package"
    )
    revision: str | None = Field(None, description="revision of the backbone on the Hub")
    quantization: Literal["auto", "nf4", "int8", "none"] = Field(
        "auto", description="auto: 4-bit NF4 if bitsandbytes runs on the device (it does on CPUs), otherwise none"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="auto: bf16 if the hardware has it, fp16 on NVIDIA GPUs that only have that (T4, V100, GTX 16, "
        "RTX 20), otherwise fp32; ARM CPUs always use fp32",
    )
    attention_dropout: Annotated[Rate | None, Regularizer("attention_dropout", off=0.0, usual=0.1)] = Field(
        None, description="dropout on the attention weights in training; null keeps the backbone's value"
    )
    embedding: Literal["resident", "offload", "8bit"] = Field(
        "resident",
        description="the frozen input embedding: resident on the device; offload keeps it in host memory and sends the "
        "rows of each batch; 8bit holds it on the device through bitsandbytes, with slightly different values",
    )
    attention: Literal["causal", "bidirectional"] = Field(
        "causal",
        description="what a sub-token of a decoder sees: causal, those before it; bidirectional, the whole text, for "
        "Gemma 3, Llama, Mistral, Qwen2 and Qwen3. Encoders see the whole text anyway: leave it at causal",
    )
    pooling: Literal["auto", "cls", "last", "mean", "max", "ends"] = Field(
        "auto",
        description="which states the head reads, if a text has one label: auto: those that transformers reads ([CLS], "
        "or a decoder's last sub-token); cls; last; mean or max of all; ends: the mean of the first and the last, for "
        "decoders with attention: bidirectional. For mean, max and ends stock PEFT needs the lines in the model card",
    )
    gradient_checkpointing: Literal["auto"] | StrictBool = Field(
        "auto", description="save memory at the cost of time: recompute activations; auto does if memory would run out"
    )
    trust_remote_code: StrictBool = Field(
        False, description="run the backbone's own code; set it only if you trust that code"
    )

    @model_validator(mode="before")
    @classmethod
    def _same_from_any_directory(cls, given: Any) -> Any:
        # from another directory, a relative folder would be taken for a Hub id, and somebody else's weights be loaded
        if not isinstance(given, dict):
            return given
        key = "backbone" if given.get("backbone_path") is None else "backbone_path"
        folder = given.get(key)
        # os.path, as Path.is_dir raises if a name is too long; a file is a .gguf file
        if isinstance(folder, str) and os.path.exists(folder) and not Path(folder).is_absolute():  # noqa: PTH110
            return {**given, key: str(Path(folder).absolute())}
        return given


class AdapterConfig(Section):
    """The LoRA adapter (Hu et al. 2021), through PEFT."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scaling numerator: the update is alpha / r times B A")
    dropout: Annotated[Rate, Regularizer("lora_dropout", off=0.0, usual=0.1)] = Field(
        0.0, description="dropout on the adapter's input; costs time and memory in every layer"
    )
    targets: Literal["auto"] | Modules = Field("auto", description="modules to adapt; auto: every linear layer")
    layers: Literal["all"] | LayerCount | ShareOfLayers = Field(
        "all", description="all, or a number or share (0.5) of the upper layers; the backward pass ends below them"
    )
    rslora: StrictBool = Field(False, description="scale by alpha / sqrt(r) (Kalajdzievski 2023)")
    dora: StrictBool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024)")
    license: str | None = Field(None, description="licence of the adapter, such as apache-2.0 (for the model card)")

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


class TrainingConfig(Section):
    """Optimisation, loss, evaluation and reporting."""

    epochs: Literal["auto"] | Epochs = Field(
        "auto",
        description="passes over the training texts; auto: enough for 400 optimizer steps with up to 300 texts, 650 "
        "with 1,000 and 2,500 with 30,000, but at least 2 and at most 40",
    )
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps; overrides epochs")
    batch_size: Literal["auto"] | Texts = Field(
        "auto",
        description="texts per forward pass and device; auto: 8 (16 from 4,000 training texts on, 32 from 20,000 on), "
        "divided among the devices and accumulated passes of an optimizer step",
    )
    gradient_accumulation: int = Field(1, ge=1, description="forward passes per optimizer step")
    tokens_per_batch: int | None = Field(
        None, ge=16, description="sub-tokens per forward pass and device, padding included, instead of batch_size texts"
    )
    auto_batch: StrictBool = Field(
        False,
        description="if memory runs out, continue with a smaller batch_size and more gradient_accumulation to match; "
        "has no effect if the kernel kills the process instead, as Linux does on CPUs",
    )
    batching: Batching = Field(
        "padding_free",
        description="padding_free: random batches without padding, as one row with attention per text (BERT, XLM-R, "
        "ModernBERT, Llama, Qwen, Gemma 3 and others; the rest, and NEFTune, use padded); padded: the same batches, "
        "padded to their longest text; grouped: random batches of similar length; if a label depends on length, it "
        "then comes in clumps, and some runs learned nothing",
    )
    head: Literal["probe", "random"] = Field(
        "random",
        description="where the head starts: random; or probe, logistic regression on the frozen backbone's features, "
        "which costs one forward pass over the texts and gives a second baseline (Kumar et al. 2022)",
    )
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate of AdamW, for adapter and head")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="how the learning rate moves after its warmup; constant has no warmup"
    )
    warmup: Share = Field(0.06, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay; norms and biases are excluded")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 is off")
    loss: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="focal: Lin et al. 2017")
    focal_gamma: float = Field(1.0, ge=0, description="focusing parameter of the focal loss")
    label_smoothing: Annotated[Rate, Regularizer("label_smoothing", off=0.0, usual=0.1)] = Field(
        0.0, description="share of the target that is spread over all classes; 0 is off"
    )
    views: Annotated[int, Regularizer("views", off=1, usual=2)] = Field(
        1, ge=1, le=2, description="2: each text is read twice, and `consistency` penalises differing answers"
    )
    views_masked: Literal["one", "both", "none"] = Field(
        "one", description="which of two views are masked; with none only dropout differs: R-Drop (Wu et al. 2021)"
    )
    consistency: float = Field(
        1.0, ge=0, description="weight of the symmetric KL divergence between the answers to two views"
    )
    class_weights: Literal["none", "inverse", "sqrt_inverse"] | Weights = Field(
        "sqrt_inverse",
        description="loss weight per class: sqrt_inverse is sqrt(N / (K n_c)), scaled to sum to K; or label: weight",
    )
    neftune_alpha: Annotated[float | None, Regularizer("neftune", off=None, usual=5)] = Field(
        None, gt=0, description="NEFTune noise (Jain et al. 2023); null is off"
    )
    best_metric: Literal["f1_macro", "f1_weighted", "accuracy", "f1_entities"] = Field(
        "f1_macro", description="validation score that chooses the checkpoint; f1_entities needs data.spans"
    )
    patience: Literal["auto"] | Evaluations | None = Field(
        "auto",
        description="stop after this many evaluations without a better score; auto: half the epochs if these are auto, "
        "otherwise null, which never stops",
    )
    eval_batch_size: int = Field(128, ge=1, description="texts per forward pass and device in evaluation")
    logging_steps: int = Field(20, ge=1, description="optimizer steps between two lines of log.jsonl")
    baseline: StrictBool = Field(True, description="also score character n-grams with logistic regression")
    report_to: tuple[str, ...] = Field((), description="experiment trackers: wandb, tensorboard, trackio, …")

    @property
    def micro_batch(self) -> int:
        """`batch_size` as a number: the most that it can be if it is not decided."""
        return 32 if self.batch_size == "auto" else self.batch_size

    def decided(self, texts: int, batches: int | None = None, processes: int = 1) -> dict[str, Any]:
        """Return the numbers for what is `auto` and depends on the training texts, by key.

        Few texts need small batches and many epochs: 36 steps, 3 epochs of 400 texts in batches of 32, end in one
        label for every text. `batches` counts one process's in an epoch, if a budget of sub-tokens makes them.
        """
        found: dict[str, Any] = {}
        passes, micro_batch = self.gradient_accumulation * processes, self.micro_batch
        if self.batch_size == "auto":
            step = 8 if texts < 4_000 else 16 if texts < 20_000 else 32
            found["batch_size"] = micro_batch = max(1, step // passes)
        if self.epochs == "auto":
            batches = batches or math.ceil(texts / (micro_batch * processes))
            steps = 400 * max(texts / 300, 1.0) ** 0.4
            epochs = math.ceil(steps / math.ceil(batches / self.gradient_accumulation))
            found["epochs"] = float(min(max(epochs, 2), 40))
        if self.patience == "auto":
            found["patience"] = math.ceil(found["epochs"] / 2) if "epochs" in found else None
        return found


class Recipe(Section):
    """A whole run. `Recipe.load` reads one from YAML, `tokmask_peft.train` runs it."""

    name: str = Field(description="name of the run: its folder below output_dir")
    output_dir: str = Field("runs", description="folder that holds the runs")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed of the head, batches, dropout and masked positions")
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig())
    masking: TokenMaskConfig = Field(default_factory=lambda: TokenMaskConfig())
    data: DataConfig
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())

    def __repr__(self) -> str:
        return f"Recipe({self.name!r}, task {self.data.task} on {self.model.backbone})"

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if value in {"", ".", ".."} or {*value} & {*"/\\\0"}:
            raise ValueError("the name becomes a folder: letters, digits, '.', '_' and '-' are safe, a slash is not")
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        row, embedding = "masking.trainable_mask trains a row of the embedding", self.model.embedding
        if self.masking.trainable_mask and self.adapter.layers != "all":
            why = f"{row}, so the backward pass would run through all layers and adapter.layers would save nothing"
            raise ValueError(f"{why}: set adapter.layers=all, or masking.trainable_mask=false")
        if self.masking.trainable_mask and embedding != "resident":
            why = f"{row}, which is not possible with model.embedding={embedding}"
            raise ValueError(f"{why}: set model.embedding=resident, or masking.trainable_mask=false")
        if self.masking.schedule == "ready" and get_task(self.data.task).words_given:
            raise ValueError("masking.schedule: ready masks by the label of a text: take a task with one label a text")
        if get_task(self.data.task).several and self.masking.make_schedule().reacts:
            why = f"masking.schedule: {self.masking.schedule} counts right answers, of which each text has one"
            raise ValueError(f"{why}: take constant, linear, cosine or warmup for several labels per text")
        if self.data.label_on != "auto" and not get_task(self.data.task).words_given:
            raise ValueError("data.label_on: words have no labels in this task: leave it at auto")
        spans = self.data.spans if get_task(self.data.task).words_given else "none"
        if self.data.spans not in ("auto", spans):
            raise ValueError("data.spans: entities are marked by labels of words: take a task with one label per word")
        if self.training.best_metric == "f1_entities" and spans == "none":
            why = "training.best_metric is f1_entities, but the labels mark no entities (data.spans)"
            raise ValueError(f"{why}: set data.spans to the scheme of the labels, or training.best_metric=f1_macro")
        if self.masking.where != "all" or self.masking.decoder_p > 0:
            why = "masking.where and masking.decoder_p are for models that generate, in trainers of your own"
            raise ValueError(f"{why}: set masking.where=all and masking.decoder_p=0")
        if self.training.auto_batch and self.training.tokens_per_batch is not None:
            why = "training.auto_batch changes batch_size, which training.tokens_per_batch replaces"
            raise ValueError(f"{why}: set training.auto_batch=false, or training.tokens_per_batch=null")
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / self.name

    @classmethod
    def load(cls, recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file or a shipped recipe, with bases and overrides; RecipeError with every problem found."""
        from tokmask_peft.recipe.loading import load_recipe

        return load_recipe(recipe, overrides)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, or None for a field with a value of its own."""
    if get_origin(annotation) in {Union, UnionType}:
        return next((found for part in get_args(annotation) if (found := section_of(part))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def all_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key below a section with its dotted path; sections themselves are left out."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from all_fields(section, f"{prefix}{name}.")


def regularizers(recipe: type[BaseModel] = Recipe) -> dict[str, Regularizer]:
    """Return the fields that are regularizers by dotted path, in the order of the recipe."""
    marks = ((path, mark) for path, field in all_fields(recipe) for mark in field.metadata)
    return {path: mark for path, mark in marks if isinstance(mark, Regularizer)}


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a copy of a recipe with other values at dotted keys of its sections."""
    for key, value in changes.items():
        name, _, inner = key.partition(".")
        recipe = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update={inner: value})})
    return recipe

"""The whole recipe: its sections, and what must fit between them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, field_validator, model_validator

from tokmask_peft.errors import DataError, RecipeError
from tokmask_peft.masking.config import Rate, Section, Share, TokenMaskConfig
from tokmask_peft.tasks import get_task


def _known_task(name: str) -> str:
    try:
        return get_task(name).name
    except DataError as error:
        raise ValueError(str(error)) from None


Task = Annotated[str, AfterValidator(_known_task)]

# Titles say in errors what is expected where a field takes more than one kind of value.
SplitName = Annotated[str, Field(min_length=1, title="a split or file name")]
ShareOfTrain = Annotated[float, Field(gt=0.0, lt=1.0, title="a share of train between 0 and 1, for example 0.1")]
LanguageCode = Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual)$", title="an ISO 639 code such as es or swa")]


class SourceConfig(Section):
    """Where texts come from: local files, a dataset on the Hugging Face Hub, or the built-in corpus."""

    path: str | None = Field(None, description="a local folder or file; wins over `hub` and `builtin`")
    hub: str | None = Field(None, description="dataset id on the Hugging Face Hub")
    hub_config: str | None = Field(None, description="configuration of the Hub dataset")
    hub_revision: str | None = Field(None, description="revision of the Hub dataset, for example refs/convert/parquet")
    builtin: StrictBool = Field(
        False, description="the built-in Spanish-English corpus (made up, for trying things out)"
    )
    format: str = Field(
        "auto",
        description="auto goes by the file's ending; or conll, csv, tsv, jsonl, parquet",
    )
    text_column: str | int | None = Field(
        None, description="column of the text, or of the words in token tasks; a number counts from 0 in CoNLL files"
    )
    label_column: str | int | None = Field(
        None, description="column of the label, or of the tags in token tasks; a number counts from 0 in CoNLL files"
    )
    name: str | None = Field(None, description="what the corpus is called (for the model card)")
    language: tuple[LanguageCode, ...] = Field(
        (), description="languages of the texts as ISO 639 codes, for example [es, en] (for the model card)"
    )
    license: str | None = Field(
        None, description="licence of the texts, as their source states it (for the model card)"
    )
    citation: str | None = Field(None, description="what to cite for the corpus (for the model card)")

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.path is None and self.hub is None and not self.builtin:
            raise ValueError(
                "no data: set path to a local folder or file, hub to a dataset id, or builtin to true in this section"
            )
        return self

    def expanded(self) -> Self:
        """Return a copy in which `${NAME}` and `~` in paths are replaced.

        Raises:
            RecipeError: an environment variable is not set.
        """
        problems: list[str] = []
        copy = self._expand("data", problems)
        if problems:
            raise RecipeError(problems)
        return copy

    def _expand(self, at: str, problems: list[str]) -> Self:
        if self.path is None:
            return self
        for name in re.findall(r"\$\{(\w+)\}", self.path):
            if not os.environ.get(name):
                problems.append(
                    f"{at}.path: is {self.path}, but the environment variable {name} is not set or empty; "
                    f"set it to the folder of your data, or give {at}.path=FOLDER"
                )
        return self.model_copy(update={"path": str(Path(os.path.expandvars(self.path)).expanduser())})


class DataConfig(SourceConfig):
    """Which texts a run learns from, and how they are split, cleaned and labelled."""

    task: Task = Field(description="sequence: one label per text; token: one label per word")
    train: str = Field("train", description="split or file name of the training texts")
    validation: SplitName | ShareOfTrain = Field(
        "validation", description="split or file name, or the share of train to set aside"
    )
    test: str | None = Field(
        "test", description="split or file name of the test texts; null if there is no labelled test"
    )
    test_source: SourceConfig | None = Field(None, description="other source of the test texts (zero-shot transfer)")
    label_map: dict[str, str] | None = Field(
        None, description="label in the file -> label to learn; the key '*' stands for every other label"
    )
    language_labels: tuple[str, ...] = Field(
        (), description="labels (after label_map) that are languages; scores are then also given by code-mixing index"
    )
    max_length: int = Field(128, ge=4, description="sub-tokens per text; what is longer is cut and reported")
    hygiene: Literal["remove", "report"] = Field(
        "remove",
        description="duplicates, conflicting labels and leaked evaluation texts: remove from train, or only report",
    )
    max_train: int | None = Field(None, ge=1, description="use at most so many training texts (seeded, stratified)")

    def _expand(self, at: str, problems: list[str]) -> Self:
        copy = super()._expand(at, problems)
        if self.test_source is None:
            return copy
        return copy.model_copy(update={"test_source": self.test_source._expand(f"{at}.test_source", problems)})

    @field_validator("validation", mode="before")
    @classmethod
    def _number_is_a_share(cls, value: Any) -> Any:
        # YAML 1.1 reads 5e-2 as text, and no split is called like a number
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", value.strip(), re.IGNORECASE):
            return float(value)
        return value


# Titles say in errors what is expected where a field takes more than one kind of value.
Modules = Annotated[tuple[str, ...], Field(min_length=1, title="a list of module names, for example [q_proj, v_proj]")]
LayerCount = Annotated[int, Field(ge=1, title="a number of layers, for example 6")]
ShareOfLayers = Annotated[float, Field(gt=0.0, lt=1.0, title="a share of the layers between 0 and 1, for example 0.5")]


class ModelConfig(Section):
    """The frozen backbone: which one, and in which precision it is held."""

    backbone: str = Field(description="model id on the Hugging Face Hub, or a local folder")
    backbone_path: str | None = Field(
        None,
        description="where to load the backbone from instead: a folder, or package:NAME/FOLDER, a folder in an "
        "installed Python package",
    )
    revision: str | None = Field(None, description="revision of the backbone on the Hub")
    quantization: Literal["auto", "nf4", "int8", "none"] = Field(
        "auto",
        description="auto: 4-bit NF4 where bitsandbytes runs on the device, a CPU too, else none",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 where the hardware has it, else fp32, and so on ARM CPUs"
    )
    attention_dropout: Rate | None = Field(
        None, description="dropout on the attention weights in training; null leaves it as the backbone has it"
    )
    embedding: Literal["resident", "offload", "8bit"] = Field(
        "resident",
        description="the frozen input embedding: resident on the device; offload keeps it in the host's memory and "
        "sends a batch's rows; 8bit holds it on the device through bitsandbytes, at slightly other values",
    )
    gradient_checkpointing: Literal["auto"] | StrictBool = Field(
        "auto", description="trade time for memory: recompute activations; auto does where they would not fit otherwise"
    )
    trust_remote_code: StrictBool = Field(
        False, description="run code that comes with the backbone; only if you trust it"
    )


class AdapterConfig(Section):
    """The LoRA adapter (Hu et al. 2021), through PEFT."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scaling numerator: the update is alpha / r times B A")
    dropout: Rate = Field(0.0, description="dropout on the adapter's input; takes time and memory in every layer")
    targets: Literal["auto"] | Modules = Field(
        "auto", description="module names to adapt; auto is every linear layer of the backbone"
    )
    layers: Literal["all"] | LayerCount | ShareOfLayers = Field(
        "all",
        description="all; or adapt only the upper layers, a number of them or a share, for example 0.5: the backward "
        "pass ends below them",
    )
    rslora: StrictBool = Field(False, description="scale by alpha / sqrt(r) (Kalajdzievski 2023)")
    dora: StrictBool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024)")
    license: str | None = Field(
        None, description="licence of the adapter as the Hub names it, for example apache-2.0 (for the model card)"
    )


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


class Recipe(Section):
    """A whole run. `Recipe.load` reads one from YAML, `tokmask_peft.train` runs it."""

    name: str = Field(description="name of the run: its folder below output_dir")
    output_dir: str = Field("runs", description="folder that holds the runs")
    seed: int = Field(
        42, ge=0, le=2**32 - 1, description="seed of the head, the batches, dropout and the masked positions"
    )
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=lambda: AdapterConfig())
    masking: TokenMaskConfig = Field(default_factory=lambda: TokenMaskConfig())
    data: DataConfig
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not value or value in {".", ".."} or any(sign in value for sign in "/\\\0"):
            raise ValueError("the name becomes a folder: letters, digits, '.', '_' and '-' are safe, a slash is not")
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.masking.trainable_mask and self.adapter.layers != "all":
            raise ValueError(
                "masking.trainable_mask trains a row of the embedding, so the backward pass would run through all "
                "layers and adapter.layers would save nothing: set adapter.layers=all, or masking.trainable_mask=false"
            )
        if self.masking.trainable_mask and self.model.embedding != "resident":
            raise ValueError(
                f"masking.trainable_mask trains a row of the embedding, which model.embedding={self.model.embedding} "
                "cannot: set model.embedding=resident, or masking.trainable_mask=false"
            )
        if self.training.auto_batch and self.training.tokens_per_batch is not None:
            raise ValueError(
                "training.auto_batch changes batch_size, which training.tokens_per_batch takes the place of: "
                "set training.auto_batch=false, or training.tokens_per_batch=null"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / self.name

    @classmethod
    def load(cls, recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file, or a shipped recipe by name, with its bases and `dotted.key=value` overrides.

        Raises:
            RecipeError: with every problem found.
        """
        from tokmask_peft.recipe.loading import load_recipe

        return load_recipe(recipe, overrides)

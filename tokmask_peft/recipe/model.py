"""The sections `model` and `adapter`: the frozen backbone, and what is trained on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool

from tokmask_peft.recipe.section import Rate, Section

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

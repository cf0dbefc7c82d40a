"""How an adapter folder is to be loaded: what PEFT's `adapter_config.json` has no place for, in `tokmask.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from tokmask_peft.errors import ModelError
from tokmask_peft.model.decisions import bitsandbytes_problem
from tokmask_peft.recipe import ModelConfig

LOADING_FILE = "tokmask.json"


@dataclass(frozen=True, slots=True)
class Loading:
    """What a loader needs besides the adapter, the labels and the name of the backbone.

    Attributes:
        max_length: sub-tokens per text in training, special tokens included; none if not known.
        package: `package:NAME/FOLDER`, where an installed Python package holds the backbone; else none. A folder of
            the machine that trained is never written here.
        revision: the backbone's revision on the Hub.
        quantization: what the backbone was held in while the adapter was trained: nf4, int8 or none.
        precision: bf16 or fp32, as it was trained.
        embedding: where the input embedding lay, as in the recipe; 8bit rounds it.
    """

    max_length: int | None = None
    package: str | None = None
    revision: str | None = None
    quantization: str = "none"
    precision: str = "fp32"
    embedding: str = "resident"

    @classmethod
    def of(cls, model: ModelConfig, max_length: int, quantization: str, precision: str) -> Self:
        """Describe a run that was trained with `model`, as its choices came out."""
        path = model.backbone_path
        package = path if path is not None and path.startswith("package:") else None
        return cls(max_length, package, model.revision, quantization, precision, model.embedding)

    @classmethod
    def read(cls, adapter: Path) -> Self | None:
        """Read `tokmask.json` of an adapter folder; none if there is none.

        Raises:
            ModelError: the file is not what this package writes.
        """
        path = adapter / LOADING_FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            loading = cls(**{key: found[key] for key in cls.__slots__ if key in found})
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        loading._check(path)
        return loading

    def applied(self, model: ModelConfig) -> ModelConfig:
        """Return settings with what was decided in training: the quantization, and bf16 where the hardware has it."""
        precision = "auto" if self.precision == "bf16" else "fp32"
        return model.model_copy(update={"quantization": self.quantization, "precision": precision})

    def _check(self, path: Path) -> None:
        """Refuse what did not come from this package: an adapter may be anyone's."""
        inside = (self.package or "package:a/b").removeprefix("package:").split("/")
        safe = inside[0].isidentifier() and ".." not in inside and len(inside) > 1
        if not safe or (self.package is not None and not self.package.startswith("package:")):
            raise ModelError(f"{path}: package is {self.package!r}, expected package:NAME/FOLDER or null")
        if self.max_length is not None and (type(self.max_length) is not int or self.max_length < 4):
            raise ModelError(f"{path}: max_length is {self.max_length!r}, expected a whole number from 4 on")
        if self.quantization not in ("nf4", "int8", "none") or self.precision not in ("bf16", "fp32"):
            raise ModelError(f"{path}: quantization or precision is unknown: {self.quantization}, {self.precision}")
        if self.embedding not in ("resident", "offload", "8bit"):
            raise ModelError(f"{path}: embedding is {self.embedding!r}, expected resident, offload or 8bit")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Held:
    """How the backbone of a trained adapter is held.

    Attributes:
        model: the settings to load it with.
        reasons: by what was decided, where it is not the user's wish.
        deviations: the reasons why something is not as in training, although nobody asked for that.
    """

    model: ModelConfig
    reasons: dict[str, str]
    deviations: tuple[str, ...]


def held(
    trained: ModelConfig, device: torch.device, quantization: str | None = None, precision: str | None = None
) -> Held:
    """Say how to hold the backbone of a trained adapter on this device.

    Args:
        trained: as it was in training.
        device: to compute on.
        quantization: `nf4`, `int8` or `none`; none given takes that of training where it runs on this device.
        precision: `bf16` or `fp32`; none given takes that of training.

    Raises:
        ModelError: there is no such quantization or precision.
    """
    if quantization not in (None, "nf4", "int8", "none") or precision not in (None, "auto", "bf16", "fp32"):
        raise ModelError("quantization is nf4, int8 or none; precision is bf16 or fp32")
    reasons, deviations = {}, {}
    if quantization is None:
        quantization, reasons["quantization"] = trained.quantization, "as in training"
        if quantization != "none" and (problem := bitsandbytes_problem(device.type)):
            quantization = "none"
            deviations["quantization"] = f"trained on {trained.quantization}, but {problem}: results differ slightly"
    embedding = trained.embedding
    if embedding == "offload" and device.type == "cpu":
        embedding = "resident"  # the host's memory is the device's: the same lookup
    elif embedding == "8bit" and (problem := bitsandbytes_problem(device.type)):
        embedding = "resident"
        deviations["embedding"] = f"trained on the 8-bit embedding, but {problem}: results differ slightly"
    here = {"quantization": quantization, "precision": precision or trained.precision, "embedding": embedding}
    return Held(trained.model_copy(update=here), reasons | deviations, tuple(deviations.values()))

"""Find a saved adapter: in a run folder, in a folder of its own, or on the Hub. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from tokmask_peft.errors import ModelError
from tokmask_peft.model.loading import Loading
from tokmask_peft.recipe import ModelConfig, Recipe, Task, TokenMaskConfig

HUB_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "labels.json",
    "calibration.json",
    "tokmask.json",
    "tokmask_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
"""What is fetched from the Hub: what loading needs, and no pickled weights."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved adapter, and how to load it.

    Attributes:
        name: as the user gave it, for messages.
        folder: holds `adapter_config.json`, the weights and `labels.json`.
        task: `sequence` or `token`.
        labels: label names in the order of the classifier's outputs.
        model: the backbone, with `quantization`, `precision` and `embedding` as trained.
        max_length: sub-tokens per text in training; none if not known.
        temperature: divides the logits; 1 without a calibration.
        masking: how tokens were masked in training; none if not known.
    """

    name: str
    folder: Path
    task: Task
    labels: tuple[str, ...]
    model: ModelConfig
    max_length: int | None
    temperature: float
    masking: TokenMaskConfig | None = None


def find_saved(model: str | Path, backbone: str | None = None) -> SavedAdapter:
    """Find the adapter that `model` names.

    Args:
        model: a run folder, an adapter folder, or the id of an adapter on the Hub, which is downloaded.
        backbone: a Hub id, a folder or `package:NAME/FOLDER` to load the backbone from, in place of what the adapter
            names.

    Raises:
        ModelError: there is no adapter of this package, with what to do.
    """
    run, folder = _locate(str(model))
    config = _json(folder / "adapter_config.json")
    labels = _json(folder / "labels.json")
    task, names = labels.get("task"), labels.get("labels")
    if task not in get_args(Task) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / 'labels.json'} does not hold a task and a list of labels")
    loading = Loading.read(folder)
    recipe = None if run is None else Recipe.load(run / "recipe.yaml")
    return SavedAdapter(
        name=str(model),
        folder=folder,
        task=cast(Task, task),
        labels=tuple(names),
        model=_model_config(folder, config, loading, recipe, backbone),
        max_length=loading.max_length if loading else recipe.data.max_length if recipe else None,
        temperature=_temperature(folder / "calibration.json"),
        masking=_masking(folder),
    )


def _locate(model: str) -> tuple[Path | None, Path]:
    """Return the run folder, if it is one, and the adapter folder."""
    path = Path(model).expanduser()
    if (path / "adapter_config.json").is_file():
        return None, path
    if (path / "recipe.yaml").is_file():
        if not (path / "adapter" / "adapter_config.json").is_file():
            raise ModelError(
                f"the run {model} has no adapter yet; finish it with `tokmask train {path}/recipe.yaml --resume`"
            )
        return path, path / "adapter"
    if path.exists():
        raise ModelError(f"{model} is neither a run (recipe.yaml) nor an adapter (adapter_config.json is missing)")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model} does not exist; give a run folder, an adapter folder, or a Hub id such as user/name")
    return None, _download(model)


def _download(hub_id: str) -> Path:
    """Fetch an adapter from the Hub; transport, cache and login are huggingface_hub's.

    Raises:
        ModelError: it cannot be fetched, or is no adapter.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    start = f"{hub_id} is no local folder, and as an id on the Hub it "
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except GatedRepoError as error:
        raise ModelError(f"{start}is gated: ask for access on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{start}is not there, or is private: check the name, or `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{start}is not in the cache and the Hub cannot be reached: check the network") from error
    except HFValidationError as error:
        raise ModelError(f"{start}is not valid: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        raise ModelError(f"{start}cannot be fetched: {_first_line(error)}") from error
    except OSError as error:
        raise ModelError(f"{start}cannot be fetched: {_first_line(error)}; check the network and try again") from error
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{start}holds no adapter (adapter_config.json is missing)")
    return folder


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{path} is missing: this adapter was not saved by tokmask_peft. PEFT can load it: "
            "AutoPeftModelForSequenceClassification.from_pretrained(…, num_labels=…)"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found


def _model_config(
    folder: Path, config: dict[str, Any], loading: Loading | None, recipe: Recipe | None, backbone: str | None
) -> ModelConfig:
    """Say which backbone to load, and from where: the user's word, the run's recipe, the adapter's, in this order."""
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(f"{folder / 'adapter_config.json'} names no base model; give one with --backbone")
    settings: dict[str, Any] = {"backbone": named, "quantization": "none"}
    if recipe is not None:
        settings = recipe.model.model_dump()
    elif loading is not None:
        settings |= {
            "backbone_path": loading.package,
            "revision": loading.revision,
            "embedding": loading.embedding,
        }
    if backbone is not None:
        local = backbone.startswith("package:") or Path(backbone).is_dir()
        settings |= {"backbone_path": backbone} if local else {"backbone": backbone, "backbone_path": None}
        settings["revision"] = None
    found = ModelConfig(**settings)
    return loading.applied(found) if loading is not None else found


def _temperature(path: Path) -> float:
    if not path.is_file():
        return 1.0
    temperature = _json(path).get("temperature")
    if not isinstance(temperature, int | float) or not math.isfinite(temperature) or temperature <= 0:
        raise ModelError(f"{path}: temperature is {temperature!r}, expected a positive number")
    return float(temperature)


def _masking(folder: Path) -> TokenMaskConfig | None:
    try:
        return TokenMaskConfig.from_pretrained(folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"{folder / 'tokmask_config.json'} cannot be read: {_first_line(error)}") from error

"""What a finished run left behind, read back for its report. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tokmask_peft.errors import ModelError, RunError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.recipe.schema import ModelConfig, Recipe, Task
from tokmask_peft.tasks import TASKS


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths in a run folder."""

    root: Path

    @property
    def adapter(self) -> Path:
        """The adapter with tokenizer, labels and model card: a folder to push as it is."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def result(self) -> Path:
        """Scores and everything that was measured."""
        return self.root / "result.json"

    @property
    def predictions(self) -> Path:
        """Gold and predicted label ids per text of validation and test."""
        return self.root / "predictions.json"

    @property
    def log(self) -> Path:
        """A JSON line per logged step."""
        return self.root / "log.jsonl"

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        found = [
            (int(folder.name.removeprefix("checkpoint-")), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.removeprefix("checkpoint-").isdigit() and _is_json(folder / "trainer_state.json")
        ]
        return max(found)[1] if found else None

    def finished(self) -> bool:
        """Return whether the run has its result."""
        return self.result.is_file()


def check_run(recipe: Recipe, resume: bool) -> RunFolder:
    """Return the run folder of a recipe, if it may be written; nothing is made yet.

    Raises:
        RunError: the name is taken and `resume` is off; or there is nothing to resume, the run is finished, or it
            was started with another recipe.
    """
    from tokmask_peft.recipe.loading import differences, load_recipe

    run = RunFolder(recipe.run_dir)
    ground = next(place for place in (run.root, *run.root.absolute().parents) if place.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        raise RunError(f"{run.root} cannot be a run folder: {ground} is a file or cannot be written; set output_dir")
    if not run.root.exists() or not any(run.root.iterdir()):
        if resume:
            raise RunError(f"there is no run to resume in {run.root}; start it without --resume")
        return run
    if not resume:
        what = "is finished" if run.finished() else "was not finished"
        remedy = "" if run.finished() else "continue it with --resume, or "
        raise RunError(f"the run {run.root} exists and {what}: {remedy}choose another name (name=…) or remove it")
    if run.finished():
        raise RunError(f"the run {run.root} is finished: its scores are in {run.result}; there is nothing to resume")
    if run.recipe.is_file():
        changed = differences(load_recipe(run.recipe), recipe)
        if changed:
            raise RunError(
                f"the run {run.root} was started with another recipe; resuming would mix two runs. "
                f"Differences: {'; '.join(changed)}. Use `tokmask train {run.recipe} --resume`, or another name."
            )
    return run


def start_run(run: RunFolder, recipe_text: str) -> None:
    """Make the run folder with its recipe; one that is being resumed keeps its own.

    Raises:
        RunError: the folder cannot be made or written.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        if not run.recipe.is_file():
            write_whole(run.recipe, recipe_text)
    except OSError as error:
        raise RunError(f"the run folder {run.root} cannot be made ({error.strerror}); set output_dir") from error


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write JSON as `write_whole` does; in one line without `indent`."""
    write_whole(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it, and after a power cut, too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_json(path: Path) -> bool:
    """Return whether a file is there and whole; the Trainer's may be empty after a power cut."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def open_finished(folder: str | Path) -> RunFolder:
    """Return the run in `folder`.

    Raises:
        RunError: the folder is no run, or the run has no adapter yet.
    """
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        raise RunError(f"{folder} is not a run folder (it holds no recipe.yaml)")
    if not (run.adapter / "adapter_config.json").is_file():
        raise RunError(f"the run {folder} has no adapter yet; finish it with `tokmask train {run.recipe} --resume`")
    return run


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
    if task not in TASKS or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{folder / 'labels.json'} does not hold a task and a list of labels")
    loading = Loading.read(folder)
    recipe = None if run is None else Recipe.load(run / "recipe.yaml")
    return SavedAdapter(
        name=str(model),
        folder=folder,
        task=str(task),
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


@dataclass(frozen=True, slots=True)
class Result:
    """What `result.json` of a finished run holds; its fields are the file's keys.

    Attributes:
        name: of the run.
        task: `sequence`, `token`, ….
        labels: in the order of the classifier's outputs.
        seed: of the run.
        masking: the section of the recipe.
        validation: scores as `training.metrics.scores` returns them, of the texts that selected the checkpoint.
        test: the same for the texts that nothing was selected on; none without such a split.
        baseline: the same for character n-grams, on the scored split; none if switched off.
        best_step: the optimizer step of the checkpoint that was kept.
        steps: optimizer steps of the training.
        calibration: the temperature and what it does to each split.
        data: what was read, merged, removed and cut.
        decisions: what was decided for the user, with the reasons.
        speed: seconds, steps, tokens per second, memory, environment.
    """

    name: str
    task: str
    labels: list[str]
    seed: int
    masking: dict[str, Any]
    validation: dict[str, Any]
    test: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    best_step: int | None = None
    steps: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    decisions: list[dict[str, str]] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)

    @property
    def scored_split(self) -> str:
        """The split whose scores count: test if there is one, otherwise validation."""
        return "test" if self.test else "validation"

    @property
    def scored(self) -> dict[str, Any]:
        """The scores of that split."""
        return self.test or self.validation

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds; what a run does not have is left out."""
        return {key: value for key in self.__slots__ if (value := getattr(self, key)) is not None}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned, of an older version too: keys that are not known are left out.

        Raises:
            KeyError: the scores or the labels are missing.
        """
        defaults: dict[str, Any] = {"name": "", "task": "sequence", "seed": 0, "masking": {}}
        return cls(
            **{
                key: found[key] if key in ("labels", "validation") else found.get(key, defaults.get(key))
                for key in cls.__slots__
                if key in found or key in defaults or key in ("labels", "validation")
            }
        )


def is_run(folder: str | Path) -> bool:
    """Return whether `folder` is the folder of one run."""
    return (Path(folder) / "recipe.yaml").is_file()


@dataclass(frozen=True, slots=True)
class Record:
    """A finished run as it lies on disk.

    Attributes:
        run: its folder.
        recipe: the resolved recipe.
        result: what `result.json` holds.
        log: the lines of `log.jsonl`; empty where there is none.
    """

    run: RunFolder
    recipe: Recipe
    result: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read a run.

        Raises:
            RunError: the folder is no finished run, or its files cannot be read.
        """
        run = open_finished(folder)
        if not run.finished():
            raise RunError(f"the run {folder} is not finished; finish it with `tokmask train {run.recipe} --resume`")
        try:
            result = json.loads(run.result.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{run.result} is not JSON: {error}") from error
        if not isinstance(result, dict) or "validation" not in result or "labels" not in result:
            raise RunError(f"{run.result} holds no scores of a run (validation, labels)")
        return cls(run, Recipe.load(run.recipe), result, _read_log(run.log))

    @property
    def split(self) -> str:
        """The split whose scores count: test where there is one, else validation."""
        return "test" if self.result.get("test") else "validation"

    @property
    def scores(self) -> dict[str, Any]:
        """The scores of that split."""
        return dict(self.result[self.split])


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the log that are JSON objects with a step; a killed run may leave half a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found

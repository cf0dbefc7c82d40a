"""What a run leaves behind: the run folder, its `result.json`, and the adapter folder; without heavy imports."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from tokmask_peft.errors import ModelError, RunError, first_line, is_whole, read_json, read_log, write_json, write_whole
from tokmask_peft.html import InNotebooks
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.model.location import check_files
from tokmask_peft.recipe.data import Task
from tokmask_peft.recipe.loading import differences, load_recipe
from tokmask_peft.recipe.schema import ModelConfig, Recipe
from tokmask_peft.spans import NO_SPANS, SCHEMES, find_scheme
from tokmask_peft.tasks import get_task

ADAPTER_FILE = "tokmask.json"
LOADED_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", ADAPTER_FILE, "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spiece.model", "chat_template.jinja"),
    *("labels.json", "calibration.json", "tokmask_config.json"),  # before format 2 of tokmask.json
)
"""Names of the files that loading needs: what is fetched from the Hub and pushed there, and no pickled weights."""


@dataclass
class RunFolder:
    """Paths in a run folder; itself a path for `load(run.folder)`."""

    root: Path

    def __post_init__(self) -> None:
        self.adapter = self.root / "adapter"  # with tokenizer, labels and model card: a folder to push as it is
        self.checkpoints = self.root / "checkpoints"  # of the Trainer
        self.recipe = self.root / "recipe.yaml"  # resolved
        self.fingerprint = self.root / "fingerprint.json"  # of texts, labels and backbone, for --resume
        self.result = self.root / "result.json"  # scores and everything that was measured
        self.predictions = self.root / "predictions.json"  # gold and predicted label ids of each text
        self.probe = self.root / "probe.json"  # the same of the linear probe that the head started from
        self.log = self.root / "log.jsonl"  # a line per logged step
        self.lock = self.root / ".lock"  # held by the process that trains

    def __fspath__(self) -> str:
        return str(self.root)

    def is_empty(self) -> bool:
        """Return whether nothing is in the folder, or it does not exist."""
        return not self.root.is_dir() or all(entry == self.lock for entry in self.root.iterdir())

    def last_checkpoint(self, say: Callable[[str], object] = str) -> Path | None:
        """Return the newest whole checkpoint, or None; `say` is called with the reason for each that is passed over."""
        named = [folder for folder in self.checkpoints.glob("checkpoint-*") if folder.name[11:].isdecimal()]
        for folder in sorted(named, key=lambda folder: int(folder.name[11:]), reverse=True):
            if (damaged := _damaged_part(folder)) is None:
                return folder
            say(f"{folder} is passed over: {damaged} is missing or damaged.")
        return None

    def finished(self) -> bool:
        """Return whether the run has its result."""
        return self.result.is_file()


_WEIGHTS = ("adapter_model.safetensors", "pytorch_model_fsdp*")
_PARTS = (_WEIGHTS, ("optimizer.pt", "optimizer.bin", "optimizer_*"), ("scheduler.pt",))
"""What resuming needs of a checkpoint, besides random states: for each part, the usual file, and those of shards."""


def _damaged_part(checkpoint: Path) -> str | None:
    """Return the part of a checkpoint that is missing or damaged, or None if the run can be resumed from it."""
    try:
        state = read_json(checkpoint / "trainer_state.json", RunError, "bad-checkpoint")
        best = checkpoint.with_name(f"checkpoint-{int(state['best_global_step'] or state['global_step'])}")
        processes = int(state.get("stateful_callbacks", {}).get("LogFile", {}).get("processes", 0))
    except (RunError, KeyError, AttributeError, TypeError, ValueError):
        return "trainer_state.json"
    if not processes and (numbered := [*checkpoint.glob("rng_state_*")]):  # of an older version
        processes = max(2, len(numbered))
    if pipes := [path.name for path in checkpoint.iterdir() if not (path.is_file() or path.is_dir())]:
        return pipes[0]
    states = [(f"rng_state_{rank}.pth",) for rank in range(processes)] if processes > 1 else [("rng_state.pth",)]
    for folder, names in [(best, _WEIGHTS), *((checkpoint, names) for names in (*_PARTS, *states))]:
        found = [path for name in names for path in folder.glob(name)]
        if not found or not all(map(is_whole, found)):
            return names[0] if folder == checkpoint else f"its best checkpoint, {folder.name},"
    return None


def is_run(folder: str | Path) -> bool:
    """Return whether `folder` is the folder of one run."""
    return RunFolder(Path(folder)).recipe.is_file()


def check_run(recipe: Recipe, resume: bool) -> RunFolder:
    """Return a recipe's run folder; RunError if it is taken, cannot be resumed, or was started with another recipe."""
    run = RunFolder(recipe.run_dir)
    if run.is_empty():
        if resume:
            raise RunError(f"there is no run to resume in {run.root}; start it without --resume", code="no-run")
        return run
    remedy = "choose another name (name=…) or remove it"
    if run.finished():
        raise RunError(f"the run {run.root} is finished: its scores are in {run.result}; {remedy}", code="run-finished")
    if not resume:
        problem = f"exists and was not finished: continue it with --resume, or {remedy}"
        raise RunError(f"the run {run.root} {problem}", code="run-unfinished")
    if run.recipe.is_file() and (changed := differences(load_recipe(run.recipe), recipe)):
        problem = f"was started with another recipe; resuming would mix two runs. Differences: {'; '.join(changed)}"
        remedy = f"Use `tokmask train {run.recipe} --resume`, or another name."
        raise RunError(f"the run {run.root} {problem}. {remedy}", code="other-recipe", differences=changed)
    return run


def start_run(run: RunFolder, recipe_text: str, fingerprint: Mapping[str, str]) -> None:
    """Write a run's recipe and the fingerprint of its data and backbone; RunError if a resumed run has another one."""
    if not run.recipe.is_file():
        write_whole(run.recipe, recipe_text)
    before = read_json(run.fingerprint, RunError, "bad-fingerprint") if run.fingerprint.is_file() else {}
    if not before:
        write_json(run.fingerprint, fingerprint)
    if changed := [key for key, value in fingerprint.items() if before.get(key, value) != value]:
        values = f" ({before['labels']} before, {fingerprint['labels']} now)" if "labels" in changed else ""
        problem = f"was started with other data or another backbone; what has changed: {', '.join(changed)}{values}"
        problem = f"the run {run.root} {problem}. Restore it, or start another run (name=…)"
        raise RunError(problem, code="other-data", changed=changed)


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Hold a run's lock, in its folder, which is made, and removed if it stays empty; RunError if it is taken."""
    created = [folder for folder in (run.root, *run.root.parents) if not folder.exists()]
    lock = FileLock(run.lock, timeout=0)
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        while lock.acquire() and not run.lock.exists():  # an older filelock takes a file that was removed just before
            lock.release()
    except Timeout as error:
        remedy = "wait until it ends, or choose another name (name=…)"
        raise RunError(f"another process is training the run {run.root}; {remedy}", code="run-in-use") from error
    except OSError as error:
        message = f"the run folder {run.root} cannot be created or written ({error.strerror}); set output_dir"
        raise RunError(message, code="not-writable", path=run.root) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            run.lock.unlink()  # before it is released, or it could be another process's
        lock.release()
        with contextlib.suppress(OSError):  # of one that is not empty
            for folder in created:
                folder.rmdir()


def open_finished(folder: str | Path, *, scored: bool = False) -> RunFolder:
    """Return the run folder `folder`; RunError if it is not one or has no adapter yet, or, if `scored`, no result."""
    run = RunFolder(Path(folder))
    if not run.recipe.is_file():
        raise RunError(f"{folder} is not a run folder (it holds no recipe.yaml)", code="not-a-run")
    needed = {"adapter": run.adapter / "adapter_config.json", **({"result": run.result} if scored else {})}
    for what, file in needed.items():
        if not file.is_file():
            problem = f"has no {what} yet; finish it with `tokmask train {run.recipe} --resume`"
            raise RunError(f"the run {folder} {problem}", code="unfinished")
    return run


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result(InNotebooks):
    """What `result.json` of a finished run holds; its fields are the file's keys, in the file's order."""

    name: str = ""
    task: str = "sequence"
    labels: list[str]  # in the order of the classifier's outputs
    seed: int = 0
    masking: dict[str, Any] = field(default_factory=dict)  # as in the recipe
    validation: dict[str, Any]  # as `training.metrics.scores` returns it, of the texts that selected the checkpoint
    best_step: int | None = None  # optimizer steps up to the checkpoint that was kept
    steps: int | None = None
    test: dict[str, Any] | None = None  # of the texts that nothing was selected on; None without such a split
    calibration: dict[str, Any] = field(default_factory=dict)  # the temperature, and what it does to each split
    baseline: dict[str, Any] | None = None  # of character n-grams on the scored split; None if switched off
    probe: dict[str, Any] | None = None  # of a linear probe on the frozen backbone, if the head started from one
    data: dict[str, Any] = field(default_factory=dict)  # what was read, merged, removed and cut
    decisions: list[dict[str, str]] = field(default_factory=list)  # made for the user, with the reasons
    warnings: list[dict[str, str]] = field(default_factory=list)  # code, message and key to change
    speed: dict[str, Any] = field(default_factory=dict)  # seconds, steps, tokens per second, memory, environment

    @property
    def scored_split(self) -> str:
        """The split whose scores count: test if there is one, otherwise validation."""
        return "test" if self.test else "validation"

    @property
    def scored(self) -> dict[str, Any]:
        """The scores of that split."""
        return self.test or self.validation

    def __repr__(self) -> str:
        return f"Result({self.name!r}, macro-F1 on {self.scored_split} {self.scored['f1_macro']:.4f})"

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds; scores that a run does not have are left out."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        optional = ("test", "baseline", "probe", "warnings")
        return {key: value for key, value in found.items() if value or key not in optional}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned, of another version too; ValidationError if scores, labels or a type are off."""
        return TypeAdapter(cls).validate_python(dict(found))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `result.json`; RunError if it cannot be read, or holds no scores."""
        try:
            return cls.from_dict(read_json(path, RunError, "bad-result"))
        except ValidationError as error:
            key, problem = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
            message = f"{path} does not hold the scores of a run: {key}: {problem}"
            raise RunError(message, code="bad-result", path=path, key=key) from error


@dataclass(frozen=True, slots=True)
class Run(InNotebooks):
    """A finished run, with its resolved recipe and what `result.json` holds."""

    folder: RunFolder
    recipe: Recipe
    result: Result

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of `log.jsonl`."""
        return read_log(self.folder.log)


def open_run(folder: str | Path) -> Run:
    """Read a finished run; RunError if it is not one, or its files cannot be read."""
    run = open_finished(folder, scored=True)
    return Run(run, load_recipe(run.recipe), Result.read(run.result))


class _Part(BaseModel):
    """A part of `tokmask.json`; keys of a later version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class Loading(_Part):
    """How the backbone was loaded to train the adapter. Everything is checked, since an adapter may be anyone's."""

    max_length: int | None = Field(None, ge=4)  # sub-tokens per text, special tokens included; None if not known
    package: str | None = None  # `package:NAME/FOLDER`, if a Python package holds the backbone; never a folder
    revision: str | None = None  # of the backbone on the Hub
    quantization: str = Field("none", pattern="^(nf4|int8|none)$")
    precision: str = Field("fp32", pattern="^(bf16|fp16|fp32)$")
    embedding: str = Field("resident", pattern="^(resident|offload|8bit)$")
    weights: dict[str, str] = Field(default_factory=dict)  # of the backbone, from `weight_hashes`
    attention: str = Field("causal", pattern="^(causal|bidirectional)$")
    pooling: str = Field("auto", pattern="^(auto|cls|last|mean|max|ends)$")
    label_on: str = Field("first", pattern="^(first|last|mean)$")
    spans: str = Field(NO_SPANS, pattern=f"^({'|'.join([NO_SPANS, *SCHEMES])})$")
    scaling: float | None = Field(None, gt=0)  # of the LoRA update; None if not known

    @field_validator("package")
    @classmethod
    def _is_in_a_package(cls, value: str | None) -> str | None:
        if value is not None:
            kind, _, path = value.partition(":")
            name, *inside = path.split("/")
            if kind != "package" or not name.isidentifier() or not inside or ".." in inside:
                raise ValueError(f"{value!r}, expected package:NAME/FOLDER or null")
        return value

    @property
    def trained(self) -> dict[str, Any]:
        """What `load_adapter` compares and applies: the weights of the backbone, and the scaling."""
        return self.model_dump(include={"weights", "scaling"})


class Calibration(_Part):
    """The temperature that divides the logits; for several labels per text, also their calibrated `thresholds`."""

    model_config = ConfigDict(extra="allow")

    temperature: float = Field(1.0, ge=0.001, le=1000)


class AdapterInfo(_Part):
    """What `tokmask.json` in an adapter folder holds, in addition to PEFT's own files."""

    format: Literal[2] = 2  # before 2, the parts were four files
    task: Task
    labels: tuple[str, ...] = Field(min_length=1)  # in the order of the classifier's outputs
    pair: tuple[str, str] | None = None  # columns of the two texts, if the texts are pairs
    calibration: Calibration = Field(default_factory=lambda: Calibration())
    loading: Loading | None = None  # None if not known, as `masking`
    masking: TokenMaskConfig | None = None

    @field_validator("labels", "pair")
    @classmethod
    def _is_possible(cls, value: tuple[str, ...] | None, known: ValidationInfo) -> tuple[str, ...] | None:
        if known.field_name == "labels" and value and len({*value, ""}) <= len(value):
            raise ValueError("a label is empty or given twice")
        if known.field_name == "pair" and value and get_task(known.data.get("task", "sequence")).words_given:
            raise ValueError("words have no second text")
        return value

    def write(self, adapter: Path) -> None:
        """Write the file into an adapter folder."""
        exclude: dict[str, Any] = {} if self.pair else {"pair": True}
        if self.loading is not None and self.loading.spans == NO_SPANS:
            exclude["loading"] = {"spans"}
        write_json(adapter / ADAPTER_FILE, self.model_dump(mode="json", exclude=exclude))

    @classmethod
    def read(cls, adapter: Path) -> Self:
        """Read an adapter folder, of any version of this package; ModelError if it did not write the folder."""
        check_files(adapter)
        path, old = adapter / ADAPTER_FILE, adapter / "labels.json"
        found = _read_json(path) if path.is_file() or not old.is_file() else {}
        if "format" not in found:  # four files; this one held how to load
            found = {**_read_json(old), "loading": found or None}
            parts = {"calibration": "calibration.json", "masking": "tokmask_config.json"}
            found |= {key: _read_json(adapter / name) for key, name in parts.items() if (adapter / name).is_file()}
        try:
            return cls.model_validate_json(json.dumps(found))
        except ValidationError as error:
            key, problem = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
            message = f"{path} cannot be used: {key}: {problem}"
            raise ModelError(message, code="bad-adapter-file", path=path, key=key) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        remedy = "PEFT can load it: AutoPeftModelForSequenceClassification.from_pretrained(…, num_labels=…)"
        message = f"{path} is missing: this adapter was not saved by tokmask_peft. {remedy}"
        raise ModelError(message, code="foreign-adapter", path=path)
    return read_json(path, ModelError, "bad-adapter-file")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved adapter, and how to load it."""

    name: str  # as the user gave it, for messages
    folder: Path
    model: ModelConfig  # with `quantization`, `precision` and `embedding` as trained
    info: AdapterInfo
    loading: Loading  # that of `info`, or what is known of an older adapter


def find_saved(
    model: str | PathLike[str] | SavedAdapter, backbone: str | None = None, *, trust_remote_code: bool = False
) -> SavedAdapter:
    """Find the adapter that `model` names; one that was found already is returned as it is.

    Args:
        model: a run folder, an adapter folder, or the id of an adapter on the Hub, which is downloaded.
        backbone: a Hub id, a folder or `package:NAME/FOLDER`, in place of the backbone that the adapter names.
        trust_remote_code: run the backbone's own code. The run's recipe cannot ask for it: it may be a stranger's.

    Raises:
        ModelError, RunError: no adapter of this package was found, or the run has none yet.
    """
    if isinstance(model, SavedAdapter):
        return model
    path, recipe = Path(model).expanduser(), None
    if (path / "adapter_config.json").is_file():
        folder = path
    elif is_run(path):
        folder, recipe = open_finished(path).adapter, load_recipe(path / "recipe.yaml")
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        problem = "is neither a run (recipe.yaml) nor an adapter (adapter_config.json)"
        problem = problem if path.exists() else "does not exist"
        expected = "give a run folder, an adapter folder, or a Hub id such as user/name"
        raise ModelError(f"{model} {problem}; {expected}", code="no-adapter", path=path)
    else:
        folder = _download(str(model))
    named = _read_json(place := folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ModelError(f"{place} names no base model; give one with --backbone", code="no-base-model", path=folder)
    loading = (info := AdapterInfo.read(folder)).loading
    # which backbone, and from where: the user's word first, then the run's recipe, then the adapter
    settings: dict[str, Any] = recipe.model.model_dump() if recipe else {"backbone": named, "quantization": "none"}
    if recipe is None and loading is not None:
        settings |= {"backbone_path": loading.package, "revision": loading.revision, "embedding": loading.embedding}
    if backbone is not None:
        local = backbone.startswith("package:") or Path(backbone).is_dir()
        settings |= {"backbone_path": backbone} if local else {"backbone": backbone, "backbone_path": None}
        settings["revision"] = None
    if loading is not None:  # bf16 if the hardware has it
        precision = "auto" if loading.precision == "bf16" else loading.precision
        settings |= loading.model_dump(include={"quantization", "pooling", "attention"}) | {"precision": precision}
    config = ModelConfig(**settings | {"trust_remote_code": trust_remote_code})
    if loading is None and recipe is not None:  # of an older version, whose words were not repaired, or lost
        marked = find_scheme(info.labels, ())[0] if recipe.training.best_metric == "f1_entities" else NO_SPANS
        spans = marked if recipe.data.spans == "auto" else recipe.data.spans
        known: dict[str, Any] = {"max_length": recipe.data.max_length, "label_on": recipe.data.label_on, "spans": spans}
        loading = Loading(**{key: value for key, value in known.items() if value != "auto"})
    return SavedAdapter(name=str(model), folder=folder, model=config, info=info, loading=loading or Loading())


def _download(hub_id: str) -> Path:
    """Fetch an adapter from the Hub; transport, cache and login are huggingface_hub's."""
    from huggingface_hub import errors, snapshot_download

    remedies = {
        errors.GatedRepoError: "is gated: ask for access on its page, then `hf auth login`",
        errors.RepositoryNotFoundError: "does not exist, or is private: check the name, or `hf auth login`",
        errors.LocalEntryNotFoundError: "is not in the cache and the Hub cannot be reached: check the network",
        errors.HFValidationError: "is not valid: {reason}",
        errors.HfHubHTTPError: "cannot be fetched: {reason}",
        OSError: "cannot be fetched: {reason}; check the network and try again",
    }
    start = f"{hub_id} is not a local folder, and as an id on the Hub it "
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(LOADED_FILES)))
    except (OSError, errors.HFValidationError) as error:
        problem = next(text for kind, text in remedies.items() if isinstance(error, kind))
        raise ModelError(start + problem.format(reason=first_line(error)), code="not-on-hub", id=hub_id) from error
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{start}holds no adapter (adapter_config.json is missing)", code="no-adapter", id=hub_id)
    return folder

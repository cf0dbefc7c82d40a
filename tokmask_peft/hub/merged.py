"""What `push --merged` sends: a plain transformers model, with a card that says so."""

from __future__ import annotations

import json
from pathlib import Path

from tokmask_peft.errors import HubError
from tokmask_peft.hub.card import merged_card
from tokmask_peft.hub.card_scores import PICTURE
from tokmask_peft.hub.card_snippets import PLACEHOLDER
from tokmask_peft.inference.export import export_merged
from tokmask_peft.recipe.io import load_recipe
from tokmask_peft.training.run_folder import RunFolder


def write_merged(run: RunFolder, repo_id: str, folder: Path) -> list[str]:
    """Merge a run's adapter into its backbone, and write the model with its card and picture.

    Args:
        run: a finished run.
        repo_id: what the card's snippet loads.
        folder: is made.

    Returns:
        What a user of the model should know, in sentences.

    Raises:
        ModelError: the model cannot be merged.
        HubError: the picture is a link, which could lead anywhere.
    """
    done = export_merged(run.root, folder)
    picture = run.adapter / PICTURE
    if picture.is_symlink():
        raise HubError(f"{picture} is a link; links are not pushed")
    if picture.is_file():
        (folder / PICTURE).write_bytes(picture.read_bytes())
    result = json.loads(run.result.read_text(encoding="utf-8"))
    drawn = PICTURE if picture.is_file() else None
    card = merged_card(load_recipe(run.recipe), result, notes=done.notes, picture=drawn)
    (folder / "README.md").write_text(card.replace(PLACEHOLDER, repo_id), encoding="utf-8")
    return list(done.notes)

"""A whole run: the training, and the model card beside the adapter."""

from __future__ import annotations

from pathlib import Path

from tokmask_peft.hub.card import write_card
from tokmask_peft.recipe import Recipe
from tokmask_peft.training.fit import fit
from tokmask_peft.training.session import Run


def train(recipe: Recipe | str | Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train a token-masked adapter as a recipe says.

    Args:
        recipe: a recipe, the path of one, or the name of a shipped one.
        resume: continue an interrupted run from its newest checkpoint.
        quiet: print nothing.

    Returns:
        The run: its folder, and what `result.json` holds.

    Raises:
        RecipeError, DataError, ModelError, RunError: with what to do.
        RunInterruptedError: on Ctrl-C; the run can be resumed.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    return fit(recipe, write_card, resume=resume, quiet=quiet)

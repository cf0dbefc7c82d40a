"""From a recipe to a run: train, keep the best checkpoint, score it, and leave the evidence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback, set_seed

from tokmask_peft.console import ProgressDisplay, make_console, print_decisions
from tokmask_peft.data import load_corpus
from tokmask_peft.errors import RecipeError, RunError
from tokmask_peft.masking import MaskToken, choose_mask_token
from tokmask_peft.masking.embedding import embedding_weight, find_embedding
from tokmask_peft.masking.mask_token import fill_spare_row, used_rows
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import Backbone, load_backbone
from tokmask_peft.model.decisions import Decision
from tokmask_peft.model.padding_free import choose_batching, enable_padding_free
from tokmask_peft.recipe import Recipe
from tokmask_peft.recipe.io import to_yaml
from tokmask_peft.training.adapter_folder import CardWriter
from tokmask_peft.training.environment import check_sharding, processes, versions
from tokmask_peft.training.out_of_memory import explained_memory_errors
from tokmask_peft.training.run_folder import RunFolder, check_run
from tokmask_peft.training.session import Run, Session
from tokmask_peft.training.trainer import OrderedEvalTrainer, check_trackers


def fit(recipe: Recipe, write_card: CardWriter, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train as `tokmask_peft.run.train` says, which also tells what is returned and raised.

    Args:
        recipe: what to train.
        write_card: writes the model card, before `result.json` says that the run is finished.
        resume: continue an interrupted run from its newest checkpoint.
        quiet: print nothing.
    """
    state = processes()
    console = make_console(quiet or not state.is_main_process)
    run = check_run(recipe, resume)
    check_trackers(recipe.training.report_to)
    check_sharding()
    if recipe.training.auto_batch and state.num_processes > 1:
        raise RunError("training.auto_batch works in one process: with several, set training.batch_size yourself")
    state.wait_for_everyone()
    session, decisions, text = _open(recipe, run, console, state.device)
    print_decisions(console, decisions)
    with session.memory_errors():
        return session.run_to_end(decisions, resume, text, write_card)


def train_only(
    recipe: Recipe,
    folder: Path,
    observers: Callable[[OrderedEvalTrainer, MaskToken | None], list[TrainerCallback]],
    *,
    quiet: bool = False,
) -> Recipe:
    """Train as a recipe says, and keep nothing: no evaluation, checkpoints, scores or adapter.

    For studies that look at the training itself. The weights move as in `fit`.

    Args:
        recipe: early stopping and trackers are switched off in it.
        folder: takes `log.jsonl`.
        observers: makes callbacks from the trainer and the mask token, which is none where nothing is masked.
        quiet: print nothing.

    Returns:
        The recipe with what was decided for this machine.

    Raises:
        RecipeError, DataError, ModelError, RunError: with what to do.
    """
    state = processes()
    if state.num_processes > 1:
        raise RunError("this training is observed in one process: start it without torchrun or accelerate launch")
    quiet_training = recipe.training.model_copy(update={"patience": None, "report_to": ()})
    recipe = recipe.model_copy(update={"training": quiet_training})
    console = make_console(quiet)
    session, decisions, _ = _open(recipe, RunFolder(folder), console, state.device)
    print_decisions(console, decisions)
    display = ProgressDisplay(console)
    with session.memory_errors():
        trainer = session.trainer([display])
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        for observer in observers(trainer, session.mask):
            trainer.add_callback(observer)
        try:
            trainer.train()
        finally:
            display.close()
            with contextlib.suppress(OSError):  # the Trainer makes the folder, and nothing is in it
                session.run.checkpoints.rmdir()
    return session.recipe


def _open(
    recipe: Recipe, run: RunFolder, console: Console, device: torch.device
) -> tuple[Session, tuple[Decision, ...], str]:
    """Load data and backbone and add the adapter; return the session, its decisions and the recipe's text."""
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    set_seed(recipe.seed)  # before the head is drawn
    with explained_memory_errors(recipe, movable=False, loading=True):
        backbone = load_backbone(recipe.model, recipe.data.task, corpus.labels, device)
    mask, mask_decisions = _choose_mask(recipe, backbone)
    batching = choose_batching(
        recipe.training.batching, backbone.model, neftune=recipe.training.neftune_alpha is not None
    )
    if batching.choice == "padding_free":
        enable_padding_free(backbone.model)
    trained_row = mask.id if mask is not None and recipe.masking.trainable_mask else None
    with explained_memory_errors(recipe, movable=False, loading=True):
        model, decisions = add_adapter(backbone, recipe.adapter, recipe.data.task, trained_row)
    text = _recipe_text(recipe)
    batched = recipe.training.model_copy(update={"batching": batching.choice})
    recipe = recipe.model_copy(update={"training": batched})
    session = Session(recipe, corpus, backbone, model, mask, run, console, device)
    decisions = (*backbone.decisions, batching, session.decide_on_memory(), *mask_decisions, *decisions)
    return session, decisions, text


def _recipe_text(recipe: Recipe) -> str:
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = f"# The resolved recipe of this run. Versions: {listed}.\n"
    return (
        f"{head}# Repeat it: tokmask train {recipe.run_dir / 'recipe.yaml'} name={recipe.name}-again\n{to_yaml(recipe)}"
    )


def _choose_mask(recipe: Recipe, backbone: Backbone) -> tuple[MaskToken | None, tuple[Decision, ...]]:
    config = recipe.masking
    if config.is_off and not config.trainable_mask:
        return None, (Decision("mask token", "none", "masking.p is 0: nothing is masked"),)
    embedding = find_embedding(backbone.model)
    rows = embedding_weight(embedding).shape[0]
    outside = [token_id for token_id in config.protect if token_id >= rows]
    if outside:
        raise RecipeError([f"masking.protect: {outside} lie outside the embedding, which has rows 0 to {rows - 1}"])
    mask = choose_mask_token(backbone.tokenizer, rows, config.mask_token)
    if config.trainable_mask and mask.kind == "spare":
        fill_spare_row(embedding, mask, used_rows(backbone.tokenizer))
    return mask, (Decision("mask token", f"id {mask.id} ({mask.kind})", mask.reason),)

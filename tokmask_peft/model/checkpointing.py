"""Gradient checkpointing that starts where the adapter does."""

from __future__ import annotations

from typing import Any

from tokmask_peft.errors import ModelError


def can_checkpoint(model: Any) -> bool:
    """Return whether the class of a model of transformers, bare or wrapped by PEFT, can checkpoint its layers.

    ALBERT, MPNet, SqueezeBERT, Funnel and XLM cannot.
    """
    return bool(model.supports_gradient_checkpointing)


def check_checkpointing(model: Any, wanted: bool | str) -> None:
    """Refuse `model.gradient_checkpointing: true` for a model that cannot do it.

    Raises:
        ModelError: it cannot.
    """
    if wanted is True and not can_checkpoint(model):
        what = type(model).__name__
        raise ModelError(f"model.gradient_checkpointing is true, but {what} cannot do that: set it to false")


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Compute the activations of each layer again in the backward pass instead of keeping them. May be repeated.

    transformers makes the embedding's output require gradients at this occasion, so that the backward pass, and with it
    what is computed again, goes through layers below the first adapter for nothing. Only reentrant checkpointing needs
    that, which is not used here.

    Args:
        model: of transformers, bare or wrapped by PEFT.
        options: for torch's `checkpoint`.
    """
    model.gradient_checkpointing_enable(options or {"use_reentrant": False})
    model.disable_input_require_grads()

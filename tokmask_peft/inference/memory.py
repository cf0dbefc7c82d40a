"""Running out of memory with a trained adapter ends in one message that says what helps."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from tokmask_peft.errors import ModelError
from tokmask_peft.model.memory.exhausted import instead_of_memory_errors, message


def loading_memory_errors(
    device: torch.device, what: str = "while the model was loaded"
) -> AbstractContextManager[None]:
    """Turn running out of memory into a ModelError.

    Args:
        device: that the model is to compute on.
        what: is done with the model.
    """
    return instead_of_memory_errors(lambda said: ModelError(message(what, said, _elsewhere(device))))


def prediction_memory_errors(device: torch.device, windows: int = 1) -> AbstractContextManager[None]:
    """Turn running out of memory in a forward pass into a ModelError.

    Args:
        device: that computes.
        windows: in this pass; a text longer than a window is read in several.
    """
    fewer = max(windows // 4, 1)
    # the demo and `report` compute with the usual batches, and have no option for them
    ways = [f"--batch-size {fewer} (batch_size={fewer}) where the command has it"] if windows > 1 else []
    ways += _elsewhere(device)
    return instead_of_memory_errors(lambda said: ModelError(message("in prediction", said, ways)))


def _elsewhere(device: torch.device) -> list[str]:
    ways = ["other programs closed"]
    if device.type != "cpu":
        ways.append("--device cpu (device='cpu')")
    if device.type == "cuda":
        ways[-1] += ", or CUDA_VISIBLE_DEVICES= before a command without --device"
    return ways

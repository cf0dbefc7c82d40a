"""Find a model's input embedding below the wrappers, and its weight below PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokmask_peft.errors import MaskTokenError


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is spread over processes."""
    return hasattr(weight, "full_tensor")  # of DTensor alone; asking so spares the import of torch.distributed.tensor


def whole(weight: Tensor) -> Tensor:
    """Return a weight as a plain tensor; every process has to call this where it is sharded."""
    if not is_sharded(weight):
        return weight
    sharded: Any = weight
    gathered: Tensor = sharded.full_tensor()
    return gathered


def local_rows(weight: Tensor, row: int) -> tuple[Tensor, int]:
    """Return the rows of a matrix that this process holds, and where `row` lies among them: outside, if elsewhere.

    Args:
        weight: [rows, columns], plain, or sharded by rows as `fully_shard` does.
        row: index in the whole matrix.
    """
    if not is_sharded(weight):
        return weight, row
    sharded: Any = weight
    first, rows = 0, weight.shape[0]
    for dimension, placement in enumerate(sharded.placements):  # one, or two with copies of the shards
        if placement.is_shard(0):
            share = -(-rows // sharded.device_mesh.size(dimension))  # as torch.chunk
            first = sharded.device_mesh.get_local_rank(dimension) * share
    return sharded.to_local(), row - first


def unwrap(model: nn.Module) -> nn.Module:
    """Take off torch.compile, DDP, FSDP and accelerate's wrappers, and PEFT (trl#923: hooks vanish without this).

    Raises:
        MaskTokenError: `nn.DataParallel`, whose threads would share one counter and so one pattern.
    """
    while True:
        inner: Any
        if isinstance(model, nn.DataParallel):
            raise MaskTokenError(
                "nn.DataParallel gives every GPU the same masked positions; start one process per GPU "
                "(torchrun, accelerate launch), or show this process a single GPU with CUDA_VISIBLE_DEVICES=0"
            )
        if (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        elif callable(get_base_model := getattr(model, "get_base_model", None)):
            model = get_base_model()
        elif not hasattr(model, "get_input_embeddings") and isinstance(
            inner := getattr(model, "module", None), nn.Module
        ):
            model = inner
        else:
            return model


def find_embedding(model: nn.Module) -> nn.Module:
    """Return the module that looks up the input ids.

    Raises:
        MaskTokenError: the model has none, or ids reach the model by a second way that a hook there would miss.
    """
    base = unwrap(model)
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise MaskTokenError(
            f"{name} is an encoder-decoder model, which is not supported: encoder and decoder share one embedding, "
            "so the decoder's input would be masked too; use an encoder-only or a decoder-only backbone"
        )
    if any(part.endswith("embed_tokens_per_layer") for part, _ in base.named_modules()):
        raise MaskTokenError(
            f"{name} looks up the input ids once more for every layer (embed_tokens_per_layer), so a masked token "
            "would still be seen; use a backbone without per-layer embeddings"
        )
    getter = getattr(base, "get_input_embeddings", None)
    if getter is None:
        raise MaskTokenError(
            f"{name} has no get_input_embeddings(); give a transformers model, bare or wrapped by PEFT, "
            "torch.compile, DDP or accelerate"
        )
    embedding: nn.Module = getter()
    return embedding


def embedding_weight(embedding: nn.Module) -> Tensor:
    """Return the embedding matrix itself, [rows, hidden], so that a write reaches it.

    Below PEFT's `TrainableTokensWrapper` the attribute `weight` is a merged copy.
    """
    token_adapter: Any = getattr(embedding, "token_adapter", None)
    holder: Any = embedding if token_adapter is None else token_adapter.base_layer
    weight: Tensor = holder.weight
    return weight


def read_rows(embedding: nn.Module, first: int, last: int) -> Tensor:
    """Return the rows from `first` to before `last` as they are looked up, [rows, hidden]; a view where it can be.

    Where FSDP keeps the matrix in shards, every process has to call this: the rows are gathered.
    """
    quantized: Any = getattr(embedding, "read_rows", None)
    if quantized is not None:
        found: Tensor = quantized(first, last)
        return found
    return whole(embedding_weight(embedding)[first:last])


@torch.no_grad()
def write_row(embedding: nn.Module, index: int, row: Tensor) -> None:
    """Set a row, [hidden], in place; a quantized embedding quantizes it, and of a sharded one its holder writes it."""
    quantized: Any = getattr(embedding, "write_row", None)
    if quantized is not None:
        quantized(index, row)
        return
    weight, index = local_rows(embedding_weight(embedding), index)
    if 0 <= index < weight.shape[0]:
        weight[index] = row.to(weight.device, weight.dtype)


def is_trainable(embedding: nn.Module, token_id: int) -> bool:
    """Say whether training moves row `token_id`: by `trainable_token_indices`, or with the whole matrix."""
    token_adapter: Any = getattr(embedding, "token_adapter", None)
    if token_adapter is not None:
        return any(token_id in rows for rows in token_adapter.token_indices.values())
    return embedding_weight(embedding).requires_grad

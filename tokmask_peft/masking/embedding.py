"""A model's input embedding below all wrappers: find it, read and write its rows, prepare the row of the mask token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.replacement import MaskToken, used_rows


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is spread over processes."""
    return hasattr(weight, "full_tensor")  # only DTensor has it; this avoids importing torch.distributed.tensor


def whole(weight: Tensor) -> Tensor:
    """Return a weight as a plain tensor; if it is sharded, every process has to call this."""
    if not is_sharded(weight):
        return weight
    sharded: Any = weight
    gathered: Tensor = sharded.full_tensor()
    return gathered


def local_rows(weight: Tensor, row: int) -> tuple[Tensor, int]:
    """Return the rows of a matrix that this process holds, and the index of `row` in them (outside if not among them).

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
    """Remove torch.compile, DDP, FSDP, accelerate's wrappers and PEFT (trl#923: hooks are lost without this).

    Raises:
        MaskTokenError: `nn.DataParallel`, whose threads would share one counter and therefore one pattern.
    """
    while True:
        inner: Any
        if isinstance(model, nn.DataParallel):
            raise MaskTokenError(
                "nn.DataParallel gives every GPU the same masked positions; start one process per GPU "
                "(torchrun, accelerate launch), or let this process see a single GPU with CUDA_VISIBLE_DEVICES=0",
                code="data-parallel",
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
        MaskTokenError: the model has none, or looks ids up in a second place, which a hook here would miss.
    """
    base = unwrap(model)
    name = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise MaskTokenError(
            f"{name} is an encoder-decoder model, which is not supported: encoder and decoder share one embedding, "
            "so the decoder's input would be masked too; use an encoder-only or a decoder-only backbone",
            code="encoder-decoder",
        )
    if any(part.endswith("embed_tokens_per_layer") for part, _ in base.named_modules()):
        raise MaskTokenError(
            f"{name} looks up the input ids again in every layer (embed_tokens_per_layer), so a masked token would "
            "still be seen; use a backbone without per-layer embeddings",
            code="per-layer-embeddings",
        )
    getter = getattr(base, "get_input_embeddings", None)
    if getter is None:
        raise MaskTokenError(
            f"{name} has no get_input_embeddings(); give a transformers model, bare or wrapped by PEFT, "
            "torch.compile, DDP or accelerate",
            code="no-embedding",
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
    """Return the rows from `first` up to `last` (excluded) as they are looked up, [rows, hidden]; a view if possible.

    If FSDP keeps the matrix in shards, every process has to call this: the rows are gathered.
    """
    quantized: Any = getattr(embedding, "read_rows", None)
    if quantized is not None:
        found: Tensor = quantized(first, last)
        return found
    return whole(embedding_weight(embedding)[first:last])


@torch.no_grad()
def write_row(embedding: nn.Module, index: int, row: Tensor) -> None:
    """Set a row, [hidden], in place. A quantized embedding quantizes it; the holder of a sharded row writes it."""
    quantized: Any = getattr(embedding, "write_row", None)
    if quantized is not None:
        quantized(index, row)
        return
    weight, index = local_rows(embedding_weight(embedding), index)
    if 0 <= index < weight.shape[0]:
        weight[index] = row.to(weight.device, weight.dtype)


def is_trainable(embedding: nn.Module, token_id: int) -> bool:
    """Return whether training moves row `token_id`: by `trainable_token_indices`, or with the whole matrix."""
    token_adapter: Any = getattr(embedding, "token_adapter", None)
    if token_adapter is not None:
        return any(token_id in rows for rows in token_adapter.token_indices.values())
    return embedding_weight(embedding).requires_grad


def is_in_adapter(embedding: nn.Module, token_id: int) -> bool:
    """Return whether the adapter has its own copy of row `token_id` (`trainable_token_indices`)."""
    return hasattr(embedding, "token_adapter") and is_trainable(embedding, token_id)


@torch.no_grad()
def prepare_mask_row(embedding: nn.Module, mask_token: MaskToken, tokenizer: Any) -> Tensor | None:
    """Set the row of a spare mask token to the mean of the rows that tokens use; other mask tokens have a row already.

    A spare row holds arbitrary values until then. Nothing is written if the adapter has its own copy of the row, so
    call this before PEFT wraps the embedding for `trainable_token_indices`, which copies the row at that moment.

    Args:
        embedding: the input embedding, bare or wrapped by PEFT.
        mask_token: the mask token that was chosen.
        tokenizer: that of the model.

    Returns:
        The row as it was, [hidden], to be restored with `write_row`; None if nothing was written.

    Raises:
        MaskTokenError: the matrix is not available as a whole (sharded by ZeRO-3 or FSDP 1).
    """
    if mask_token.kind != "spare" or is_in_adapter(embedding, mask_token.id):
        return None
    weight = embedding_weight(embedding)
    if weight.dim() != 2 or weight.shape[0] <= mask_token.id:
        raise MaskTokenError(
            f"the embedding matrix has shape {list(weight.shape)} here, so row {mask_token.id} cannot be written: "
            "attach before the model is sharded, or choose mask_token: unk",
            code="mask-row-sharded",
        )
    used = min(used_rows(tokenizer), weight.shape[0])
    original = read_rows(embedding, mask_token.id, mask_token.id + 1)[0].clone()
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for first in range(0, used, 8192):  # in chunks: an fp32 copy of the whole matrix may not fit
        total += read_rows(embedding, first, min(first + 8192, used)).sum(dim=0, dtype=torch.float32)
    write_row(embedding, mask_token.id, total / used)
    return original

"""A model's input embedding below all wrappers: find it, read and write its rows, prepare the row of the mask token."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.replacement import MaskToken, used_rows

SEQUENCE_FIRST = ("xlnet",)
"""Model types that look up their ids as [seq, batch]."""


def is_sequence_first(model: nn.Module) -> bool:
    """Return whether a model transposes its ids before it looks them up."""
    return getattr(getattr(unwrap(model), "config", None), "model_type", None) in SEQUENCE_FIRST


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is spread over processes."""
    return hasattr(weight, "full_tensor")  # only DTensor has it; this avoids importing torch.distributed.tensor


def whole(weight: Any) -> Tensor:
    """Return a weight as a plain tensor; if it is sharded, every process has to call this."""
    found: Tensor = weight.full_tensor() if is_sharded(weight) else weight
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """Remove torch.compile, DDP, FSDP, accelerate's wrappers and PEFT (trl#923: hooks are lost without this).

    Raises:
        MaskTokenError: `nn.DataParallel`, whose threads would share one counter and therefore one pattern.
    """
    module: Any = model
    while True:
        if isinstance(module, nn.DataParallel):
            remedy = "start one process per GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            message = f"nn.DataParallel gives every GPU the same masked positions; {remedy}"
            raise MaskTokenError(message, code="data-parallel")
        inner = getattr(module, "_orig_mod", None)
        if inner is None and hasattr(module, "get_base_model"):
            inner = module.get_base_model()
        if inner is None and not hasattr(module, "get_input_embeddings"):
            inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


_REFUSED = {
    "sentence-transformers": "is a model of sentence-transformers, whose trainers are not supported: some of their "
    "losses compute each text twice. With others, use TokenMasker.attach(model.transformers_model, …) around train()",
    "encoder-decoder": "is an encoder-decoder model: both parts share one embedding, so the decoder would be masked "
    "too; use an encoder-only or a decoder-only backbone",
    "per-layer-embeddings": "looks up the input ids again in every layer (embed_tokens_per_layer), so a masked token "
    "would be seen; use a backbone without per-layer embeddings",
    "no-embedding": "has no table of tokens in which it looks up its input (get_input_embeddings); "
    "use a transformers model that has, bare or wrapped by PEFT, DDP or accelerate",
}


def find_embedding(model: nn.Module) -> nn.Module:
    """Return the module that looks up the input ids.

    Raises:
        MaskTokenError: the model has none, or looks ids up in a second place, which a hook here would miss.
    """
    base: Any = unwrap(model)
    embedding: Any = None
    if hasattr(base, "transformers_model"):
        code = "sentence-transformers"
    elif getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        code = "encoder-decoder"
    elif any(part.endswith("embed_tokens_per_layer") for part, _ in base.named_modules()):
        code = "per-layer-embeddings"
    else:
        code = "no-embedding"
        with contextlib.suppress(AttributeError, NotImplementedError):  # the latter from CANINE, which hashes letters
            embedding = base.get_input_embeddings()
    if not hasattr(embedding, "weight"):
        raise MaskTokenError(f"{type(base).__name__} {_REFUSED[code]}", code=code, model=type(base).__name__)
    found: nn.Module = embedding
    if type(embedding) is nn.Embedding:
        # T5's encoder has a lookup of its own, tied to the one that is returned here (transformers 5)
        lookups = [part for part in base.modules() if type(part) is nn.Embedding or hasattr(part, "token_adapter")]
        tied = (part for part in lookups if part is not embedding and embedding_weight(part) is embedding.weight)
        found = next(tied, embedding)
    return found


def embedding_weight(embedding: nn.Module) -> Tensor:
    """Return the embedding matrix itself, [rows, hidden], so that a write reaches it."""
    wrapped: Any = getattr(embedding, "token_adapter", None)  # PEFT's, whose own weight is a merged copy
    weight: Tensor = embedding.weight if wrapped is None else wrapped.base_layer.weight  # type: ignore[assignment]
    return weight


def read_rows(embedding: nn.Module, first: int, last: int) -> Tensor:
    """Return the rows from `first` to `last` (excluded) as they are looked up, [rows, hidden]; see `whole`."""
    quantized: Any = getattr(embedding, "read_rows", None)
    found: Tensor = whole(embedding_weight(embedding)[first:last]) if quantized is None else quantized(first, last)
    return found


@torch.no_grad()
def write_row(embedding: nn.Module, index: int, row: Tensor) -> None:
    """Set a row, [hidden], in place. A quantized embedding quantizes it; the holder of a sharded row writes it."""
    quantized: Any = getattr(embedding, "write_row", None)
    if quantized is not None:
        quantized(index, row)
        return
    weight: Any = embedding_weight(embedding)
    if is_sharded(weight):  # by rows, as `fully_shard` does
        rows, mesh = weight.shape[0], weight.device_mesh
        for dimension, placement in enumerate(weight.placements):  # one, or two with copies of the shards
            if placement.is_shard(0):
                index -= mesh.get_local_rank(dimension) * -(-rows // mesh.size(dimension))  # shares as of torch.chunk
        weight = weight.to_local()
    if 0 <= index < weight.shape[0]:
        weight[index] = row.to(weight.device, weight.dtype)


def is_trainable(embedding: nn.Module, token_id: int) -> bool:
    """Return whether training moves row `token_id`: by `trainable_token_indices`, or with the whole matrix."""
    wrapped = hasattr(embedding, "token_adapter")
    return is_in_adapter(embedding, token_id) if wrapped else embedding_weight(embedding).requires_grad


def is_in_adapter(embedding: nn.Module, token_id: int) -> bool:
    """Return whether the adapter has its own copy of row `token_id` (`trainable_token_indices`)."""
    adapter: Any = getattr(embedding, "token_adapter", None)
    return adapter is not None and any(token_id in rows for rows in adapter.token_indices.values())


@torch.no_grad()
def prepare_mask_row(embedding: nn.Module, mask_token: MaskToken, tokenizer: Any) -> Tensor | None:
    """Set the row of a spare mask token to the mean of the rows that tokens use; other mask tokens have a row already.

    Nothing is written if the adapter has its own copy of the row, so call this before PEFT wraps the embedding for
    `trainable_token_indices`, which copies the row at that moment. Returns the row as it was, [hidden], to be restored
    with `write_row`, or None if nothing was written.

    Raises:
        MaskTokenError: the matrix is not available as a whole (sharded by ZeRO-3 or FSDP 1).
    """
    if mask_token.kind != "spare" or is_in_adapter(embedding, mask_token.id):
        return None
    weight = embedding_weight(embedding)
    if weight.dim() != 2 or weight.shape[0] <= mask_token.id:
        problem = f"the embedding has shape {list(weight.shape)} here, so row {mask_token.id} cannot be written"
        remedy = "attach before the model is sharded, or choose mask_token: unk"
        raise MaskTokenError(f"{problem}: {remedy}", code="mask-row-sharded")
    used = min(used_rows(tokenizer), weight.shape[0])
    original = read_rows(embedding, mask_token.id, mask_token.id + 1)[0].clone()
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for first in range(0, used, 8192):  # in chunks: an fp32 copy of the whole matrix may not fit
        total += read_rows(embedding, first, min(first + 8192, used)).sum(dim=0, dtype=torch.float32)
    write_row(embedding, mask_token.id, total / used)
    return original

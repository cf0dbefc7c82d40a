"""A model's input embedding below all wrappers: find it, read and write its rows, swap the ids that it looks up."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking import pattern
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.replacement import NO_MASK_TOKEN, REPLACEMENTS, MaskToken, choose_mask_token, used_rows

if TYPE_CHECKING:  # the masker needs no NumPy
    import numpy as np
    from numpy.typing import NDArray

SEQUENCE_FIRST = ("xlnet",)  # model types that look up their ids as [seq, batch]


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

    MaskTokenError for `nn.DataParallel`, whose threads would share one counter and therefore one pattern.
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
    "encoder-decoder": "is an encoder-decoder model whose parts look up their ids in one module, so the decoder would "
    "be masked too; use a backbone such as T5 or BART, whose parts have a lookup each",
    "per-layer-embeddings": "looks up the input ids again in every layer (embed_tokens_per_layer), so a masked token "
    "would be seen; use a backbone without per-layer embeddings",
    "no-embedding": "has no table of tokens in which it looks up its input (get_input_embeddings); "
    "use a transformers model that has, bare or wrapped by PEFT, DDP or accelerate",
}


def find_decoder_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that looks up the decoder's ids in an encoder-decoder model; None for other models."""
    base: Any = unwrap(model)
    if not (getattr(getattr(base, "config", None), "is_encoder_decoder", False) and hasattr(base, "get_decoder")):
        return None
    encoder, decoder = base.get_encoder(), base.get_decoder()
    found: nn.Module = decoder.get_input_embeddings()
    return None if any(part is encoder for part in decoder.modules()) else found  # UMT5's encoder alone says it has one


def rereads(model: nn.Module) -> bool:
    """Return whether an encoder-decoder model lets the decoder read the encoder's text, one place later."""
    return type(unwrap(model)).__name__.endswith("ForSequenceClassification")


def find_embedding(model: nn.Module) -> nn.Module:
    """Return the module that looks up the (encoder's) input ids; MaskTokenError if there is none, or more than one."""
    base: Any = unwrap(model)
    embedding: Any = None
    if hasattr(base, "transformers_model"):
        code = "sentence-transformers"
    elif getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        code = "encoder-decoder"
        if hasattr(base, "get_encoder"):
            embedding = base.get_encoder().get_input_embeddings()
            embedding = None if embedding is find_decoder_embedding(model) else embedding
    elif any(part.endswith("embed_tokens_per_layer") for part, _ in base.named_modules()):
        code = "per-layer-embeddings"
    else:
        code = "no-embedding"
        with contextlib.suppress(AttributeError, NotImplementedError):  # the latter from CANINE, which hashes letters
            embedding = base.get_input_embeddings()
    if not hasattr(embedding, "weight"):
        raise MaskTokenError(f"{type(base).__name__} {_REFUSED[code]}", code=code, model=type(base).__name__)
    found: nn.Module = embedding
    if type(embedding) is nn.Embedding and code == "no-embedding":
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


@dataclass(frozen=True)
class UsedRows:
    """What is typical of the rows that the tokenizer uses; in fp32."""

    mean: Tensor  # [hidden]
    norms: Tensor  # [used]
    distances: Tensor  # of each row from the mean, [used]

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: nn.Module, tokenizer: Any) -> Self:
        """Read the rows, in chunks: an fp32 copy of the whole matrix may not fit."""
        weight = embedding_weight(embedding)
        used, size = min(used_rows(tokenizer), weight.shape[0]), 8192
        chunks = [(first, min(first + size, used)) for first in range(0, used, size)]
        mean = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
        for chunk in chunks:
            mean += read_rows(embedding, *chunk).sum(dim=0, dtype=torch.float32) / used
        norms, distances = [], []
        for chunk in chunks:
            rows = read_rows(embedding, *chunk).float()
            norms.append(rows.norm(dim=1))
            distances.append((rows - mean).norm(dim=1))
        return cls(mean, torch.cat(norms), torch.cat(distances))

    def why_untrained(self, token_id: int) -> str | None:
        """Return why a row was probably never trained, or None.

        Training moves rows away from where they began, near 0. A row counts as untrained if less than 1% of the used
        rows have a smaller norm, and less than 1% are nearer to the mean row. Such a row is not a neutral input:
        MiniLM's [MASK], of the smallest norm of all 30,522, moves the encoder's output more than a random word does.
        """
        smaller, nearer = ((of < of[token_id]).float().mean().item() for of in (self.norms, self.distances))
        if smaller >= 0.01 or nearer >= 0.01:
            return None
        norm, usual = self.norms[token_id].item(), self.norms.median().item()
        return f"its embedding row was never trained (norm {norm:.3f}; the median of all rows is {usual:.3f})"

    def typical(self) -> Tensor:
        """Return a row in the direction of the mean with the median norm, [hidden]."""
        return self.mean * (self.norms.median() / self.mean.norm().clamp(min=torch.finfo(torch.float32).tiny))


def find_mask_token(embedding: nn.Module, tokenizer: Any, wanted: Any = "auto", *, trained: bool = False) -> MaskToken:
    """Choose the mask token as `choose_mask_token` does; `auto` skips untrained rows unless they will be `trained`."""
    weight = embedding_weight(embedding)
    whole_here = weight.dim() == 2 and weight.shape[0] >= used_rows(tokenizer)  # not in ZeRO-3 and FSDP 1

    def why_untrained(token_id: int) -> str | None:
        return UsedRows.of(embedding, tokenizer).why_untrained(token_id) if whole_here and not trained else None

    return choose_mask_token(tokenizer, weight.shape[0], wanted, why_untrained)


def mask_token_for(embedding: nn.Module, tokenizer: Any, config: TokenMaskConfig) -> MaskToken:
    """Choose a config's mask token; if there is none, `NO_MASK_TOKEN`, or MaskTokenError if its masking needs one."""
    try:
        return find_mask_token(embedding, tokenizer, config.mask_token, trained=config.trainable_mask)
    except MaskTokenError as error:
        needed = REPLACEMENTS[config.replace].needs_mask_token or config.trainable_mask
        if error.code != "no-mask-token" or needed:
            raise
        return NO_MASK_TOKEN


@torch.no_grad()
def prepare_mask_row(
    embedding: nn.Module, mask_token: MaskToken, tokenizer: Any, *, trained: bool = False
) -> Tensor | None:
    """Give the row of the mask token the mean direction and the median norm of the used rows, if it needs it.

    A spare row does, and so does one that is going to be trained but starts untrained (`UsedRows.why_untrained`).
    Nothing is written if the adapter has its own copy of the row, so call this before PEFT makes it
    (`trainable_token_indices`). Returns the row as it was, [hidden], to be restored with `write_row`, or None if
    nothing was written. MaskTokenError if ZeRO-3 or FSDP 1 has sharded the matrix.
    """
    if not (mask_token.kind == "spare" or trained) or is_in_adapter(embedding, mask_token.id):
        return None
    weight = embedding_weight(embedding)
    if weight.dim() != 2 or weight.shape[0] <= mask_token.id:
        problem = f"the embedding has shape {list(weight.shape)} here, so row {mask_token.id} cannot be written"
        remedy = "attach before the model is sharded, or choose mask_token: unk"
        raise MaskTokenError(f"{problem}: {remedy}", code="mask-row-sharded")
    used = UsedRows.of(embedding, tokenizer)
    if mask_token.kind != "spare" and used.why_untrained(mask_token.id) is None:
        return None
    original = read_rows(embedding, mask_token.id, mask_token.id + 1)[0].clone()
    write_row(embedding, mask_token.id, used.typical())
    return original


class Occlusion:
    """Hides sub-tokens of a model's input outside training, for explanations, at positions of the caller's choice.

    A spare row is set to a typical one, as in training, and keeps it: no token uses the row. `config` is how the model,
    with or without PEFT, was masked in training; None if that is not known. MaskTokenError if there is no usable mask
    token, or the model cannot be masked.

    Attributes:
        mask_token: what hidden sub-tokens become, with the reason.
        trained: whether the model saw the mask token in training; None if that is not known.
        maskable: for every id whether it may be hidden, bool [rows]. Special and protected tokens may not, as in
            training; the unknown token may, unlike in training, because a word that became one is still a word.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: TokenMaskConfig | None = None) -> None:
        self.trained = None if config is None else not config.is_off and config.replace == "token"
        config = config or TokenMaskConfig()
        self._replace = "token" if config.is_off else config.replace
        self._embedding, self._transposed = find_embedding(model), is_sequence_first(model)
        self._decoder = find_decoder_embedding(model) if rereads(model) else None
        rows = embedding_weight(self._embedding).shape[0]
        self.mask_token = find_mask_token(self._embedding, tokenizer, config.mask_token)
        name = tokenizer.convert_ids_to_tokens(self.mask_token.id)
        self._token = f"{name or 'an embedding row that no token uses'} (id {self.mask_token.id})"
        if not config.trainable_mask:
            prepare_mask_row(self._embedding, self.mask_token, tokenizer)
        protected = {*config.protect, tokenizer.pad_token_id}
        table = pattern.maskable_table(tokenizer, rows, protected)
        if (unknown := tokenizer.unk_token_id) is not None:
            table[unknown] = unknown not in {*protected, self.mask_token.id}
        self.maskable: NDArray[np.bool_] = table.numpy()

    @property
    def note(self) -> str:
        """What a reader of the explanations must know about the mask token, in a sentence or two."""
        if self.trained:
            return f"words are masked as in training, by {self._token}"
        how = "was trained without masking (p = 0): it has never seen a masked word, so its"
        if self.trained is None:
            how = "does not record how it was masked in training; if it was not masked, its"
        elif self._replace != "token":
            how = f"was trained with masking.replace: {self._replace}, and may never have seen the mask token, so its"
        token = f"{self._token}: {self.mask_token.reason}"
        return f"the model {how} influences are less reliable. Words are masked by {token}"

    @contextlib.contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Hide `positions`, bool of the shape of the ids, in the forwards that this thread makes inside."""
        thread = threading.get_ident()

        def hiding(positions: Tensor, transposed: bool) -> Callable[..., Any]:
            def hide(given: Tensor) -> Tensor:
                # a packed row may be lengthened, and the decoder reads all but the last token
                fitted = F.pad(positions, (0, given.shape[1] - positions.shape[1]))
                return given.masked_fill(fitted.to(given.device), self.mask_token.id)

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                same_thread = threading.get_ident() == thread  # a server may predict in one and explain in another
                return swap(args, kwargs, hide, transposed) if same_thread else None

            return hook

        with contextlib.ExitStack() as hooks:
            hook = hiding(positions, self._transposed)
            hooks.callback(self._embedding.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if self._decoder is not None:  # it reads the text again, one place later
                hook = hiding(F.pad(positions, (1, 0)), False)
                hooks.callback(self._decoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def swap(args: tuple[Any, ...], kwargs: dict[str, Any], swapped: Callable[[Tensor], Tensor], transposed: bool) -> Any:
    """Return the arguments of an embedding with other ids, its first argument, which may have a name."""
    name = None if args else next(iter(kwargs))
    given = args[0] if name is None else kwargs[name]
    ids = swapped(given.t()).t() if transposed else swapped(given)
    return ((ids, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: ids})

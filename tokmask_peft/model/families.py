"""What the padding-free forward needs to know about an architecture: one entry per family of backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokmask_peft.model.packed import Packing

NAME = "tokmask_packed"  # of the attention function, in the models' configs


@dataclass(frozen=True, slots=True)
class Family:
    """What the packed forward needs to know about an architecture.

    Attributes:
        head: for an answer per text: from the model and the pooled states, [texts, 1, hidden], to [texts, classes].
        token_head: for an answer per sub-token: from the model and all states, [1, total, …], to [1, total, classes].
        causal: whether a text is pooled at its last sub-token, and not at its first.
        positions: from the model, the ids and their layout to position ids, [1, total].
        package: of the classes; the same name in another package is another architecture.
    """

    head: Callable[[Any, Tensor], Tensor]
    token_head: Callable[[Any, Tensor], Tensor] = lambda model, states: model.classifier(model.dropout(states))
    causal: bool = False
    positions: Callable[[Any, Tensor, Packing], Tensor] = lambda model, input_ids, packing: packing.positions
    package: str = "transformers.models."


def _positions_after_padding(model: Any, input_ids: Tensor, packing: Packing) -> Tensor:
    """Count as RoBERTa does: from the padding token's id on, skipping padding tokens inside a text."""
    real = (input_ids != (pad_id := model.config.pad_token_id)).long()
    counted = real.cumsum(dim=1)
    before = (counted - real)[0, packing.cu_seqlens[:-1].long()][packing.rows]
    return (counted - before) * real + pad_id


def _modern_head(model: Any, states: Tensor) -> Any:
    return model.classifier(model.drop(model.head(states)))


FAMILIES: dict[str, Family] = {
    "Bert": Family(lambda model, first: model.classifier(model.dropout(model.base_model.pooler(first)))),
    "DistilBert": Family(
        lambda model, first: model.classifier(model.dropout(F.relu(model.pre_classifier(first[:, 0]))))
    ),
    "Electra": Family(lambda model, first: model.classifier(first)),
    "ModernBert": Family(lambda model, first: _modern_head(model, first[:, 0]), _modern_head),
}
"""By the part of a class name before `ForSequenceClassification` or `ForTokenClassification`. Others may be added."""
_ROBERTA = Family(lambda model, first: model.classifier(first), positions=_positions_after_padding)
FAMILIES |= dict.fromkeys(("Roberta", "XLMRoberta"), _ROBERTA)
_DECODER = Family(
    lambda model, last: model.score(last[:, 0]), lambda model, states: model.score(model.dropout(states)), causal=True
)
_DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "Phi3", "Olmo", "Olmo2", "SmolLM3")
FAMILIES |= dict.fromkeys(_DECODERS, _DECODER)
FAMILIES["GPT2"] = Family(_DECODER.head, causal=True)
_DISTANCES = "its attention adds terms for the distance of two sub-tokens, which kernels for packed rows do not take"
NOT_PACKED = dict.fromkeys(("Deberta", "DebertaV2", "T5", "MT5", "UMT5", "MPNet"), _DISTANCES)
NOT_PACKED |= dict.fromkeys(("Bart", "MBart"), "its decoder reads the text a second time")
NOT_PACKED |= {
    "Gemma2": "it caps the scores of attention, which kernels for packed rows do not",
    "Gemma3": "it reads pictures, too; the sizes for text alone (270M and 1B) have one",
}
"""Why families that users ask for have none."""


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a classification model whose texts can be packed, or None."""
    name, _, head = type(model).__name__.partition("For")
    family = FAMILIES.get(name)
    known = family is not None and type(model).__module__.startswith(family.package)
    return family if known and head in ("SequenceClassification", "TokenClassification") else None


def padding_free_problem(model: nn.Module) -> str | None:
    """Return why a classification model, without an adapter, cannot take packed rows, or None if it can."""
    family, name = family_of(model), type(model).__name__
    if family is None:
        reason = NOT_PACKED.get(name.partition("For")[0], f"{', '.join(FAMILIES)} have")
        return f"{name} has no padding-free forward: {reason}"
    if not family.causal and getattr(model.config, "is_decoder", False):
        return f"{name} is set up as a decoder"
    attention = getattr(model.config, "_attn_implementation", None)
    return None if attention in ("sdpa", NAME) else f"its attention is {attention}, not sdpa"

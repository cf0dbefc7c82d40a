"""Tiny random models of real architectures, and tokenizers of the three kinds that real ones have.

model, tokenizer = build("qwen2", task="token", labels=3)
batch = encode(tokenizer, TEXTS)
with seen_ids(model) as seen:   # what the embedding looks up, after a masker attached before
    model(**batch)
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Threads cost tiny matrices a hundred times what they give, above all where other processes share the cores.
torch.set_num_threads(1)

TEXTS = [
    "mañana tengo un meeting con mi boss",
    "i love this canción so much",
    "no puedo believe it's already friday",
    "qué cool that you came",
    "ok",
    "la neta this weather is too hot for me today y mañana también",
    "she said que no quería to go #fiesta 2025",
    "vamos a la beach con @anita",
]
_CORPUS = [*TEXTS, *(word for text in TEXTS for word in text.split())]

# Fixed, as trained once on TEXTS: what these trainers make of ties differs from one process to the next.
_WORDPIECES = """
# ' 0 2 5 @ a b c d e f g h i k l m n o p q r s t u v w y é í ñ ó ##o ##u ##h ##i ##s ##e ##r ##í ##a ##c ##t ##n ##ó
##d ##m ##g ##v ##é ##l ##y ##ñ ##b ##0 ##2 ##5 ##k co qu to th ##ea ##an ##am ##ta la me ma no ##os ##he ##is ##ie ##id
##ay ##ch ##ng ##ve ##ñan con que this mañan mañana 20 an al be bea bos can cam fo fr fie go ho is it lo mu mi ne ok pu
so sa she te tam un vam wea yo ##ol ##ió ##ié ##ita ##ing ##sta ##et ##ed ##rí ##rea ##at ##ció ##the ##dy ##day ##lie
##bié ##25 cool qué too today that meet ##iday ##ngo querí 2025 anita
"""
_UNIGRAMS = """
▁ a o i n s e r ▁m l y h c d u v ▁co ▁th ▁to an ▁l t ▁s 2 é ñ ng ▁be id ▁f am ta ▁t ▁n ▁que ▁me ▁ca ie ▁y ea et os ▁i
▁qu f it b g me 0 5 # í @ p ' k ó w er th ▁b he ue at ▁a m q
"""


@dataclass(frozen=True)
class Family:
    """How to build one architecture: transformers' name, kind of tokenizer, and what its config calls things."""

    prefix: str
    tokenizer: str
    spare_rows: int = 0
    causal: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_CAUSAL = {**_SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64}
_HEAD_DIM = {**_CAUSAL, "head_dim": 8}
_ENCODER = {**_SHAPE, "max_position_embeddings": 64}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
_T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 1}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
_PARTS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_BART = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _PARTS.items()}
_BART |= {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 2}

FAMILIES = {
    "bert": Family("Bert", "wordpiece", settings=_ENCODER),
    "xlm-r": Family("XLMRoberta", "unigram", settings=_ENCODER),
    "distilbert": Family("DistilBert", "wordpiece", settings=_DISTIL),
    "modernbert": Family("ModernBert", "bytelevel-mask", settings=_ENCODER),
    "qwen2": Family("Qwen2", "bytelevel", spare_rows=16, causal=True, settings=_CAUSAL),
    "qwen3": Family("Qwen3", "bytelevel", spare_rows=16, causal=True, settings=_HEAD_DIM),
    "llama": Family("Llama", "metaspace", causal=True, settings=_CAUSAL),
    "gemma3": Family("Gemma3Text", "metaspace", causal=True, settings=_HEAD_DIM),
    "mistral": Family("Mistral", "metaspace", causal=True, settings=_HEAD_DIM),
}
encoder_decoders = {
    "t5": Family("T5", "unigram", settings=_T5),
    "mt5": Family("MT5", "unigram", settings=_T5),
    "bart": Family("Bart", "unigram", settings=_BART),
}
more_families = {  # for tests of what differs between architectures; those of all `families` have enough without
    "electra": Family("Electra", "wordpiece", settings={**_ENCODER, "embedding_size": 16}),
    "roberta": Family("Roberta", "unigram", settings=_ENCODER),
    "phi3": Family("Phi3", "metaspace", causal=True, settings=_CAUSAL),
    "olmo": Family("Olmo", "metaspace", causal=True, settings=_CAUSAL),
    "olmo2": Family("Olmo2", "metaspace", causal=True, settings=_CAUSAL),
    "smollm3": Family("SmolLM3", "metaspace", causal=True, settings={**_CAUSAL, "no_rope_layers": [1, 0]}),
    "gpt2": Family("GPT2", "bytelevel", spare_rows=16, causal=True, settings=_GPT2),
    "deberta-v3": Family("DebertaV2", "unigram", settings={**_ENCODER, **_DISENTANGLED}),
}
families = list(FAMILIES)
token_families = [name for name in families if name != "gemma3"]  # transformers has no token head for Gemma 3 text
causal_families = [name for name, family in FAMILIES.items() if family.causal]


def build(
    family: str, task: str = "sequence", labels: int = 3, seed: int = 0, dropout: float = 0.0, **settings: Any
) -> tuple[Any, Any]:
    """Return a model with random weights, in eval mode as `from_pretrained` leaves it, and its tokenizer."""
    kind = (FAMILIES | more_families | encoder_decoders)[family]
    tokenizer = tiny_tokenizer(kind.tokenizer)
    heads = {"sequence": "SequenceClassification", "token": "TokenClassification"}
    head = {**heads, "text": "ConditionalGeneration"}[task]
    config_class = getattr(transformers, f"{kind.prefix}Config")
    config = config_class(
        **{
            **kind.settings,
            "vocab_size": len(tokenizer) + kind.spare_rows,
            "num_labels": labels,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            **settings,
        }
    )
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "dropout_rate")
    for name in (*names, "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    config.classifier_dropout = dropout  # where a config lacks it, some heads fall back to 0.1
    config.seq_classif_dropout = dropout
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind.prefix}For{head}")(config)
        for weight in model.parameters():  # the usual initialisation hardly tells one token from another
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
    return model.eval(), tokenizer


def encode(tokenizer: Any, texts: list[str] | None = None, **settings: Any) -> dict[str, torch.Tensor]:
    """Return a padded batch of `input_ids` and `attention_mask`."""
    batch = tokenizer(TEXTS if texts is None else texts, padding=True, return_tensors="pt", **settings)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@contextlib.contextmanager
def seen_ids(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the ids that the embedding is called with, as left by the hooks registered before this one."""
    seen: list[torch.Tensor] = []
    embedding = getattr(model, "module", model).get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


@functools.cache
def _made(kind: str) -> tuple[str, dict[str, str]]:
    """Return the tokenizer as JSON, and its special tokens."""
    trainer: Any = None
    if kind == "wordpiece":
        specials = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        pieces = [*specials.values(), *_WORDPIECES.split()]
        backend = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    elif kind == "unigram":
        specials = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
        scored = [(piece, -2.3 - 0.05 * rank) for rank, piece in enumerate(_UNIGRAMS.split())]
        backend = Tokenizer(models.Unigram([*((token, 0.0) for token in specials.values()), *scored], unk_id=3))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    elif kind in ("bytelevel", "bytelevel-mask"):
        specials = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
        if kind == "bytelevel-mask":
            specials = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        # As in Qwen2.5, id 0 is an ordinary token, so the special ones are added after training.
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[], initial_alphabet=alphabet)
    else:
        specials = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "</s>"}
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"])
    if trainer is not None:
        trainer.show_progress = False
        backend.train_from_iterator(_CORPUS, trainer)
    if kind == "metaspace":  # like TinyLlama's: the mark is in the normalizer, and nothing splits the text
        backend.pre_tokenizer = None
    backend.add_special_tokens(list(specials.values()))
    first, last = specials.get("cls", specials.get("bos")), specials.get("sep")
    if kind == "unigram":
        last = specials["eos"]
    if first is not None:
        template = f"{first} $A {last}" if last else f"{first} $A"
        between = f"{last}:0 {last}:0 $B:1 {last}:1" if kind == "unigram" else f"{last}:0 $B:1 {last}:1"
        pair = f"{first}:0 $A:0 {between}" if last else f"{first}:0 $A:0 {first}:1 $B:1"
        used = [(token, backend.token_to_id(token)) for token in (first, last) if token]
        backend.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=used)
    return backend.to_str(), {f"{role}_token": token for role, token in specials.items()}


def tiny_tokenizer(kind: str) -> Any:
    """Return a tokenizer for TEXTS.

    `wordpiece` is like mBERT's, `unigram` like XLM-R's (both with a mask token), `bytelevel` like Qwen's (neither mask
    nor unknown token, and id 0 is a letter), `metaspace` like TinyLlama's (the unknown token has id 0).
    """
    backend, specials = _made(kind)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), padding_side="right", **specials)


def real_tokenizer(name: str) -> Any:
    """Return a real tokenizer from the folder in TOKMASK_TOKENIZERS, or skip the test."""
    folder = os.environ.get("TOKMASK_TOKENIZERS")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"TOKMASK_TOKENIZERS names no folder with {name}")
    return AutoTokenizer.from_pretrained(Path(folder) / name)


def assert_typical(row: torch.Tensor, used: torch.Tensor) -> None:
    """Assert that an embedding row has the mean direction and the median norm of the rows in use."""
    mean = used.mean(dim=0)
    torch.testing.assert_close(row, mean * used.norm(dim=1).median() / mean.norm())

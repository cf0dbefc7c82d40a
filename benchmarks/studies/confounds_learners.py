"""The models of the study of confounds: MiniLM masked by the package, and a small causal model masked as theirs is.

Hugging Face's causal sequence classifiers pool at the right-most id that is not padding. A masked padding id is not
padding any more, so it moves that position off the text, while the attention mask still shows the text alone.
"""

from __future__ import annotations

import bisect
import functools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from confounds_protocol import SETTINGS, RunSpec, whole_corpus
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification
from transformers import get_linear_schedule_with_warmup as linear_schedule

from tokmask_peft.artifacts import write_json
from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import read_rows, write_row
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.pattern import masked_positions
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import Recipe

UNUSED = "[unused993]"
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
EPOCHS, BATCH, LEARNING_RATE = 4, 32, 2e-3
SPARE_ROWS = 1


class EncoderLearner:
    """MiniLM under a protocol: packed rows, bf16 autocast if wanted, weights and optimizer in fp32."""

    def __init__(self, run: RunSpec, task: Any, labels: tuple[str, ...], bf16: bool) -> None:
        config = Recipe.load("trec/minilm").model.model_copy(update={"precision": "fp32"})
        torch.manual_seed(run.seed)
        backbone = load_backbone(config, task, labels, torch.device("cpu"))
        self.model, self.tokenizer, self._bf16 = backbone.model, backbone.tokenizer, bf16
        self.model.requires_grad_(True)
        enable_padding_free(self.model)
        self._collate = PackedCollator(task)
        ids = {"mask": self.tokenizer.mask_token_id, "id0": 0, "unk": self.tokenizer.unk_token_id}
        row = ids.get(run.protocol.masked_by, self.tokenizer.convert_tokens_to_ids(UNUSED))
        kind = {"mask": "mask", "id0": "id", "unk": "unk"}.get(run.protocol.masked_by, "spare")
        token = MaskToken(row, kind, "what the arm names; the package would refuse id 0, BERT's padding")
        options: dict[str, Any] = {"mask_token": token, "seed": run.seed}
        self._masker = TokenMasker.attach(self.model, self.tokenizer, TokenMaskConfig(p=run.p), **options)
        self._embedding, self._row = self.model.get_input_embeddings(), row
        fixed = run.protocol.masked_by == "spare"
        self._fixed = read_rows(self._embedding, row, row + 1)[0].detach().clone() if fixed else None
        torch.manual_seed(run.seed)  # one dropout stream for all arms, whatever loading drew

    def outputs(self, rows: Sequence[dict[str, Any]], training: bool) -> tuple[Any, Tensor]:
        """Run a packed batch; the masker masks in training alone."""
        batch = self._collate(rows)
        labels: Tensor = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            return self.model(**batch), labels

    def after_step(self) -> None:
        """Put back a row that must not change: weight decay and the optimizer move it."""
        if self._fixed is not None:
            write_row(self._embedding, self._row, self._fixed)

    def seen(self) -> dict[str, float]:
        """Return the share of sub-tokens that was masked."""
        return {"masked_share": self._masker.observed_rate}


@dataclass(frozen=True, slots=True)
class CutVocabulary:
    """The rows of Qwen2.5's vocabulary that the texts use, and id 0 and padding, in their order.

    Attributes:
        ids: for each row its id in the real vocabulary; the first is 0.
        pad_id: row of the padding token.
    """

    ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], pad_id: int) -> CutVocabulary:
        """Keep the ids that occur, id 0 and `pad_id`."""
        ids = tuple(sorted({0, pad_id}.union(*rows)))
        return cls(ids, ids.index(pad_id))

    @property
    def spare_id(self) -> int:
        """The last row, which no token uses."""
        return len(self.ids) + SPARE_ROWS - 1

    def cut(self, row: Sequence[int]) -> list[int]:
        """Translate real ids to rows."""
        return [bisect.bisect_left(self.ids, real) for real in row]

    def config(self, **settings: Any) -> Qwen2Config:
        """Return the model's config."""
        shape = {**SHAPE, "intermediate_size": 3 * SHAPE["hidden_size"], "max_position_embeddings": 128, **settings}
        size = len(self.ids) + SPARE_ROWS
        return Qwen2Config(vocab_size=size, pad_token_id=self.pad_id, tie_word_embeddings=True, **shape)


def padded(rows: Sequence[dict[str, Any]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, [batch, length], padded on the right; default: to the longest."""
    length = length or max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        count = len(row["input_ids"])
        ids[number, :count] = torch.tensor(row["input_ids"])
        mask[number, :count] = 1
    return ids, mask


def pooled_position(input_ids: Tensor, pad_id: int) -> Tensor:
    """Return the column that transformers pools at, [batch]: the right-most id that is not padding."""
    return (torch.arange(input_ids.shape[1]) * (input_ids != pad_id)).argmax(-1)


class CausalLearner:
    """A Qwen2 classifier on the study's own language model, padded to a fixed length as the authors' texts are."""

    def __init__(self, run: RunSpec, pretrained: dict[str, Tensor], vocabulary: CutVocabulary, classes: int) -> None:
        torch.manual_seed(run.seed)
        self.model: Any = Qwen2ForSequenceClassification(vocabulary.config(num_labels=classes))
        self.model.load_state_dict(pretrained, strict=False)
        self._run, self._pad, self._mask_id = run, vocabulary.pad_id, 0
        if run.protocol.masked_by == "trained":
            self._mask_id = vocabulary.spare_id
            embedding = self.model.get_input_embeddings()
            write_row(embedding, self._mask_id, embedding.weight[: vocabulary.spare_id].detach().mean(0))
        self._step = self._moved = self._rows = self._masked = self._real = 0
        torch.manual_seed(run.seed)

    def mask(self, input_ids: Tensor) -> Tensor:
        """Return ids with each position masked with probability p, including padding if the protocol says so."""
        real = input_ids != self._pad
        maskable = torch.ones_like(real) if self._run.protocol.pads_masked else real
        chosen = masked_positions(input_ids, self._run.p, self._run.seed, self._step, 0, maskable)
        masked = input_ids.masked_fill(chosen, self._mask_id)
        self._step += 1
        self._rows += len(input_ids)
        self._moved += int((pooled_position(masked, self._pad) != pooled_position(input_ids, self._pad)).sum())
        self._masked += int((chosen & real).sum())
        self._real += int(real.sum())
        return masked

    def outputs(self, rows: Sequence[dict[str, Any]], training: bool) -> tuple[Any, Tensor]:
        """Run a padded batch; in training the masked ids are what the model gets, and pools by."""
        ids, attention = padded(rows, self._pad, self._run.protocol.max_length if training else None)
        labels = torch.tensor([row["labels"] for row in rows])
        given = self.mask(ids) if training else ids
        return self.model(input_ids=given, attention_mask=attention, use_cache=False), labels

    def after_step(self) -> None:
        """Do nothing: every row is trained."""

    def seen(self) -> dict[str, float]:
        """Return the share of text that was masked, and of rows whose pooled position moved."""
        return {"masked_share": self._masked / max(self._real, 1), "moved_share": self._moved / max(self._rows, 1)}


def pretrain(texts: Sequence[str], tokenizer: Any, vocabulary: CutVocabulary) -> tuple[dict[str, Tensor], Any]:
    """Train the language model, seed 0; return its weights without the head, and a record of the training."""
    rows = [{"input_ids": vocabulary.cut(row)} for row in tokenizer(list(texts))["input_ids"] if len(row) > 1]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(vocabulary.config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = linear_schedule(optimizer, steps // 10, steps)
    start, losses = time.process_time(), []
    for _ in range(EPOCHS):
        total = words = 0.0
        order = torch.randperm(len(rows)).tolist()
        for first in range(0, len(order), BATCH):
            ids, mask = padded([rows[index] for index in order[first : first + BATCH]], vocabulary.pad_id)
            states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            real = mask[:, 1:].bool()  # logits for padding would cost most of the step
            loss = F.cross_entropy(model.lm_head(states[real]), ids[:, 1:][real])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            count = int(real.sum())
            total, words = total + loss.item() * count, words + count
        losses.append(total / words)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.")}
    seconds = time.process_time() - start
    record = {"texts": len(rows), "rows": vocabulary.spare_id + 1, "loss_by_epoch": losses, "seconds": seconds}
    return weights, {**record, "shape": SHAPE, "epochs": EPOCHS, "learning_rate": LEARNING_RATE}


@functools.lru_cache(maxsize=1)
def language_model(folder: Path) -> tuple[Any, CutVocabulary, dict[str, Tensor]]:
    """Return Qwen2.5's tokenizer, the rows of it that are used, and the weights, trained if `folder` has none.

    Raises:
        SystemExit: TOKMASK_TOKENIZERS names no folder with Qwen2.5-0.5B.
    """
    source = Path(os.environ.get("TOKMASK_TOKENIZERS", "")) / "Qwen2.5-0.5B"
    if not source.is_dir():
        raise SystemExit("set TOKMASK_TOKENIZERS to a folder that contains Qwen2.5-0.5B/ (tokenizer files alone)")
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    corpus = whole_corpus(SETTINGS["causal"], 0)
    unlabelled = [example.string for example in (*corpus.train, *corpus.validation)]
    ids = tokenizer([*unlabelled, *(example.string for example in corpus.test)])["input_ids"]
    vocabulary = CutVocabulary.of(ids, tokenizer.pad_token_id)
    weights = folder / "language_model.pt"
    if not weights.is_file():
        found, record = pretrain(unlabelled, tokenizer, vocabulary)
        torch.save(found, weights)
        record |= {"id_0": tokenizer.convert_ids_to_tokens(0), "texts_with_id_0": sum(0 in row for row in ids)}
        write_json(folder / "language_model.json", record)
    return tokenizer, vocabulary, torch.load(weights, weights_only=True)

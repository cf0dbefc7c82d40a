"""The language model that stands for a causal backbone where none can be had: small, trained by the study itself."""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, get_linear_schedule_with_warmup

from tokmask_peft.tasks import Example

SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
EPOCHS, BATCH, LEARNING_RATE = 4, 32, 2e-3
SPARE_ROWS = 1


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
        size = len(self.ids) + SPARE_ROWS
        shape = {**SHAPE, "intermediate_size": 3 * SHAPE["hidden_size"], "max_position_embeddings": 128}
        return Qwen2Config(vocab_size=size, pad_token_id=self.pad_id, tie_word_embeddings=True, **shape, **settings)


def qwen_tokenizer() -> Any:
    """Load Qwen2.5's tokenizer from the folder that TOKMASK_TOKENIZERS names.

    Raises:
        SystemExit: it names none.
    """
    folder = Path(os.environ.get("TOKMASK_TOKENIZERS", "")) / "Qwen2.5-0.5B"
    if not folder.is_dir():
        raise SystemExit("set TOKMASK_TOKENIZERS to a folder that holds Qwen2.5-0.5B/ (tokenizer files alone)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    return tokenizer


def pretrain(examples: Sequence[Example], tokenizer: Any, vocabulary: CutVocabulary) -> tuple[dict[str, Tensor], Any]:
    """Train the language model on the texts, seed 0.

    Returns:
        The weights without the head that predicts words, and a record of the training.
    """
    from confounds_causal import padded

    texts = [{"input_ids": vocabulary.cut(row)} for row in tokenizer([e.string for e in examples])["input_ids"]]
    texts = [text for text in texts if len(text["input_ids"]) > 1]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(vocabulary.config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    steps = EPOCHS * -(-len(texts) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    start, losses = time.process_time(), []
    for _ in range(EPOCHS):
        total = words = 0.0
        order = torch.randperm(len(texts)).tolist()
        for first in range(0, len(order), BATCH):
            ids, mask = padded([texts[index] for index in order[first : first + BATCH]], vocabulary.pad_id)
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
    record = {"texts": len(texts), "rows": vocabulary.spare_id + 1, "loss_by_epoch": losses, "seconds": seconds}
    return weights, {**record, "shape": SHAPE, "epochs": EPOCHS, "learning_rate": LEARNING_RATE}

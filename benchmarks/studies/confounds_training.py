"""One run of the study of confounds: full fine-tuning by the authors' protocol, with switches for what it confounds.

The authors' code: github.com/Sean652039/Token-Masking at fad3fc1 (arXiv 2505.11746).
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification
from transformers import get_linear_schedule_with_warmup as linear_schedule

from tokmask_peft.artifacts import write_json
from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.data.corpus import Corpus, count_labels, load_corpus
from tokmask_peft.data.encoding import Encoder
from tokmask_peft.data.split import subset
from tokmask_peft.examples import IGNORED, NO_PREDICTION, Example
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import read_rows, write_row
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.pattern import masked_positions
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.training.losses import ClassificationLoss, class_weights
from tokmask_peft.training.metrics import scores

RECIPES = {"trec": "trec/minilm", "lid": "lid_spaeng/minilm"}
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
EPOCHS, BATCH, LEARNING_RATE = 4, 32, 2e-3
"""Of the study's language model."""
WEIGHT_DECAY, GAMMA, EVALUATED_AT_ONCE = 0.01, 1.0, 64


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a run trains; the defaults are the authors'."""

    dropout_kept: bool = False  # after the first epoch; theirs calls `model.train()` only once
    warm_up: float = 10.0  # of the learning rate, in lengths of the run; theirs is `steps // 0.1`
    peak: float = 1.0  # rate at the end of the warm-up as a share of the nominal one
    masked_by: str = "mask"  # mask, id0, unk, or a row that no text uses, set to the mean embedding: spare or trained
    pads_masked: bool = False  # in the ids that the model itself sees and pools by (causal models)
    hashtags_kept: bool = True  # words that contain a "#"
    max_length: int = 40  # sub-tokens per text, special tokens included


@dataclass(frozen=True, slots=True)
class Setting:
    """What the runs of a group share. Training and validation texts are drawn by seed; `test` is the same for all."""

    backbone: Literal["minilm", "qwen2"]  # `qwen2` is pretrained by the study
    corpus: Literal["trec", "lid"]
    train: int
    validation: int
    test: int | None  # None takes all texts
    epochs: int  # the length of the learning rate's schedule and the most epochs
    learning_rate: float
    batch_size: int = 32
    patience: int = 2  # epochs in which the loss has not fallen by `min_delta`
    min_delta: float = 0.001


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run: enough to train it, and its name."""

    group: str
    arm: str
    p: float
    seed: int
    protocol: Protocol
    setting: Setting = field(repr=False)

    @property
    def name(self) -> str:
        """The name of its record."""
        return f"{self.group}-{self.arm}-p{self.p:g}-s{self.seed}"


SETTINGS = {
    "encoder": Setting("minilm", "trec", 256, 100, 300, epochs=4, learning_rate=2.5e-3, batch_size=16),
    "words": Setting("minilm", "lid", 200, 80, 200, epochs=4, learning_rate=2.5e-3, batch_size=16),
    "causal": Setting("qwen2", "trec", 1000, 200, None, epochs=6, learning_rate=1e-2),
}


def stop_epoch(losses: Sequence[float], setting: Setting) -> int | None:
    """Return after how many epochs early stopping ends the run, given the loss after each; None if it does not."""
    best, since = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, since = (loss, 0) if loss < best - setting.min_delta else (best, since + 1)
        if since >= setting.patience:
            return number
    return None


@functools.lru_cache(maxsize=4)
def read_corpus(setting: Setting, seed: int, whole: bool = False) -> Corpus:
    """Read a corpus with the texts of a setting, or the whole of it."""
    corpus = load_corpus(Recipe.load(RECIPES[setting.corpus]).data.expanded(), seed)
    if whole:
        return corpus
    test = corpus.test if setting.test is None else subset(corpus.test, setting.test, 0)
    validation = subset(corpus.validation, setting.validation, seed)
    return replace(corpus, train=subset(corpus.train, setting.train, seed), validation=validation, test=test)


@dataclass(frozen=True, slots=True)
class Texts:
    """Encoded texts, and the way back to their words."""

    rows: list[dict[str, Any]]  # `input_ids` and `labels` of each text that has any word
    of_text: list[int]  # for each row the index of its text
    slots: list[list[int]]  # for each row the places in its text's gold labels that its predictions fill
    gold: list[list[int]]  # label ids of every text, one or one per word, whether encoded or not

    @property
    def scored_share(self) -> float:
        """The share of the labels that the model sees."""
        return sum(map(len, self.slots)) / sum(map(len, self.gold))

    def predictions(self, found: Sequence[NDArray[np.int64]]) -> list[list[int]]:
        """Return the predicted ids of each text from those of each row; `NO_PREDICTION` for a dropped or cut word."""
        texts = [[NO_PREDICTION] * len(gold) for gold in self.gold]
        for text, slots, predicted in zip(self.of_text, self.slots, found, strict=True):
            for slot, label in zip(slots, predicted, strict=True):
                texts[text][slot] = int(label)
        return texts


def encode_texts(
    examples: Sequence[Example], tokenizer: Any, task: Any, labels: tuple[str, ...], protocol: Protocol
) -> Texts:
    """Encode texts with hashtags and length as the protocol has them."""
    gold = [[labels.index(tag) for tag in example.tags] for example in examples]
    used, kept = list(examples), [list(range(len(tags))) for tags in gold]
    if not protocol.hashtags_kept:  # the authors' reader drops these lines of a CoNLL file
        kept = [[index for index, word in enumerate(example.words) if "#" not in word] for example in examples]
        used = [
            replace(example, text=tuple(example.words[n] for n in part), label=tuple(example.tags[n] for n in part))
            for example, part in zip(examples, kept, strict=True)
        ]
    of_text = [number for number, example in enumerate(used) if example.words]
    found = Encoder(tokenizer, task, protocol.max_length).cut([used[number] for number in of_text], labels)
    slots = [kept[number] for number in of_text]
    if found.kept is not None:
        slots = [[words[word] for word in inside] for words, inside in zip(slots, found.kept, strict=True)]
    return Texts([dict(row) for row in found.dataset], of_text, slots, gold)


class EncoderLearner:
    """MiniLM masked by the package: packed rows, bf16 autocast if wanted, weights and optimizer in fp32."""

    def __init__(self, run: RunSpec, task: Any, labels: tuple[str, ...], bf16: bool) -> None:
        config = Recipe.load("trec/minilm").model.model_copy(update={"precision": "fp32"})
        torch.manual_seed(run.seed)
        backbone = load_backbone(config, task, labels, torch.device("cpu"))
        self.model, self.tokenizer, self._bf16 = backbone.model, backbone.tokenizer, bf16
        self.model.requires_grad_(True)
        enable_padding_free(self.model)
        self._collate = PackedCollator(task)
        kind = {"id0": "id", "trained": "spare"}.get(run.protocol.masked_by, run.protocol.masked_by)
        ids = {"mask": self.tokenizer.mask_token_id, "id": 0, "unk": self.tokenizer.unk_token_id}
        self._row = ids.get(kind, self.tokenizer.convert_tokens_to_ids("[unused993]"))
        token = MaskToken(self._row, kind, "what the arm names; the package would refuse id 0, BERT's padding")
        options: dict[str, Any] = {"mask_token": token, "seed": run.seed}
        self._masker = TokenMasker.attach(self.model, self.tokenizer, TokenMaskConfig(p=run.p), **options)
        self._embedding, self._fixed = self.model.get_input_embeddings(), None
        if run.protocol.masked_by == "spare":
            self._fixed = read_rows(self._embedding, self._row, self._row + 1)[0].detach().clone()
        torch.manual_seed(run.seed)  # one dropout stream for all arms, whatever loading drew

    def outputs(self, rows: Sequence[dict[str, Any]], training: bool) -> tuple[Any, Tensor]:
        """Run a packed batch; the masker masks in training alone."""
        if training and self._fixed is not None:  # weight decay and the optimizer have moved it
            write_row(self._embedding, self._row, self._fixed)
        batch = self._collate(rows)
        labels: Tensor = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            return self.model(**batch), labels

    def seen(self) -> dict[str, float]:
        """Return the share of sub-tokens that was masked."""
        return {"masked_share": self._masker.observed_rate}


def padded(rows: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, [batch, length], padded on the right to `length` or the longest."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    ids = F.pad(ids, (0, max(0, length - ids.shape[1])), value=pad_id)
    return ids, (ids != pad_id).long()


def pooled_position(input_ids: Tensor, pad_id: int) -> Tensor:
    """Return the column that transformers pools at, [batch]: the right-most id that is not padding."""
    return (torch.arange(input_ids.shape[1]) * (input_ids != pad_id)).argmax(-1)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A pretrained Qwen2 that has only the rows of the vocabulary that the texts use, id 0 first, and a spare one."""

    tokenizer: Any
    ids: tuple[int, ...]  # for each row its id in the real vocabulary
    pad_id: int  # row of the padding token
    weights: dict[str, Tensor]

    def cut(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Translate real ids to rows."""
        return [[bisect.bisect_left(self.ids, real) for real in row] for row in rows]

    def config(self, **settings: Any) -> Qwen2Config:
        """Return the model's config; its last row is the spare one."""
        shape = {**SHAPE, "intermediate_size": 3 * SHAPE["hidden_size"], "max_position_embeddings": 128, **settings}
        return Qwen2Config(vocab_size=len(self.ids) + 1, pad_token_id=self.pad_id, tie_word_embeddings=True, **shape)


class CausalLearner:
    """A Qwen2 classifier padded to a fixed length and masked before the model, as the authors' texts are.

    Transformers pools at the right-most id that is not padding. A masked padding id is not padding any more, so it
    moves that position off the text, while the attention mask still shows the text alone.
    """

    def __init__(self, run: RunSpec, pretrained: LanguageModel, classes: int) -> None:
        torch.manual_seed(run.seed)
        self.model: Any = Qwen2ForSequenceClassification(pretrained.config(num_labels=classes))
        self.model.load_state_dict(pretrained.weights, strict=False)
        self.tokenizer, self._run, self._pretrained = pretrained.tokenizer, run, pretrained
        self._pad, self._mask_id = pretrained.pad_id, 0
        if run.protocol.masked_by == "trained":
            self._mask_id = len(pretrained.ids)
            embedding = self.model.get_input_embeddings()
            write_row(embedding, self._mask_id, embedding.weight[: self._mask_id].detach().mean(0))
        self._step, self._seen = 0, np.zeros(4)  # sub-tokens that are real, and masked; rows, and moved ones
        torch.manual_seed(run.seed)

    def mask(self, input_ids: Tensor) -> Tensor:
        """Return ids with each position masked with probability p, including padding if the protocol says so."""
        real = input_ids != self._pad
        maskable = torch.ones_like(real) if self._run.protocol.pads_masked else real
        chosen = masked_positions(input_ids, self._run.p, self._run.seed, self._step, 0, maskable)
        masked = input_ids.masked_fill(chosen, self._mask_id)
        self._step += 1
        moved = pooled_position(masked, self._pad) != pooled_position(input_ids, self._pad)
        self._seen += [int(real.sum()), int((chosen & real).sum()), len(moved), int(moved.sum())]
        return masked

    def outputs(self, rows: Sequence[dict[str, Any]], training: bool) -> tuple[Any, Tensor]:
        """Run a padded batch; in training the masked ids are what the model gets, and pools by."""
        texts = self._pretrained.cut([row["input_ids"] for row in rows])
        ids, attention = padded(texts, self._pad, self._run.protocol.max_length if training else 0)
        labels = torch.tensor([row["labels"] for row in rows])
        given = self.mask(ids) if training else ids
        return self.model(input_ids=given, attention_mask=attention, use_cache=False), labels

    def seen(self) -> dict[str, float]:
        """Return the share of text that was masked, and of rows whose pooled position moved."""
        real, masked, rows, moved = self._seen.tolist()
        return {"masked_share": masked / max(real, 1), "moved_share": moved / max(rows, 1)}


def pretrain(made: LanguageModel, texts: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the language model, seed 0; return its weights without the head, and a record of the training."""
    rows = made.cut([row for row in texts if len(row) > 1])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(made.config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = linear_schedule(optimizer, steps // 10, steps)
    start, by_epoch = time.process_time(), []
    for _ in range(EPOCHS):
        total = words = 0.0
        for batch in batches(rows, BATCH):
            ids, mask = padded(batch, made.pad_id)
            states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            real = mask[:, 1:].bool()  # logits for padding would cost most of the step
            loss = F.cross_entropy(model.lm_head(states[real]), ids[:, 1:][real])
            count = int(real.sum())
            total, words = total + step(loss, optimizer, schedule) * count, words + count
        by_epoch.append(total / words)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.")}
    record = {"texts": len(rows), "rows": len(made.ids) + 1, "loss_by_epoch": by_epoch}
    record |= {"seconds": time.process_time() - start, "shape": SHAPE, "epochs": EPOCHS, "learning_rate": LEARNING_RATE}
    return weights, record


@functools.lru_cache(maxsize=1)
def language_model(folder: Path) -> LanguageModel:
    """Return the language model, trained if `folder` has none; TOKMASK_TOKENIZERS holds Qwen2.5-0.5B's tokenizer."""
    source = Path(os.environ["TOKMASK_TOKENIZERS"]) / "Qwen2.5-0.5B"
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
    corpus = read_corpus(SETTINGS["causal"], 0, whole=True)
    unlabelled = (*corpus.train, *corpus.validation)
    texts = tokenizer([example.string for example in (*unlabelled, *corpus.test)])["input_ids"]
    ids = tuple(sorted({0, tokenizer.pad_token_id}.union(*texts)))
    made = LanguageModel(tokenizer, ids, ids.index(tokenizer.pad_token_id), {})
    weights = folder / "language_model.pt"
    if not weights.is_file():
        found, record = pretrain(made, texts[: len(unlabelled)])
        torch.save(found, weights)
        record |= {"id_0": tokenizer.convert_ids_to_tokens(0), "texts_with_id_0": sum(0 in row for row in texts)}
        write_json(folder / "language_model.json", record)
    return replace(made, weights=torch.load(weights, weights_only=True))


def batches(rows: Sequence[Any], size: int, generator: torch.Generator | None = None) -> Iterator[list[Any]]:
    """Shuffle and cut into batches."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    for start in range(0, len(rows), size):
        yield [rows[index] for index in order[start : start + size]]


def step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
    """Take an optimizer step and return the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()
    return loss.item()


def train(
    learner: Any,
    run: RunSpec,
    parts: dict[str, Texts],
    weights: Sequence[float] | None,
    labels: Sequence[str],
    stopped: Callable[[list[dict[str, Any]]], bool],
) -> list[dict[str, Any]]:
    """Train on `train` of `parts` until `stopped`, score on the others, and return a record per epoch."""
    setting, rows, model = run.setting, parts["train"].rows, learner.model
    criterion = ClassificationLoss(weights or [1.0] * len(labels), GAMMA)
    rate = setting.learning_rate * run.protocol.peak
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    steps = setting.epochs * -(-len(rows) // setting.batch_size)
    schedule = linear_schedule(optimizer, round(run.protocol.warm_up * steps), steps)
    generator = torch.Generator().manual_seed(run.seed)
    epochs: list[dict[str, Any]] = []
    for number in range(setting.epochs):
        start = time.process_time()
        model.train()
        if number and not run.protocol.dropout_kept:
            # as after the authors' `model.eval()`, except for the embedding, where the masker looks for train mode
            for module in model.modules():
                module.training = module is model or module is model.get_input_embeddings()
        losses = []
        for batch in batches(rows, setting.batch_size, generator):
            losses.append(step(criterion(*learner.outputs(batch, training=True)), optimizer, schedule))
        epochs.append({"learning_rate": schedule.get_last_lr()[0], "train_loss": finite(np.mean(losses))})
        trained = time.process_time()
        for name in [name for name in parts if name != "train"]:
            epochs[-1][name] = evaluate(learner, parts[name], criterion, labels, keep=name == "test")
        epochs[-1]["seconds"] = [trained - start, time.process_time() - trained]
        if stopped(epochs):
            break
    return epochs


def finite(loss: Any) -> float:
    """Replace a loss that is not a number: JSON has none, and early stopping must see no improvement."""
    return float(np.nan_to_num(loss, nan=1e6, posinf=1e6))


@torch.no_grad()
def evaluate(
    learner: Any, texts: Texts, criterion: ClassificationLoss, labels: Sequence[str], keep: bool
) -> dict[str, Any]:
    """Return loss and scores, over what the model sees and over all, and the predictions if they are to be kept."""
    learner.model.eval()
    found: dict[int, NDArray[np.int64]] = {}
    order = sorted(range(len(texts.rows)), key=lambda index: len(texts.rows[index]["input_ids"]))
    loss = items = 0.0
    for start in range(0, len(order), EVALUATED_AT_ONCE):
        chosen = order[start : start + EVALUATED_AT_ONCE]
        outputs, given = learner.outputs([texts.rows[index] for index in chosen], training=False)
        count = int((given != IGNORED).sum())
        loss, items = loss + float(criterion(outputs, given)) * count, items + count
        predicted = outputs.logits.argmax(-1)[given != IGNORED].numpy()
        ends = np.cumsum([len(texts.slots[index]) for index in chosen])[:-1]
        found |= dict(zip(chosen, np.split(predicted, ends), strict=True))
    by_text = texts.predictions([found[index] for index in range(len(texts.rows))])
    gold, predicted = (np.concatenate([np.array(row, dtype=int) for row in rows]) for rows in (texts.gold, by_text))
    seen = predicted != NO_PREDICTION
    record = {
        "loss": finite(loss / items),
        "f1_macro": scores(gold[seen], predicted[seen], labels)["f1_macro"],
        "f1_macro_all": scores(gold, predicted, labels)["f1_macro"],
    }
    return {**record, "predictions": by_text} if keep else record


def record_of(run: RunSpec, folder: Path) -> dict[str, Any]:
    """Return the record of a run in `folder`; if there is none, train it first.

    Raises:
        SystemExit: the record was made with other settings, so that its scores belong to another study.
    """
    file, wanted = folder / f"{run.name}.json", asdict(run)
    if file.is_file():
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if any(record[key] != value for key, value in wanted.items()):
            raise SystemExit(f"{file} was run with other settings: remove it, or name another folder with --runs")
        return record
    start, corpus = time.process_time(), read_corpus(run.setting, run.seed)
    learner: EncoderLearner | CausalLearner
    if run.setting.backbone == "minilm":
        learner = EncoderLearner(run, corpus.task, corpus.labels, bf16=True)
    else:
        learner = CausalLearner(run, language_model(folder), len(corpus.labels))
    parts = {
        name: encode_texts(texts, learner.tokenizer, corpus.task, corpus.labels, run.protocol)
        for name, texts in {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}.items()
    }
    weights = class_weights("sqrt_inverse", count_labels(corpus.train))

    def stopped(epochs: list[dict[str, Any]]) -> bool:  # by both, so that either rule can be read off the same run
        losses = ([epoch[split]["loss"] for epoch in epochs] for split in ("validation", "test"))
        return all(stop_epoch(split, run.setting) for split in losses)

    record = {
        **wanted,
        "labels": list(corpus.labels),
        "texts": {name: len(part.gold) for name, part in parts.items()},
        "scored_share": parts["test"].scored_share,
        "gold": parts["test"].gold,
        "epochs": train(learner, run, parts, weights, corpus.labels, stopped),
        "seconds": time.process_time() - start,
        **learner.seen(),
    }
    write_json(file, record, indent=None)
    print(f"{run.name}: {record['seconds']:.0f} s", flush=True)
    return record

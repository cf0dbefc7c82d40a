"""The callback in other people's trainers: the situations of transformers' examples, TRL and sentence-transformers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import TEXTS, build, tiny_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tokmask_peft import TokenMaskCallback, TokenMaskConfig, TokenMasker, TokmaskError
from tokmask_peft.masking.embedding import find_embedding

SETTINGS = {
    "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "use_cpu": True, "disable_tqdm": True, "bf16": False,
}  # fmt: skip
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


class Watch(TrainerCallback):
    """Keeps the ids that each forward looks up, and whether it is one of training."""

    def __init__(self):
        self.training, self.other = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.embedding = find_embedding(model)
        self.hook = self.embedding.register_forward_pre_hook(self.keep)

    def keep(self, module, args):
        (self.training if module.training and torch.is_grad_enabled() else self.other).append(args[0].clone())


def assert_masked(trainer, watch, mask_id, rate=0.5):
    """Assert that training forwards were masked at the rate, that no other forward was, and that nothing is left."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(watch.training) == 4
    assert all(np.isfinite(line["loss"]) and line["masking_rate"] == rate for line in lines)
    share = torch.cat([(ids == mask_id).flatten() for ids in watch.training]).float().mean()
    assert 0.25 < share < 0.6  # of all ids, special ones and padding among them
    assert not any((ids == mask_id).any() for ids in watch.other)
    watch.hook.remove()
    assert not watch.embedding._forward_pre_hooks


def test_run_classification(tmp_path):
    """Texts padded to one length by the tokenizer, label names in the config, scores from `compute_metrics`."""
    model, tokenizer = build("bert")
    data = Dataset.from_dict({"sentence": TEXTS, "label": [i % 3 for i in range(len(TEXTS))]})
    rows = data.map(lambda part: tokenizer(part["sentence"], padding="max_length", max_length=24, truncation=True))
    watch = Watch()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **SETTINGS, eval_strategy="steps", eval_steps=2),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.5)), watch],
    )
    trainer.train()
    in_training = trainer.state.log_history[-2]["eval_accuracy"]
    assert len(watch.other) == 2
    padding = torch.cat(watch.training) == tokenizer.pad_token_id
    assert padding.any(), "no padding was seen"
    watch.training = [ids[ids != tokenizer.pad_token_id] for ids in watch.training]
    assert_masked(trainer, watch, tokenizer.mask_token_id)
    assert trainer.evaluate()["eval_accuracy"] == in_training


def test_run_ner(tmp_path):
    """Words with a label on the first sub-token each, in whole-word masks, on an adapter."""
    model, tokenizer = build("xlm-r", "token")
    model = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query", "value"]))
    rows = []
    for text in TEXTS:
        row = tokenizer(text.split(), is_split_into_words=True, truncation=True)
        words = row.word_ids()
        first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        rows.append({**row, "labels": [place % 3 if begins else -100 for place, begins in enumerate(first)]})
    watch = Watch()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **SETTINGS),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8),
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.5, unit="word")), watch],
    )
    trainer.train()
    watch.training = [ids[ids != tokenizer.pad_token_id] for ids in watch.training]
    assert_masked(trainer, watch, tokenizer.mask_token_id)
    trainer.predict(rows)
    assert not model.get_base_model().get_input_embeddings()._forward_pre_hooks


def causal():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=348, num_key_value_heads=2, **shape))
    tokenizer = tiny_tokenizer("bytelevel")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    return model, tokenizer


def of_trl(kind, folder, watch, **more):
    """Return a trainer of TRL for a tiny model, with the callback."""
    trl = pytest.importorskip("trl")
    model, tokenizer = causal()
    begin = [text.split()[0] for text in TEXTS]
    end = [text + " ok" for text in TEXTS]
    columns = {"SFT": {"text": TEXTS}, "Reward": {"chosen": end, "rejected": end[::-1]}, "GRPO": {"prompt": begin}}.get(
        kind, {"prompt": begin, "chosen": end, "rejected": end[::-1]}
    )
    if kind == "Reward":
        model = build("qwen2", labels=1)[0]
    elif kind == "GRPO":
        more |= {"num_generations": 2, "max_completion_length": 4}
    given = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)} if kind == "GRPO" else {}
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(str(folder), **SETTINGS, **more),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False), watch],
        peft_config=None if kind == "Reward" else LORA,
        **given,
    )


@pytest.mark.parametrize(("kind", "more"), [("SFT", {}), ("SFT", {"packing": True}), ("Reward", {})])
def test_trl_trainers_with_one_forward_a_step_are_masked(tmp_path, kind, more):
    watch = Watch()
    trainer = of_trl(kind, tmp_path, watch, max_length=64, **more)
    trainer.train()
    assert all(len(ids) == 1 for ids in watch.training) == bool(more)
    pad = trainer.processing_class.pad_token_id
    watch.training = [ids[ids != pad] for ids in watch.training]
    assert_masked(trainer, watch, 347)


@pytest.mark.parametrize(
    ("where", "columns", "packing"),
    [
        ("prompt", "prompt", False),
        ("prompt", "text", False),
        ("completion", "prompt", False),
        ("prompt", "prompt", True),
        ("completion", "text", True),
    ],
)
def test_of_prompt_and_completion_one_can_be_masked(tmp_path, where, columns, packing):
    trl = pytest.importorskip("trl")
    model, tokenizer = causal()
    data = {"prompt": [text.split()[0] for text in TEXTS], "completion": [text + " ok" for text in TEXTS]}
    watch, labels = Watch(), []
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(tmp_path), **SETTINGS, max_length=64, packing=packing),
        train_dataset=Dataset.from_dict(data if columns == "prompt" else {"text": TEXTS}),
        processing_class=tokenizer,
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.5, where=where), announce=False), watch],
        peft_config=LORA,
    )
    trainer.model.register_forward_pre_hook(lambda _, args, given: labels.append(given), with_kwargs=True)
    trainer.train()
    masked = torch.cat([(ids == 347).flatten() for ids in watch.training])
    scored = torch.cat([given["labels"].flatten() for given in labels]) != -100
    if packing:  # the label of a text's first token is always -100
        places = torch.cat([given["position_ids"].flatten() for given in labels])
        assert (places == 0).sum() > 4, "rows hold several texts"
        scored[places == 0] = scored[(places == 0).nonzero().flatten() + 1]
    inside, outside = (masked[scored], masked[~scored]) if where == "completion" else (masked[~scored], masked[scored])
    assert not outside.any()
    assert inside.any() == ((where, columns) != ("prompt", "text")), "a text alone is all completion"


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_seq2seq_trainer_is_masked_and_what_it_generates_is_not(tmp_path, family):
    model, tokenizer = build(family, "text")
    rows = [{**tokenizer(text), "labels": tokenizer(text[:12])["input_ids"]} for text in TEXTS]
    watch, generated = Watch(), []
    trainer = Seq2SeqTrainer(
        get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear")),
        Seq2SeqTrainingArguments(
            str(tmp_path),
            **SETTINGS,
            predict_with_generate=True,
            generation_max_length=6,
            eval_strategy="steps",
            eval_steps=2,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda found: generated.append(found.predictions) or {},
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.5, decoder_p=0.5), announce=False), watch],
    )
    decoder = Watch()
    decoder.on_train_begin(None, None, None, model=model.get_decoder())
    trainer.train()
    assert len(generated) == 2
    padding = tokenizer.pad_token_id
    watch.training = [ids[ids != padding] for ids in watch.training]
    assert_masked(trainer, watch, tokenizer.mask_token_id)
    assert len(decoder.other) > 4, "token by token"
    assert not any((ids == tokenizer.mask_token_id).any() for ids in decoder.other)
    trainer.evaluate()
    assert np.array_equal(generated[-1], generated[-2])


class Embedding(Trainer):
    """Looks the encoder's ids up by itself."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = model.get_base_model().get_input_embeddings().weight[ids]
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_training_whose_encoder_sees_no_ids_ends_with_an_error(tmp_path, family):
    model, tokenizer = build(family, "text")
    trainer = Embedding(
        get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules="all-linear")),
        TrainingArguments(str(tmp_path), **SETTINGS, remove_unused_columns=False),
        train_dataset=[{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in TEXTS],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        callbacks=[TokenMaskCallback(TokenMaskConfig(p=0.5, decoder_p=0.5), announce=False)],
    )
    with pytest.raises(TokmaskError) as ended:
        trainer.train()
    assert ended.value.code == "masked-nothing"


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_trl_trainers_that_compare_answers_are_refused(tmp_path, kind):
    trainer = of_trl(kind, tmp_path, Watch())
    with pytest.raises(TokmaskError) as refused:
        trainer.train()
    assert (refused.value.code, refused.value.fields) == ("trl-trainer", {"config": f"{kind}Config"})


def test_sentence_transformers_are_refused_with_a_way_that_works(tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    inner, tokenizer = build("bert")
    inner.base_model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model = SentenceTransformer(str(tmp_path / "bert"), device="cpu")

    def trainer(callbacks):
        return SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(str(tmp_path), **SETTINGS),
            train_dataset=Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=callbacks,
        )

    with pytest.raises(TokmaskError, match="transformers_model") as refused:
        trainer([TokenMaskCallback()]).train()
    assert refused.value.code == "sentence-transformers"
    plain = trainer([])
    with TokenMasker.attach(model.transformers_model, tokenizer, TokenMaskConfig(p=0.5)) as masker:
        plain.train()
        assert masker.step == 8  # two columns in each of four steps
        assert masker.observed_rate == pytest.approx(0.5, abs=0.1)

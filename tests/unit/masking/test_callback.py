"""The callback in a transformers Trainer: schedule, logs, checkpoints, failures, and what must stay unmasked."""

import contextlib
import gc
import json

import pytest
import torch
from tiny_models import TEXTS, build
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.recipe import TokenMaskConfig

WARMUP = TokenMaskConfig(p=0.5, schedule="linear")


class Recorder(TrainerCallback):
    """Records the rate that each optimizer step was taken with, the logs, and the ids looked up in training."""

    def __init__(self, masking):
        self.masking, self.rates, self.logs, self.ids = masking, [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def record(module, inputs, output):
            if module.training:
                self.ids.append(inputs[0].clone())

        self.handle = model.get_input_embeddings().register_forward_hook(record)

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(self.masking.masker.rate)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trainer(folder, callbacks, model=None, cls=Trainer, texts=8, **settings):
    _, tokenizer = build("qwen2")
    model = build("qwen2")[0] if model is None else model
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS[:texts])]
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 11, **settings,
    }  # fmt: skip
    made = cls(
        model, TrainingArguments(str(folder), **settings), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, callbacks=callbacks,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def assert_clean(model):
    """No hook is left, the spare row has its old values, and a training forward is not masked."""
    embedding = model.get_input_embeddings()
    assert not embedding._forward_pre_hooks
    ids = torch.arange(300)[None]
    assert torch.equal(model.train().get_input_embeddings()(ids), torch.nn.functional.embedding(ids, embedding.weight))


def test_one_line_masks_on_schedule_and_leaves_nothing_behind(tmp_path, capsys):
    callback = TokenMaskCallback(WARMUP)
    recorder = Recorder(callback)
    made = trainer(tmp_path, [callback, recorder])
    made.train()
    assert recorder.rates == [0.0, 0.125, 0.25, 0.375]
    masked = [(ids == 347).sum().item() for ids in recorder.ids]
    assert masked[0] == 0 < sum(masked)
    assert callback.masker is None
    assert_clean(made.model)
    said = capsys.readouterr().err
    assert said.count("tokmask: ") == 1
    assert "id 347: the tokenizer does not use rows 332 to 347" in said


@pytest.mark.parametrize("ahead", [True, False])
def test_the_rate_is_logged_for_reports_and_history(tmp_path, ahead):
    class Report(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(logs.get("masking_rate"))

    report = Report()  # before the masking callback, as the trackers of report_to are
    callback = TokenMaskCallback(WARMUP)
    made = trainer(tmp_path, [report] if ahead else [report, callback], eval_strategy="steps", eval_steps=4)
    if ahead:
        callback.add_to(made)
    made.train()
    rates = [0.0, 0.125, 0.25, 0.375]
    assert [line["masking_rate"] for line in made.state.log_history if "loss" in line] == rates
    assert report.seen == [*(rates if ahead else [None] * 4), None, None]  # at the end evaluation and a summary


def test_accumulated_forwards_differ_and_seeds_come_from_the_arguments(tmp_path):
    def ids(seed, config):
        recorder = Recorder(callback := TokenMaskCallback(config))
        settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "seed": seed}
        made = trainer(tmp_path, [callback, recorder], **settings)
        made.train_dataset = [made.train_dataset[5]] * 4
        made.train()
        return torch.cat(recorder.ids)

    first = ids(11, TokenMaskConfig(p=0.5))
    assert len(first) == len(first.unique(dim=0)) == 4  # of one text
    assert torch.equal(first, ids(11, TokenMaskConfig(p=0.5)))
    assert not torch.equal(first, ids(12, TokenMaskConfig(p=0.5)))
    assert torch.equal(ids(11, TokenMaskConfig(p=0.5, seed=3)), ids(12, TokenMaskConfig(p=0.5, seed=3)))


def test_checkpoints_hold_the_resolved_config(tmp_path):
    trainer(tmp_path, [TokenMaskCallback(WARMUP)], save_strategy="steps", save_steps=2).train()
    saved = TokenMaskConfig.from_pretrained(tmp_path / "checkpoint-2")
    assert (saved.mask_token, saved.seed, saved.schedule) == (347, 11, "linear")
    assert json.loads((tmp_path / "checkpoint-4" / "tokmask_config.json").read_text())["p"] == 0.5


class FailingTrainer(Trainer):
    where = "compute_loss"

    def compute_loss(self, model, *args, **kwargs):
        if self.where == "compute_loss" and self.state.global_step == 1 and model.training:
            raise torch.OutOfMemoryError("no memory")
        return super().compute_loss(model, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        if self.where == "data" and self.state.global_step == 1:
            raise OSError("no data")
        return super().get_batch_samples(*args, **kwargs)


@pytest.mark.parametrize("where", ["compute_loss", "data"])
def test_after_a_failed_run_nothing_is_masked_and_the_next_run_is(tmp_path, where):
    callback = TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2}
    made = trainer(tmp_path, [callback], cls=FailingTrainer, **settings)
    made.where = where
    embedding = made.model.get_input_embeddings().requires_grad_(False)
    before, ids = embedding.weight[-1].clone(), torch.arange(300)[None]
    with pytest.raises((OSError, RuntimeError)):
        made.train()
    plain = torch.nn.functional.embedding(ids, embedding.weight)
    with torch.no_grad():
        assert torch.equal(made.model.train().get_input_embeddings()(ids), plain)
    if where == "data":  # outside of a step
        assert torch.equal(embedding(ids), plain)
    assert torch.equal(made.model.eval().get_input_embeddings()(ids), plain)

    recorder = Recorder(second := TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False))
    trainer(tmp_path, [second, recorder], model=made.model, **settings).train()
    assert any((ids == 347).any() for ids in recorder.ids)
    callback.detach()
    assert_clean(made.model)
    assert torch.equal(embedding.weight[-1], before)


class Interrupted(Trainer):
    """Fails in the third step: before, in or after a forward, in the backward pass, or in the optimizer."""

    where = ""

    def compute_loss(self, model, inputs, *args, **kwargs):
        fails = self.state.global_step == 2
        if fails and self.where == "forward":
            inputs = {**inputs, "input_ids": inputs["input_ids"].reshape(-1)}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if fails and self.where == "loss":
            raise ValueError("bad loss")
        if fails and self.where == "backward":
            self.handle = model.score.weight.register_hook(self.interrupt)
        return loss

    def interrupt(self, gradient):
        self.handle.remove()
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "on_pre_optimizer_step"])
def test_a_failed_trainer_that_is_kept_soon_stops_masking_and_says_so(tmp_path, where):
    callback = TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False)
    others = [FailingLater(where)] if where.startswith("on_") else []
    made = trainer(tmp_path, [*others, callback], cls=Interrupted, max_steps=4)
    made.where = where
    with pytest.raises((ValueError, IndexError, KeyboardInterrupt)):
        made.train()
    again = Recorder(callback)
    with pytest.warns(UserWarning, match="detach") as warned:  # another training of the same model, without masking
        trainer(tmp_path, [again], model=made.model, max_steps=3).train()
    assert len(warned) == 1
    masked = [(ids == 347).any().item() for ids in again.ids]
    assert masked == [where == "loss", False, False]  # that failure shows in the next backward pass only


class FailingLater(TrainerCallback):
    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise ValueError("bad")


class Twice(Trainer):
    """Makes a backward pass of its own before that of the Trainer, as sharpness-aware training does."""

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        self.compute_loss(model, {**inputs}).backward()
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainer_of_two_backward_passes_is_masked_in_both(tmp_path, accumulated):
    recorder = Recorder(callback := TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False))
    made = trainer(tmp_path, [callback, recorder], cls=Twice, max_steps=3, gradient_accumulation_steps=accumulated)
    with pytest.warns(UserWarning, match="It is masked") as warned:
        made.train()
    assert len(warned) == 1
    assert len(recorder.ids) == 6 * accumulated
    assert all((ids == 347).any() for ids in recorder.ids)


def test_a_failed_training_masks_nothing_once_its_trainer_is_gone(tmp_path):
    model = build("qwen2")[0].requires_grad_(False)
    weight = model.get_input_embeddings().weight.clone()
    model.score.requires_grad_(True)

    def fail():
        callback = TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False)
        with contextlib.suppress(torch.OutOfMemoryError):
            trainer(tmp_path, [callback], model=model, cls=FailingTrainer).train()
        assert callback.masker.enabled  # it failed within a step

    fail()
    gc.collect()
    assert_clean(model)
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_a_trainer_that_begins_again_with_smaller_batches_masks(tmp_path):
    class Once(Trainer):
        failed = False

        def compute_loss(self, model, *args, **kwargs):
            if self.state.global_step == 1 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, *args, **kwargs)

    recorder = Recorder(callback := TokenMaskCallback(WARMUP, announce=False))
    made = trainer(tmp_path, [callback, recorder], cls=Once, auto_find_batch_size=True)
    made.train()
    assert made.failed
    assert recorder.rates == [0.0, 0.0, 0.125, 0.25, 0.375]
    assert_clean(made.model)


def test_what_the_trainer_lacks_is_named(tmp_path):
    made = trainer(tmp_path, [TokenMaskCallback()])
    made.callback_handler.processing_class = None
    with pytest.raises(MaskTokenError, match="processing_class=tokenizer") as refused:
        made.train()
    assert refused.value.code == "no-tokenizer"
    made = trainer(tmp_path, [TokenMaskCallback()])
    made.args._n_gpu = 2
    with pytest.raises(MaskTokenError, match="torchrun") as refused:
        made.callback_handler.on_train_begin(made.args, made.state, made.control)
    assert (refused.value.code, refused.value.fields) == ("data-parallel", {"gpus": 2})


def test_trl_trainers_are_refused_unless_each_loss_comes_from_one_forward(tmp_path):
    """Look-alikes of their arguments; the real trainers are in tests/integration."""
    off = {"p": 0.0}
    for name, masking, code in (("SFTConfig", {}, None), ("DPOConfig", {}, "trl-trainer"), ("DPOConfig", off, None)):
        made = trainer(tmp_path, [TokenMaskCallback(masking)], max_steps=1)
        made.args.__class__ = type(name, (TrainingArguments,), {"__module__": "trl.trainer.any"})
        if code is None:
            made.train()
        else:
            with pytest.raises(MaskTokenError, match="SFT or reward training") as refused:
                made.train()
            assert (refused.value.code, refused.value.fields) == (code, {"config": name})


def test_a_trainer_that_would_score_masked_words_is_refused(tmp_path):
    with pytest.raises(MaskTokenError, match="train from a recipe") as refused:
        trainer(tmp_path, [TokenMaskCallback(TokenMaskConfig(score_masked=False))]).train()
    assert refused.value.code == "scores-masked"
    model = build("qwen2", task="token")[0]
    with pytest.raises(MaskTokenError) as refused:
        trainer(tmp_path, [TokenMaskCallback(TokenMaskConfig(replace="drop"))], model).train()
    assert refused.value.code == "scores-masked"
    assert_clean(model)
    trainer(tmp_path, [TokenMaskCallback(TokenMaskConfig(replace="drop"))]).train()  # one label a text


def test_a_model_is_not_masked_twice(tmp_path):
    model, tokenizer = build("qwen2")
    with TokenMasker.attach(model, tokenizer), pytest.raises(MaskTokenError) as refused:
        trainer(tmp_path, [TokenMaskCallback()], model=model).train()
    assert refused.value.code == "masker-attached"
    with pytest.raises(MaskTokenError, match="one TokenMaskCallback only") as refused:
        trainer(tmp_path, [TokenMaskCallback(), TokenMaskCallback()]).train()
    assert refused.value.code == "masker-replaced"


class Rollouts(Trainer):
    """Generates in train mode within each step and makes a reference pass, as TRL's GRPO and DPO trainers do."""

    extra = True

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.extra:
            model.generate(inputs["input_ids"][:, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
            with torch.no_grad():
                model(inputs["input_ids"])
        return super().compute_loss(model, {**inputs, "labels": inputs["input_ids"]}, *args, **kwargs)


def test_generation_and_reference_passes_in_train_mode_are_not_masked(tmp_path):
    def looked_up(extra):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=348, num_key_value_heads=2, **shape))
        recorder = Recorder(callback := TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False))
        made = trainer(tmp_path, [callback, recorder], model=model, cls=Rollouts, max_steps=2)
        made.extra = extra
        made.train()
        return recorder.ids

    plain, ids = looked_up(False), looked_up(True)
    assert [(masked == 347).any().item() for masked in ids] == [False, False, False, True] * 2
    assert all(torch.equal(one, other) for one, other in zip(plain, ids[3::4], strict=True))  # same pattern


def test_a_masker_that_sees_no_ids_ends_the_training(tmp_path):
    class Embedded(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
            return super().compute_loss(model, {**inputs, "inputs_embeds": embedded}, *args, **kwargs)

    options = {"cls": Embedded, "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer(tmp_path, [TokenMaskCallback(TokenMaskConfig(p=0.0))], **options).train()
    made = trainer(tmp_path, [TokenMaskCallback()], **options)
    with pytest.raises(MaskTokenError, match="inputs_embeds") as caught:
        made.train()
    assert (caught.value.code, made.state.global_step) == ("masked-nothing", 1)


def test_texts_without_a_maskable_token_are_reported(tmp_path):
    config = TokenMaskConfig(protect=tuple(range(332)))
    with pytest.warns(UserWarning, match="masked nothing"):
        trainer(tmp_path, [TokenMaskCallback(config)], max_steps=1, per_device_train_batch_size=1).train()


@pytest.mark.parametrize("case", ["rebuilt by the Trainer", "checkpoint without the callback"])
def test_a_checkpoint_is_resumed_whatever_it_says_of_the_callback(tmp_path, case):
    def run(resume=None):
        recorder = Recorder(None)
        recorder.on_optimizer_step = lambda *args, **kwargs: None
        callback = TokenMaskCallback(TokenMaskConfig(p=0.5, unit="word"), announce=False)
        rebuilt = resume is not None and case == "rebuilt by the Trainer"
        made = trainer(
            tmp_path, [callback, recorder], save_strategy="steps", save_steps=2,
            restore_callback_states_from_checkpoint=rebuilt,
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return recorder.ids

    whole = run()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    if case == "checkpoint without the callback":
        content = json.loads(state.read_text())
        del content["stateful_callbacks"]["TokenMaskCallback"]
        state.write_text(json.dumps(content))
    resumed = run(str(state.parent))
    assert len(resumed) == 2
    assert all(torch.equal(one, other) for one, other in zip(whole[2:], resumed, strict=True))


@pytest.mark.parametrize("config", [{"p": 0.0}, {"p": 0.5, "replace": "random"}])
def test_no_mask_token_where_none_is_needed(tmp_path, capsys, config):
    model = build("gpt2", vocab_size=len(build("gpt2")[1]))[0]
    callback = TokenMaskCallback(TokenMaskConfig(**config))
    made = trainer(tmp_path, [callback], model, save_strategy="steps", save_steps=2)
    made.train()
    assert "needs no mask token" in capsys.readouterr().err
    assert TokenMaskConfig.from_pretrained(tmp_path / "checkpoint-2").mask_token == "auto"
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

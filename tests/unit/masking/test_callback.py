"""The callback in a transformers Trainer: attach, schedule, logs, checkpoints, and every way for training to fail."""

import json

import pytest
import torch
from tiny_models import TEXTS, build
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

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
        def record(module, inputs):
            if module.training:
                self.ids.append(inputs[0].clone())

        self.handle = model.get_input_embeddings().register_forward_pre_hook(record)

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(self.masking.masker.rate)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Failing(TrainerCallback):
    def __init__(self, event, error):
        setattr(self, event, self.fail)
        self.error, self.armed = error, True

    def fail(self, *args, **kwargs):
        if self.armed:
            self.armed = False
            raise self.error


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
    assert "id 347: the tokenizer has no use for rows 332 to 347" in said


def test_the_rate_is_logged_for_reports_and_history(tmp_path):
    class Report(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(logs.get("masking_rate"))

    report = Report()  # before the masking callback, as the trackers of report_to are
    made = trainer(tmp_path, [report, TokenMaskCallback(WARMUP)], eval_strategy="steps", eval_steps=4)
    made.train()
    assert report.seen == [0.0, 0.125, 0.25, 0.375, None, None]  # the last two: evaluation and the closing summary
    assert [line["masking_rate"] for line in made.state.log_history if "loss" in line] == [0.0, 0.125, 0.25, 0.375]


def test_accumulated_forwards_differ_and_seeds_come_from_the_arguments(tmp_path):
    def ids(seed, config):
        recorder = Recorder(callback := TokenMaskCallback(config))
        made = trainer(
            tmp_path, [callback, recorder], texts=1, max_steps=2, gradient_accumulation_steps=2, seed=seed, data_seed=1,
            num_train_epochs=9, per_device_train_batch_size=1,
        )  # fmt: skip
        made.train()
        return torch.stack(recorder.ids[:2]).flatten(1)

    first = ids(11, TokenMaskConfig(p=0.5))
    assert torch.equal(first, ids(11, TokenMaskConfig(p=0.5)))
    assert not torch.equal(first, ids(12, TokenMaskConfig(p=0.5)))
    assert torch.equal(ids(11, TokenMaskConfig(p=0.5, seed=3)), ids(12, TokenMaskConfig(p=0.5, seed=3)))


def test_forwards_within_an_accumulated_step_get_their_own_pattern(tmp_path):
    recorder = Recorder(callback := TokenMaskCallback(TokenMaskConfig(p=0.5)))
    rows = [TEXTS[5]] * 4
    _, tokenizer = build("qwen2")
    made = trainer(
        tmp_path, [callback, recorder], max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1
    )
    made.train_dataset = [{**tokenizer(text), "labels": 0} for text in rows]
    made.train()
    patterns = {tuple((ids[0] == 347).tolist()) for ids in recorder.ids}
    assert len(recorder.ids) == len(patterns) == 4


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


@pytest.mark.parametrize("late", [False, True], ids=["constructor", "add_callback"])
@pytest.mark.parametrize("where", ["compute_loss", "data", "on_step_end", "on_evaluate", "interrupt"])
def test_a_failing_run_takes_the_masker_with_it(tmp_path, where, late):
    callback = TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False)
    others = [Failing(where, ValueError("bad"))] if where.startswith("on_") else []
    if where == "interrupt":
        others = [Failing("on_substep_end", KeyboardInterrupt())]
    made = trainer(
        tmp_path, others if late else [*others, callback], cls=FailingTrainer, eval_strategy="steps", eval_steps=1,
        gradient_accumulation_steps=2, max_steps=2,
    )  # fmt: skip
    made.where = where
    if late:
        made.add_callback(callback)
    before = made.model.get_input_embeddings().weight[-1].detach().clone()
    made.model.get_input_embeddings().requires_grad_(False)
    with pytest.raises((ValueError, OSError, RuntimeError, KeyboardInterrupt)):
        made.train()
    assert_clean(made.model)
    assert torch.equal(made.model.get_input_embeddings().weight[-1], before)

    made.where = "nowhere"
    recorder = Recorder(callback)
    made.add_callback(recorder)
    made.train()
    assert any((ids == 347).any() for ids in recorder.ids)
    assert_clean(made.model)


def test_a_trainer_that_swallows_a_failed_step_goes_on_masking(tmp_path):
    class Skipping(FailingTrainer):
        def get_batch_samples(self, *args, **kwargs):
            if self.state.global_step == 1:
                with pytest.raises(ValueError, match="bad"):
                    self.evaluate()
            return super().get_batch_samples(*args, **kwargs)

    callback = TokenMaskCallback(TokenMaskConfig(p=0.5), announce=False)
    recorder = Recorder(callback)
    made = trainer(tmp_path, [callback, recorder, Failing("on_evaluate", ValueError("bad"))], cls=Skipping)
    made.where = "nowhere"
    masked = []
    forward = made.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, _: masked.append((inputs[0] == 347).any().item()) if module.training else None
    )
    made.train()
    forward.remove()
    assert recorder.rates == [0.5] * 4
    assert any(masked[2:])
    assert_clean(made.model)


def test_two_trainers_one_after_the_other_on_one_model(tmp_path):
    model, _ = build("qwen2")
    for _ in range(2):
        trainer(tmp_path, [TokenMaskCallback()], model=model, max_steps=1).train()
        assert_clean(model)


def test_what_the_trainer_lacks_is_named(tmp_path):
    made = trainer(tmp_path, [TokenMaskCallback()])
    made.callback_handler.processing_class = None
    with pytest.raises(MaskTokenError, match="processing_class=tokenizer"):
        made.train()
    made = trainer(tmp_path, [TokenMaskCallback()])
    made.args._n_gpu = 2
    with pytest.raises(MaskTokenError, match="torchrun"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


def test_a_model_with_a_masker_is_not_masked_twice(tmp_path):
    model, tokenizer = build("qwen2")
    with TokenMasker.attach(model, tokenizer), pytest.raises(MaskTokenError, match="already"):
        trainer(tmp_path, [TokenMaskCallback()], model=model).train()

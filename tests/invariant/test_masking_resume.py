"""A run that is interrupted and resumed masks, and learns, as the uninterrupted one."""

import pytest
import torch
from tiny_models import TEXTS, build
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokmask_peft.masking import TokenMaskCallback, TokenMaskConfig


class Recorder(TrainerCallback):
    """Keeps the ids looked up in training, by optimizer step; may stop the run."""

    def __init__(self, stop_at=None):
        self.stop_at, self.ids = stop_at, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def record(module, inputs):
            if module.training:
                self.ids.setdefault(state.global_step, []).append(inputs[0].tolist())

        model.get_input_embeddings().register_forward_pre_hook(record)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def run(folder, family, unit, stop_at=None, resume=None):
    model, tokenizer = build(family, dropout=0.1)
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS)]
    config = TokenMaskConfig(p=0.5, schedule="linear", p_start=0.2, unit=unit)
    recorder = Recorder(stop_at)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=1, gradient_accumulation_steps=3, save_steps=2,
            learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[TokenMaskCallback(config, announce=False), recorder],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return recorder.ids, {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("family", "unit"), [("bert", "token"), ("qwen2", "span")])
@pytest.mark.parametrize("stop_at", [2, 4])  # 8 texts, 3 per step: inside the first epoch, and inside the second
def test_resuming_changes_nothing(tmp_path, family, unit, stop_at):
    whole_ids, whole_weights = run(tmp_path / "whole", family, unit)
    run(tmp_path / "parts", family, unit, stop_at=stop_at)
    checkpoint = str(tmp_path / "parts" / f"checkpoint-{stop_at}")
    resumed_ids, resumed_weights = run(tmp_path / "parts", family, unit, resume=checkpoint)
    assert sorted(resumed_ids) == list(range(stop_at, 6))
    assert resumed_ids == {step: ids for step, ids in whole_ids.items() if step >= stop_at}
    for name, weight in whole_weights.items():
        torch.testing.assert_close(resumed_weights[name], weight, rtol=0, atol=1e-7)

"""A run that is interrupted and resumed masks, and learns, as the uninterrupted one."""

import pytest
import torch
from tiny_models import TEXTS, build
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.recipe import TokenMaskConfig


class Recorder(TrainerCallback):
    """Keeps the ids looked up in training, by optimizer step."""

    def __init__(self):
        self.ids = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def record(module, inputs):
            if module.training:
                self.ids.setdefault(state.global_step, []).append(inputs[0].tolist())

        model.get_input_embeddings().register_forward_pre_hook(record)


def run(folder, family, unit, resume=None):
    model, tokenizer = build(family, dropout=0.1)
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS)]
    config = TokenMaskConfig(p=0.5, schedule="linear", p_start=0.2, unit=unit)
    recorder = Recorder()
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
def test_resuming_changes_nothing(tmp_path, family, unit):
    whole_ids, whole_weights = run(tmp_path, family, unit)
    for step in (2, 4):  # 8 texts, 3 per step: inside the first epoch, and inside the second
        resumed_ids, resumed_weights = run(tmp_path, family, unit, resume=str(tmp_path / f"checkpoint-{step}"))
        assert sorted(resumed_ids) == list(range(step, 6))
        assert resumed_ids == {at: ids for at, ids in whole_ids.items() if at >= step}
        for name, weight in whole_weights.items():
            torch.testing.assert_close(resumed_weights[name], weight, rtol=0, atol=1e-7)

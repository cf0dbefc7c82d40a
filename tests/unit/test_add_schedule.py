"""A schedule added from outside the package: it reacts to the training loss, and its state survives a resume."""

import pytest
import torch
from tiny_models import TEXTS, build
from transformers import Trainer, TrainingArguments

from tokmask_peft.errors import RecipeError
from tokmask_peft.masking import TokenMaskCallback, TokenMaskConfig
from tokmask_peft.masking.schedule import SCHEDULES, Schedule
from tokmask_peft.recipe.loading import load_recipe


# -- the example of CONTRIBUTING --
class WhileItLearns(Schedule):
    """Starts at `p_start` and rises by a fifth of the way to `p` whenever the training loss is at a new low."""

    best, now = None, None

    def rate(self, progress):
        return self.p_start if self.now is None else self.now

    def observe(self, feedback):
        loss = feedback.get("loss")
        if loss is not None and (self.best is None or loss < self.best):
            self.best, self.now = loss, min(self.rate(0.0) + (self.p - self.p_start) / 5, self.p)

    def state_dict(self):
        return {"best": self.best, "now": self.now}

    def load_state_dict(self, state):
        self.best, self.now = state["best"], state["now"]


# SCHEDULES["while_it_learns"] = WhileItLearns
# -- end --


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "while_it_learns", WhileItLearns)


def run(folder, resume=None):
    model, tokenizer = build("bert", dropout=0.1)
    callback = TokenMaskCallback(TokenMaskConfig(schedule="while_it_learns", p=0.5), announce=False)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder), max_steps=8, per_device_train_batch_size=2, save_steps=4, logging_steps=1, learning_rate=1e-3,
            report_to="none", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=[{**tokenizer(text), "labels": i % 3} for i, text in enumerate(TEXTS)],
        processing_class=tokenizer,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [line["masking_rate"] for line in lines], [line["loss"] for line in lines], model.state_dict()


def test_the_rate_follows_the_loss_and_a_resume_ends_in_the_same_bytes(tmp_path):
    rates, losses, weights = run(tmp_path)
    lows = [loss < min(losses[:i], default=float("inf")) for i, loss in enumerate(losses)]
    assert rates == pytest.approx([min(0.1 * sum(lows[:i]), 0.5) for i in range(8)])
    assert rates[4] > 0
    resumed_rates, resumed_losses, resumed_weights = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert (resumed_rates, resumed_losses) == (rates, losses)  # the first four lines come from the checkpoint
    assert all(torch.equal(weight, resumed_weights[name]) for name, weight in weights.items())


def test_a_recipe_names_it():
    assert load_recipe("quickstart", ["masking.schedule=while_it_learns"]).masking.schedule == "while_it_learns"
    with pytest.raises(RecipeError) as refused:
        load_recipe("quickstart", ["masking.schedule=while_it_lerns"])
    (line,) = refused.value.problems
    assert "or 'while_it_learns'. Did you mean 'while_it_learns'?" in line

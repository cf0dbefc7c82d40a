"""Two views of each text: one loss however they are batched, and what each view sees."""

import pytest
import torch
import torch.nn.functional as F
from test_padding_free import adapted, texts_of
from tiny_models import build
from transformers import Trainer, TrainingArguments

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.errors import MaskTokenError
from tokmask_peft.masking.callback import TokenMaskCallback
from tokmask_peft.masking.schedule import SCHEDULES, Constant
from tokmask_peft.model.packed import enable_padding_free
from tokmask_peft.recipe import TokenMaskConfig
from tokmask_peft.tasks import get_task
from tokmask_peft.training.losses import ClassificationLoss
from tokmask_peft.training.trainer import OrderedEvalTrainer


def texts(task, tokenizer):
    ids = texts_of(tokenizer)
    if task == "sequence":
        return [{"input_ids": text, "labels": number % 3} for number, text in enumerate(ids)]
    return [{"input_ids": text, "labels": [-100, *(n % 3 for n in text[1:-1]), -100]} for text in ids]


def one_step(folder, task, *, packed=True, accumulation=1, family="bert", config=None, views=2, **more):
    """Train one step; return the gradients before it, the trainer, and the ids that each forward looked up."""
    model, tokenizer = build(family, task=task)
    if packed:
        enable_padding_free(model)
    rows = texts(task, tokenizer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        seed=3,
        disable_tqdm=True,
        max_grad_norm=0,
    )
    found = {}

    class Noting(TokenMaskCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            named = kwargs["model"].named_parameters()
            found.update({name: weight.grad.clone() for name, weight in named if weight.grad is not None})

    trainer = OrderedEvalTrainer(
        model=adapted(model, task),
        args=arguments,
        train_dataset=rows,
        compute_loss_func=ClassificationLoss(),
        data_collator=get_task(task).collator(tokenizer),
        train_collator=PackedCollator(task) if packed else None,
        processing_class=tokenizer,
        views=views,
        **more,
    )
    Noting(config or TokenMaskConfig(p=0.4), announce=False).add_to(trainer)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0]))
    trainer.train()
    return found, trainer, seen


def assert_close(found, expected):
    usual = torch.stack([gradient.norm() for gradient in expected.values()]).square().mean().sqrt()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * usual, name


@pytest.mark.parametrize("task", ["sequence", "token"])
@pytest.mark.parametrize("replace", ["token", "drop"])
def test_packed_is_padded(task, replace, tmp_path):
    config = TokenMaskConfig(p=0.4, replace=replace)
    packed, _, _ = one_step(tmp_path, task, config=config)
    padded, _, _ = one_step(tmp_path, task, config=config, packed=False)
    assert_close(packed, padded)


@pytest.mark.parametrize("views_masked", ["none", "one", "both"])
def test_what_each_view_sees(views_masked, tmp_path):
    _, trainer, seen = one_step(tmp_path, "sequence", packed=False, views_masked=views_masked)
    mask_id = trainer.processing_class.mask_token_id
    first, second = (seen[0] == mask_id).chunk(2)
    assert (bool(first.any()), bool(second.any())) == (views_masked == "both", views_masked != "none")
    assert not torch.equal(first, second) or views_masked == "none"


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_accumulation_changes_nothing(task, tmp_path):
    unmasked = {"views_masked": "none", "config": TokenMaskConfig(p=0.4)}  # positions depend on the micro-batch
    whole, _, _ = one_step(tmp_path, task, **unmasked)
    parts, _, _ = one_step(tmp_path, task, accumulation=2, **unmasked)
    assert_close(whole, parts)


def test_the_loss_is_the_mean_cross_entropy_plus_the_symmetric_divergence():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2] * 2)
    loss = ClassificationLoss()
    loss.consistency = 0.7
    p, q = logits.log_softmax(-1).chunk(2)
    divergence = (
        F.kl_div(p, q, log_target=True, reduction="sum") + F.kl_div(q, p, log_target=True, reduction="sum")
    ) / 2
    expected = F.cross_entropy(logits, labels) + 0.7 * divergence / 3
    torch.testing.assert_close(loss({"logits": logits}, labels, 6), expected)
    loss.seen = torch.tensor([True, False, False])
    one = ((p.exp() - q.exp()) * (p - q))[0].sum() / 2
    torch.testing.assert_close(loss({"logits": logits}, labels, 6), F.cross_entropy(logits, labels) + 0.7 * one / 3)


def test_words_that_a_view_cannot_see_need_not_agree(tmp_path, monkeypatch):
    config = TokenMaskConfig(p=0.4)
    asked, call = [], ClassificationLoss.__call__

    def noting(self, *args, **kwargs):
        asked.append(self.seen)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(ClassificationLoss, "__call__", noting)
    _, trainer, _ = one_step(tmp_path, "token", config=config)
    ids = [row["input_ids"] for row in trainer.train_dataset]
    hidden = (~asked[0]).sum()
    assert 0.2 < hidden / len(asked[0]) < 0.6  # at p = 0.4, the specials of short texts included
    assert len(asked[0]) == sum(map(len, ids))


def test_classes_are_masked_as_far_as_they_are_ready(tmp_path):
    """A row on a CPU is filled up with further texts, which have no label."""
    config = TokenMaskConfig(p=0.4, schedule="ready")
    found, trainer, _ = one_step(tmp_path, "sequence", config=config, views_masked="both")
    masking = next(each for each in trainer.callback_handler.callbacks if isinstance(each, TokenMaskCallback))
    assert found
    assert masking.schedule.class_scale() == [0.0, 0.0, 0.0]
    masking.schedule.rate(0.1)
    assert set(masking.schedule.class_scale()) == {0.5, 0.0}


def test_a_schedule_of_somebody_else_may_scale_classes_without_answers(tmp_path, monkeypatch):
    scale = [0.0, 0.0, 0.0]
    monkeypatch.setitem(SCHEDULES, "static", type("Static", (Constant,), {"class_scale": lambda self: scale}))
    for _ in range(2):
        _, trainer, seen = one_step(
            tmp_path, "sequence", config=TokenMaskConfig(p=0.4, schedule="static"), packed=False, views=1
        )
        assert (seen[0] == trainer.processing_class.mask_token_id).any() == any(scale)
        scale[:] = [1.0, 1.0, 1.0]
    masking = TokenMaskCallback(TokenMaskConfig(p=0.4, schedule="static"), announce=False)
    given = {"train_dataset": trainer.train_dataset, "processing_class": trainer.processing_class}
    plain = Trainer(trainer.model, trainer.args, callbacks=[masking], **given)
    with pytest.raises(MaskTokenError) as caught:
        plain.train()
    assert (caught.value.code, caught.value.fields["schedule"]) == ("no-answers", "static")

"""The head that starts from a linear probe on the frozen backbone (LP-FT: Kumar et al. 2022, arXiv:2202.10054).

Fine-tuning from a random head first bends the features towards random directions; logistic regression fits them as they
are. Not even the first steps answer one label for every text, and its score says what the backbone knows.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from numpy.typing import NDArray
from torch import nn

from tokmask_peft.console import Decision
from tokmask_peft.tasks import Task
from tokmask_peft.training.metrics import Predictions, task_scores
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split

STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # values of C that validation chooses from; features have a variance of 1
MOST = 20_000  # texts or words that the probe learns from: more take memory (31 MB for 384 features) and change little


def _last_layer(model: nn.Module, classes: int) -> tuple[nn.Module, str] | None:
    """Return the module that holds the head's last layer, and the layer's name in it, or None if it is not linear."""
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and "lora_" not in name}
    trained = [name for name, part in linear.items() if part.out_features == classes and part.weight.requires_grad]
    if not trained:
        return None
    parent, _, own = trained[-1].rpartition(".")
    return model.get_submodule(parent), own


def choose_head(wanted: str, model: nn.Module, classes: int) -> Decision:
    """Choose where the head starts, as `training.head` says, or at random if there can be no probe.

    Dense layers before the last one (XLM-R, DistilBERT, a BERT's pooler) stay as they are, and make the features.
    """
    if wanted == "probe":
        if classes < 2:
            return Decision("head", "random", "a probe needs two classes or more")
        if _last_layer(model, classes) is None:
            return Decision("head", "random", "the last layer of this head is not linear, so no probe can start it")
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return Decision("head", "random", "a probe needs whole weights, which FSDP shards")
    return Decision("head", wanted, "logistic regression on the frozen backbone's features")


def start_head(trainer: OrderedEvalTrainer, splits: Mapping[str, Split], seed: int) -> tuple[str, Predictions]:
    """Put a linear probe into the head of a model whose adapter has not learned yet. For all processes.

    Validation chooses the strength of the regularization, and the class weights are those of the run; if a text may
    have several labels there are none, and each label has a fit. Returns a line on what was done, and the predictions
    for test or, without one, validation.
    """
    labels, loss, task = splits["train"].labels, trainer.compute_loss_func, trainer.task
    parent, name = cast("tuple[nn.Module, str]", _last_layer(trainer.model, trainer.model.config.num_labels))
    layer: Any = getattr(parent, name)
    parent.add_module(name, nn.Identity())  # the model then puts out what the layer gets
    trainer.compute_loss_func = lambda outputs, *_, **__: outputs.logits.new_zeros(())
    try:
        features, gold = trainer.answers(_some(splits["train"].encoded.dataset, seed, task))
        unseen, unseen_gold = trainer.answers(splits["validation"].dataset)
    finally:
        parent.add_module(name, layer)
        trainer.compute_loss_func = loss
    tried = []
    for strength in STRENGTHS:
        weight, bias = probe(features, gold, strength, layer.out_features, layer.bias is not None, loss.weights)
        logits = unseen @ weight.T + bias
        cuts = task.fit_cuts(logits, ids := task.ids_of(unseen_gold))
        found = Predictions([ids], [task.choose(logits, cuts, len(labels))])
        tried.append((task_scores(task, found, labels)["f1_macro"], strength, weight, bias, cuts))
    score, strength, weight, bias, cuts = max(tried, key=lambda one: one[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    predictions, *_ = trainer.predict_windows(splits.get("test", splits["validation"]), cuts)
    # An evaluation wraps `forward` for autocast and marks the model as prepared; left like that, the training would
    # neither be in autocast nor, in several processes, share its gradients.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)
    line = f"The head starts from a linear probe: {score:.4f} macro-F1 on validation (C = {strength:g})."
    return line, predictions


def _some(dataset: Any, seed: int, task: Task) -> Any:
    """Return the texts that the probe learns from: all, or some, drawn at random, with `MOST` labels together."""
    counts = np.array([int(task.wanted(np.asarray(row)).sum()) for row in dataset["labels"]])
    order = np.random.default_rng([seed, 0x9E0B]).permutation(len(dataset))
    chosen = order[counts[order].cumsum() <= max(MOST, counts.max())]
    by_length = np.argsort(np.asarray(dataset["length"])[chosen], kind="stable")  # for little padding
    return dataset.select(chosen[by_length])


def probe(
    features: NDArray[Any], gold: NDArray[Any], strength: float, classes: int, with_bias: bool, weights: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit logistic regression with C = `strength`; return the weights, `[classes, features]`, and biases, `[classes]`.

    They are for features as they are: what standardised them is folded in. A layer without a bias gets features that
    are scaled only. A class that no item has is never the answer, if the layer has a bias. `gold` are label ids,
    `[items]`, or 1.0 or 0.0 for each label, `[items, labels]`, which then has a fit of its own. `weights` are those of
    classes.
    """
    from sklearn.linear_model import LogisticRegression

    if gold.ndim > 1:
        rows, biases = np.zeros((classes, features.shape[1])), np.zeros(classes)
        for label, yes in enumerate(gold.T[:classes] > 0.5):
            if yes.any() and not yes.all():
                pair, ends = probe(features, yes.astype(np.int64), strength, 2, with_bias)
                rows[label], biases[label] = pair[1] - pair[0], ends[1] - ends[0]
        return rows.astype(np.float32), biases.astype(np.float32)
    features = features.astype(np.float64)
    mean, scale = features.mean(0) * with_bias, features.std(0) + 1e-6
    by_item = None if weights is None else np.asarray(weights, dtype=np.float64)[gold]
    fitted = LogisticRegression(C=strength, fit_intercept=with_bias, max_iter=300, tol=3e-4)
    fitted.fit((features - mean) / scale, gold, sample_weight=by_item)
    coefficients, intercepts = fitted.coef_ / scale, np.broadcast_to(fitted.intercept_, len(fitted.coef_))
    if len(coefficients) == 1:  # one row of log odds for two classes
        coefficients, intercepts = np.vstack([-coefficients, coefficients]) / 2, np.array([-1, 1]) * intercepts / 2
    intercepts = intercepts - coefficients @ mean
    weight = np.zeros((classes, features.shape[1]))
    bias = np.full(classes, intercepts.min() - 10.0 if with_bias else 0.0)
    weight[fitted.classes_], bias[fitted.classes_] = coefficients, intercepts
    return weight.astype(np.float32), bias.astype(np.float32)

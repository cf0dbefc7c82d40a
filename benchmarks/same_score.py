"""Optimizer steps to the same score: the authors' protocol beside the default recipe, same backbone, same text.

    TOKMASK_DATA=FOLDER python benchmarks/same_score.py

TREC with MiniLM, at most `TEXTS` training texts, 32 texts a step for both, scored on the validation texts every
`EVERY` steps. The authors' protocol (github.com/Sean652039/Token-Masking, fad3fc1) is full fine-tuning with AdamW at
2e-5, weight decay 0.01, focal loss, a warm-up of ten times the run (its `steps // 0.1`), 2,000 epochs at most, every
position but special tokens masked with p = 0.1, and dropout that stays off after the first epoch. It is stopped at
`FACTOR` times the steps that the recipe needs: where it has not arrived by then, the ratio is a lower bound.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader
from transformers import set_seed
from workload import CPU, report

from tokmask_peft.data import PackedCollator, load_corpus
from tokmask_peft.data.encode import encode
from tokmask_peft.masking import TokenMaskConfig, TokenMasker
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.model.adapter import add_adapter
from tokmask_peft.model.backbone import load_backbone
from tokmask_peft.model.decisions import choose_precision
from tokmask_peft.model.padding_free import enable_padding_free
from tokmask_peft.recipe import Recipe
from tokmask_peft.training.losses import ClassificationLoss, class_weights

TEXTS, EVERY, TARGET, FACTOR, SEEDS = 1000, 10, 0.80, 12, (1, 2, 3)


def steps_to_target(recipe: Recipe, corpus: Any, authors: bool, limit: int) -> tuple[int | None, float]:
    """Train until validation macro-F1 reaches the target; return the steps, or none, and the best score seen."""
    set_seed(recipe.seed)
    # updates as small as the authors' would be lost in bf16 weights
    held_in = recipe.model.model_copy(update={"precision": "fp32"}) if authors else recipe.model
    backbone = load_backbone(held_in, "sequence", corpus.labels, CPU)
    enable_padding_free(backbone.model)
    model = backbone.model if authors else add_adapter(backbone, recipe.adapter, "sequence")[0]
    collate = PackedCollator("sequence")
    train, validation = (
        encode(part, backbone.tokenizer, "sequence", corpus.labels, recipe.data.max_length).dataset.select_columns(
            ["input_ids", "labels"]
        )
        for part in (corpus.train, corpus.validation)
    )
    loader = DataLoader(train, 32, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(0))
    held = DataLoader(validation, 128, collate_fn=collate)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rate = 2e-5 if authors else recipe.training.learning_rate
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    run = len(loader) * (2000 if authors else int(recipe.training.epochs))
    warm_up = 10 * run if authors else recipe.training.warmup * run
    counts = {label: sum(example.label == label for example in corpus.train) for label in corpus.labels}
    loss = ClassificationLoss(class_weights("sqrt_inverse", counts), gamma=1.0 if authors else 0.0)
    TokenMasker.attach(model, backbone.tokenizer, TokenMaskConfig(p=0.1), seed=recipe.seed)
    step, best, epoch = 0, 0.0, 0
    bf16 = choose_precision(recipe.model, CPU).choice == "bf16"
    while step < limit:
        for batch in loader:
            model.train(not (authors and epoch))  # dropout is off after the first epoch, masking goes on
            find_embedding(model).train()
            shrink = min(1.0, (step + 1) / warm_up) * (1.0 if authors else max(0.0, 1 - step / run))
            for group in optimizer.param_groups:
                group["lr"] = rate * shrink
            labels = batch.pop("labels")
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(**batch)
            loss(output, labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % EVERY == 0:
                best = max(best, score(model, held, bf16))
                if best >= TARGET:
                    return step, best
            if step >= limit:
                break
        epoch += 1
    return None, best


@torch.inference_mode()
def score(model: Any, held: DataLoader, bf16: bool) -> float:
    """Return validation macro-F1."""
    model.eval()
    gold, found = [], []
    for batch in held:
        gold += batch.pop("labels").tolist()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found += model(**batch).logits.argmax(-1).tolist()
    return float(f1_score(gold, found, average="macro"))


def main() -> None:
    """Measure, print the table and write the JSON."""
    folder = os.environ.get("TOKMASK_DATA")
    if not folder:
        print("same_score is left out: TOKMASK_DATA, the folder that holds trec6/, is not set")
        return
    own, theirs, best = [], [], []
    for seed in SEEDS:
        place = Path(folder) / "trec6"
        recipe = Recipe.load("trec/minilm", [f"data.path={place}", f"data.max_train={TEXTS}", f"seed={seed}"])
        corpus = load_corpus(recipe.data, seed)
        steps, reached = steps_to_target(recipe, corpus, False, 10_000)
        if steps is None:
            raise SystemExit(f"the recipe itself stays at {reached:.3f}, below {TARGET}")
        other, theirs_best = steps_to_target(recipe, corpus, True, FACTOR * steps)
        own.append(steps)
        theirs.append(other)
        best.append(theirs_best)
    bounds = [(FACTOR * a if b is None else b) / a for a, b in zip(own, theirs, strict=True)]
    missed = sum(b is None for b in theirs)
    note = f" ({missed} of {len(SEEDS)} not there yet: a lower bound)" if missed else ""
    rows = {
        f"steps to {TARGET} macro-F1, recipe": ([float(value) for value in own], ""),
        f"authors' steps over the recipe's{note}": (bounds, "10"),
        "authors' best macro-F1 until then": (best, ""),
    }
    result = {"target": TARGET, "texts": TEXTS, "recipe_steps": own, "authors_steps": theirs, "authors_best": best}
    report("same_score", result, rows)


if __name__ == "__main__":
    main()

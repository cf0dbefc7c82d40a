"""`tokmask diagnose`: what masking does to the gradients of the adapter, at several points of a training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokmask_peft.console import make_console
from tokmask_peft.errors import DataError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.embedding import find_embedding
from tokmask_peft.masking.masker import TokenMasker
from tokmask_peft.masking.replacement import MaskToken
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.diagnostics.estimates import MEANING, REPLICATES, Grams, summarise
from tokmask_peft.study.diagnostics.plans import LEAST_BATCHES, GradientPlan
from tokmask_peft.study.diagnostics.reports import gradient_report, make_folder
from tokmask_peft.study.report import Report
from tokmask_peft.training.environment import versions
from tokmask_peft.training.train import observe_training
from tokmask_peft.training.trainer import OrderedEvalTrainer

_COLUMNS = 2**20  # of gradients, at a time in double precision
_SEED = 0x6D617465  # apart from the seeds of runs, whose masks are others


def gram(vectors: Tensor) -> NDArray[np.float64]:
    """Return the inner products of the rows of `[rows, size]` in double precision."""
    found = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for part in vectors.split(_COLUMNS, dim=1):
        found += part.double() @ part.double().T
    return found.numpy()


@dataclass
class GradientMeter:
    """Measures gradients of a trainer's model on fixed batches with fixed mask draws, and changes nothing.

    The model is in eval mode, without dropout, except that it is masked. Draws are the same at each call, and what is
    masked at a low rate is masked at a higher one. Gradients are those of one forward, before clipping. In memory at a
    time are, in fp32 on the host, the gradients of the draws of a batch and four for each batch.
    """

    trainer: OrderedEvalTrainer  # provides model, loss, collator, precision and training texts
    texts: Sequence[Sequence[int]]  # [batches, texts], indices of training texts
    rates: Sequence[float]  # masking rates above 0
    draws: int  # mask draws per batch
    config: TokenMaskConfig  # pattern and protection; its rate and schedule are not used
    mask_token: MaskToken | None  # that of training; chosen here if the training masks nothing
    seed: int  # of the draws, added to one of their own

    def __post_init__(self) -> None:
        trained = [(name, value) for name, value in self.trainer.model.named_parameters() if value.requires_grad]
        # LoRA first, so that it and the rest (the head, a trained mask row) are slices
        trained.sort(key=lambda pair: "lora_" not in pair[0])
        self._parameters = [value for _, value in trained]
        size = sum(value.numel() for value in self._parameters)
        split = sum(value.numel() for name, value in trained if "lora_" in name)
        self._slices = {"all": slice(0, size), "lora": slice(0, split), "head": slice(split, size)}
        self.sizes = {group: part.stop - part.start for group, part in self._slices.items()}
        self.bytes = 4 * size * (self.draws + 1 + 4 * len(self.texts))

    def measure(self) -> dict[str, dict[float, Grams]]:
        """Return inner products by group of parameters and rate."""
        trainer, dataset = self.trainer, self.trainer.train_dataset
        found: dict[str, dict[float, Grams]] = {group: {} for group in self._slices}
        with self._measuring() as masker:
            keys = [key for key in ("input_ids", "token_type_ids", "words", "labels") if key in dataset.column_names]
            rows_of = [[{key: dataset[index][key] for key in keys} for index in chosen] for chosen in self.texts]
            batches = [trainer._prepare_inputs(trainer.train_collator(chosen)) for chosen in rows_of]
            with masker.paused():
                plain = [self._gradient(batch, masker) for batch in batches]
            for rate in sorted(self.rates):
                masker.rate = rate
                means, within = list[Tensor](), {group: list[NDArray[np.float64]]() for group in self._slices}
                for number, (batch, unmasked) in enumerate(zip(batches, plain, strict=True)):
                    rows = torch.empty(self.draws + 1, unmasked.numel())
                    for draw in range(self.draws):
                        masker.step = number * self.draws + draw
                        torch.sub(self._gradient(batch, masker), unmasked, out=rows[draw])
                    rows[-1] = unmasked
                    means.append(rows[:-1].mean(0))
                    for group, part in self._slices.items():
                        within[group].append(gram(rows[:, part]))
                vectors = torch.stack([*means, *plain])
                for group, part in self._slices.items():
                    found[group][rate] = Grams(np.stack(within[group]), gram(vectors[:, part]))
        return found

    def _gradient(self, batch: Mapping[str, Any], masker: TokenMasker) -> Tensor:
        """Return the gradient of the loss as one vector, fp32 on the host; `.grad` stays as it is."""
        inputs, masker.scale = dict(batch), None
        if masker.enabled:
            self.trainer.hide_labels(inputs, masker)
        with self.trainer.compute_loss_context_manager(), torch.enable_grad():
            loss = self.trainer.compute_loss(self.trainer.model, inputs)
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        pairs = zip(self._parameters, found, strict=True)
        return torch.cat([torch.zeros(of.numel()) if one is None else one.float().cpu().flatten() for of, one in pairs])

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[TokenMasker]:
        """Lend the masker of the training under way, or attach one if there is none; restore everything afterwards.

        The model is put into eval mode, except its embedding, which the masker hooks, and NEFTune's noise there is set
        to 0.
        """
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        modes, embedding = {module: module.training for module in model.modules()}, cast(Any, find_embedding(model))
        noise, masker = getattr(embedding, "neftune_noise_alpha", None), TokenMasker.of(embedding)
        before = masker and (masker.seed, masker.step, masker.rate)
        # The rate is set for each measurement; one above 0 lets the masker prepare the mask token's row.
        config = self.config.model_copy(update={"schedule": "constant", "p": 0.1, "seed": self.seed + _SEED})
        device = self.trainer.args.device
        drawn_on = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(drawn_on, enabled=noise is not None), contextlib.ExitStack() as attached:
            try:
                model.eval()
                embedding.training = True
                if noise is not None:
                    embedding.neftune_noise_alpha = 0.0
                lent = masker or attached.enter_context(
                    TokenMasker.attach(model, tokenizer, config, mask_token=self.mask_token, resumed=True)
                )
                lent.seed = self.seed + _SEED
                yield lent
            finally:
                if masker and before:
                    masker.seed, masker.step, masker.rate = before
                for module, mode in modes.items():
                    module.training = mode
                if noise is not None:
                    embedding.neftune_noise_alpha = noise


def diagnose(recipe: Recipe, plan: GradientPlan, *, quiet: bool = False) -> Report:
    """Train as the recipe says, stop at the shares of the plan to measure, and write the report."""
    make_folder(plan.folder)
    console = make_console(quiet)
    points: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}

    def observers(trainer: OrderedEvalTrainer, mask: MaskToken | None) -> list[TrainerCallback]:
        texts = draw_batches(
            len(trainer.train_dataset), plan.batches, trainer.args.per_device_train_batch_size, recipe.seed
        )
        meter = GradientMeter(trainer, texts, plan.rates, plan.draws, recipe.masking, mask, recipe.seed)
        sizes.update(meter.sizes)

        def measure(step: int, share: float) -> None:
            count = plan.batches * (1 + plan.draws * len(plan.rates))
            memory = f"{meter.bytes / 2**20:,.0f} MiB at a time"
            console.print(f"Measuring at step {step}: {count:,} gradients of {sizes['all']:,} values ({memory})")
            groups = {group: summarise(grams) for group, grams in meter.measure().items()}
            points.append({"share": share, "step": step, "groups": groups})

        return [_AtShares(plan.shares, measure)]

    decided = observe_training(recipe, plan.folder, observers, quiet=quiet)
    analysis = {
        "recipe": decided.model_dump(mode="json"),
        "rates": list(plan.rates),
        "draws": plan.draws,
        "batches": plan.batches,
        "batch_size": decided.training.micro_batch,
        "parameters": sizes,
        "points": points,
        "meaning": MEANING,
        "replicates": REPLICATES,
        "versions": versions(),
    }
    return gradient_report(analysis, plan.folder)


def draw_batches(texts: int, batches: int, size: int, seed: int) -> list[list[int]]:
    """Draw disjoint batches of training texts, as an epoch has them; DataError if there are too few texts."""
    if batches * size > texts:
        most = texts // size
        remedy = (f"--batches {most}, or " if most >= LEAST_BATCHES else "") + "training.batch_size="
        problem = f"{batches} batches of {size} texts need {batches * size}, but there are {texts} training texts"
        raise DataError(f"{problem}: {remedy}{max(texts // batches, 1)}", code="too-few-texts")
    order = np.random.default_rng([seed, 0xD1A6]).permutation(texts)[: batches * size]
    return list(order.reshape(batches, size).tolist())


class _AtShares(TrainerCallback):
    """Calls `measure(step, share)` before the steps at which a share of the training is done, and after the last."""

    def __init__(self, shares: Sequence[float], measure: Callable[[int, float], None]) -> None:
        self._shares, self._measure, self._due = shares, measure, dict[int, float]()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn shares into steps; of two that fall on one step the first counts."""
        for share in self._shares:
            self._due.setdefault(round(share * state.max_steps), share)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self._due:
            self._measure(state.global_step, self._due.pop(state.global_step))

    on_train_end = on_step_begin

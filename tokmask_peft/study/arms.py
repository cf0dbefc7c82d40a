"""Regularizers that masking is compared with: each a named set of recipe overrides, one factor at a time.

In a sweep with `--arms` every regularizer here is off unless the arm names it, so that arms differ by what they name.
The dropout of the backbone's hidden layers is no factor: it stays as the backbone has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokmask_peft.errors import nearest

OFF = {
    "adapter.dropout": "0.0",
    "model.attention_dropout": "0.0",
    "training.neftune_alpha": "null",
    "training.label_smoothing": "0.0",
}
"""The recipe keys of the regularizers, with the values that switch them off."""

REGULARIZERS = {
    "lora_dropout": ("adapter.dropout", "0.1"),
    "attention_dropout": ("model.attention_dropout", "0.1"),
    "neftune": ("training.neftune_alpha", "5"),
    "label_smoothing": ("training.label_smoothing", "0.1"),
}
"""Name -> recipe key and usual strength; an arm may name another, as `neftune:15`."""

MASK, NONE, AS_RECIPE = "mask", "none", "recipe"


@dataclass(frozen=True, slots=True)
class Arm:
    """What the runs of one line of the comparison share, but for the seed and the grid.

    Attributes:
        regularizers: `none`, or names joined by `+`; `recipe` where the recipe decides.
        p: masking rate, as it was written.
        overrides: `dotted.key=value`.
    """

    regularizers: str
    p: str
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name the arm as in a cell's name: `p0.1`, `none`, `mask0.1+neftune`."""
        rate, names = f"{float(self.p):g}", self.regularizers.replace(":", "")
        if names == AS_RECIPE:
            return f"p{rate}"
        if float(self.p) == 0:
            return names
        return f"{MASK}{rate}" + ("" if names == NONE else f"+{names}")


def masking_arms(rates: Sequence[str]) -> list[Arm]:
    """Return an arm per masking rate, everything else as the recipe has it."""
    return [Arm(AS_RECIPE, rate, (f"masking.p={rate}",)) for rate in rates]


def regularizer_arms(names: Sequence[str], rates: Sequence[str], batching: str, problems: list[str]) -> list[Arm]:
    """Return the arms of `--arms`; those with `mask` once per rate above 0.

    NEFTune scales its noise by the length of a padded batch, so an arm with it takes padded batches where the recipe
    has padding-free ones: the same texts in the same order.

    Args:
        names: as the user wrote them, for example `none`, `neftune:15`, `mask+label_smoothing`.
        rates: masking rates above 0.
        batching: the recipe's `training.batching`.
        problems: takes a line per name that is not known.
    """
    arms: list[Arm] = []
    for name in names:
        parts = name.split("+")
        settings = dict(OFF)
        shown: list[str] = []
        for part in parts:
            word, _, strength = part.partition(":")
            if word in REGULARIZERS and part.rstrip(":") == part:
                key, usual = REGULARIZERS[word]
                settings[key] = strength or usual
                shown.append(part)
            elif part not in (MASK, NONE) or (part == NONE and len(parts) > 1):
                known = (NONE, *REGULARIZERS, MASK)
                problems.append(
                    f"--arms: there is no arm '{name}'.{nearest(word, known)} "
                    f"Known: {', '.join(known)}, and combinations such as mask+neftune, with a strength as neftune:15"
                )
                break
        else:
            if settings["training.neftune_alpha"] != "null" and batching == "padding_free":
                settings["training.batching"] = "padded"
            overrides = tuple(f"{key}={value}" for key, value in settings.items())
            for rate in rates if MASK in parts else ["0"]:
                arms.append(Arm("+".join(shown) or NONE, rate, (*overrides, f"masking.p={rate}")))
    return arms

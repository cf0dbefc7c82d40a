"""How the masking rate moves over training. Your own schedule is a subclass of `Schedule`, named in `SCHEDULES`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar


class Schedule:
    """Gives the masking rate of every optimizer step; one object serves one training.

    It may react to the training through `observe`. All processes must come to the same rate: use no random numbers. A
    resumed training continues exactly if checkpoints fall on logged steps.

    Args:
        p: the rate to reach.
        p_start: the rate before `begin`.
        begin: share of training at which the rate leaves `p_start`.
        end: share of training at which the rate reaches `p`; None takes `usual_end`.
    """

    usual_end: ClassVar[float] = 1.0

    def __init__(self, p: float, p_start: float = 0.0, begin: float = 0.0, end: float | None = None) -> None:
        self.p, self.p_start, self.begin = p, p_start, begin
        self.end = self.usual_end if end is None else end

    @property
    def is_off(self) -> bool:
        """Whether the rate stays 0 throughout training."""
        return self.p == 0 and self.p_start == 0

    def rate(self, progress: float) -> float:
        """Return the masking rate (0 <= rate < 1) of the step that begins at `progress`, the share of training done."""
        raise NotImplementedError

    def observe(self, feedback: Mapping[str, Any]) -> None:
        """Take in a logged line: `loss`, `grad_norm` and so on; after an evaluation `eval_loss` and other scores."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in types that JSON has; it is saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class Constant(Schedule):
    """The rate is `p` from the first step to the last."""

    @property
    def is_off(self) -> bool:
        """Whether `p` is 0."""
        return self.p == 0

    def rate(self, progress: float) -> float:
        """Return `p`."""
        return self.p


class Linear(Schedule):
    """A straight line from `p_start` at `begin` to `p` at `end`; ValueError unless `end` is later."""

    def __init__(self, p: float, p_start: float = 0.0, begin: float = 0.0, end: float | None = None) -> None:
        super().__init__(p, p_start, begin, end)
        if self.end <= self.begin:
            raise ValueError(f"the rate must rise after it begins: begin is {self.begin}, end is {self.end}")

    def rate(self, progress: float) -> float:
        """Return the rate on the way from `p_start` to `p`; both ends are exact."""
        way = self.shape(min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0))
        return (1.0 - way) * self.p_start + way * self.p

    def shape(self, done: float) -> float:
        """Return the share of the way that is covered when `done` (0 to 1) of the time for it has passed."""
        return done


class Cosine(Linear):
    """Half a cosine wave from `p_start` at `begin` to `p` at `end`."""

    def shape(self, done: float) -> float:
        """Return the share of the way, slow at both ends."""
        return (1.0 - math.cos(math.pi * done)) / 2.0


class Warmup(Linear):
    """A straight line over the first tenth of training, unless `end` is given; `p` from then on."""

    usual_end = 0.1


SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "linear": Linear, "cosine": Cosine, "warmup": Warmup}
"""By the name in `masking.schedule`. Add one of your own before the recipe is read: `SCHEDULES["mine"] = Mine`."""

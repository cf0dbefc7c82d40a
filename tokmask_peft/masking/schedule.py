"""How the masking rate moves over training. Your own schedule is a subclass of `Schedule`, named in `SCHEDULES`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Answers:
    """The model's answers to training texts (or words) in one optimizer step, in unmasked and in masked texts.

    Each is [classes]: how many texts or words of the class there were, how many were right, and their summed loss.
    """

    clean: Sequence[float]
    clean_right: Sequence[float]
    clean_loss: Sequence[float]
    masked: Sequence[float]
    masked_right: Sequence[float]
    masked_loss: Sequence[float]


class Schedule:
    """Gives the masking rate of every optimizer step; one object serves one training.

    It may react to the training: to every step through `observe_step`, if it `reacts`, or to logged values through
    `observe`; a resumed training then continues exactly if checkpoints fall on logged steps. All processes must come to
    the same rate: use no random numbers.

    The rate leaves `p_start` at `begin` and reaches `p` at `end`, both shares of training; `target` is what a
    controller holds its statistic at. None takes `usual_end` and `usual_target`.
    """

    usual_end: ClassVar[float] = 1.0
    usual_target: ClassVar[float] = 0.0
    reacts: ClassVar[bool] = False

    def __init__(
        self, p: float, p_start: float = 0.0, begin: float = 0.0, end: float | None = None, target: float | None = None
    ) -> None:
        self.p, self.p_start, self.begin = p, p_start, begin
        self.end = self.usual_end if end is None else end
        self.target = self.usual_target if target is None else target

    @property
    def is_off(self) -> bool:
        """Whether the rate stays 0 throughout training."""
        return self.p == 0 and self.p_start == 0

    def rate(self, progress: float) -> float:
        """Return the masking rate (0 <= rate < 1) of the step that begins at `progress`, the share of training done."""
        raise NotImplementedError

    def observe(self, feedback: Mapping[str, Any]) -> None:
        """Take in a logged line: `loss`, `grad_norm` and so on; after an evaluation `eval_loss` and other scores."""

    def observe_step(self, seen: Answers) -> None:
        """Take in the answers of an optimizer step, over all processes."""

    def class_scale(self) -> list[float] | None:
        """Return what the rate is multiplied with in texts of each class, by label id; None for 1."""
        return None

    def statistics(self) -> dict[str, float]:
        """Return what the rate follows, by name, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, in types that JSON has; it is saved in every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class Constant(Schedule):
    """The rate is `p` from the first step to the last."""

    @property
    def is_off(self) -> bool:
        return self.p == 0

    def rate(self, progress: float) -> float:
        return self.p


class Linear(Schedule):
    """A straight line from `p_start` at `begin` to `p` at `end`; ValueError unless `end` is later."""

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        if self.end <= self.begin:
            raise ValueError(f"the rate must rise after it begins: begin is {self.begin}, end is {self.end}")

    def rate(self, progress: float) -> float:
        way = self.shape(min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0))
        return (1.0 - way) * self.p_start + way * self.p

    def shape(self, done: float) -> float:
        """Return the share of the way that is covered when `done` (0 to 1) of the time for it has passed."""
        return done


class Cosine(Linear):
    """Half a cosine wave from `p_start` at `begin` to `p` at `end`."""

    def shape(self, done: float) -> float:
        return (1.0 - math.cos(math.pi * done)) / 2.0


class Warmup(Linear):
    """A straight line over the first tenth of training, unless `end` is given; `p` from then on."""

    usual_end = 0.1


class Controller(Schedule):
    """A rate that reacts to the model's answers; it begins at `p_start` and stays between 0 and `p`.

    Statistics are exponential averages over about `MEMORY` steps, and are used after the first of them.
    """

    reacts = True
    MEMORY: ClassVar[int] = 8

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.state: dict[str, float] = {"rate": min(self.p_start, self.p), "progress": 0.0}

    @property
    def is_off(self) -> bool:
        return self.p == 0

    def rate(self, progress: float) -> float:
        self.move(progress - self.state["progress"])
        self.state["progress"] = progress
        return self.state["rate"]

    def move(self, done: float) -> None:
        """Change `state["rate"]` after another share `done` of training."""
        raise NotImplementedError

    def average(self, name: str, total: float, count: float) -> None:
        """Bring the mean of a step, `total / count`, into the average `name`; a step without any changes nothing."""
        if count > 0:
            mean, before = total / count, self.state.get(name)
            self.state[name] = mean if before is None else before + (mean - before) / self.MEMORY

    def statistics(self) -> dict[str, float]:
        return {name: value for name, value in self.state.items() if name not in ("rate", "progress")}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


class Overfit(Controller):
    """Rises while unmasked texts are answered better than `target` (0.9), and falls otherwise.

    The rule of StyleGAN2-ADA (Karras et al. 2020): the rate moves at a constant speed, from 0 to `p` in a fifth of
    training. Needs `masking.share` below 1.
    """

    usual_target = 0.9

    def observe_step(self, seen: Answers) -> None:
        self.average("accuracy", sum(seen.clean_right), sum(seen.clean))

    def move(self, done: float) -> None:
        if (accuracy := self.state.get("accuracy")) is not None:
            way = math.copysign(self.p * done / 0.2, accuracy - self.target) if accuracy != self.target else 0.0
            self.state["rate"] = min(max(self.state["rate"] + way, 0.0), self.p)


class Gap(Controller):
    """Keeps the loss of masked texts a share `target` (0.25) above that of unmasked ones.

    The rate grows or shrinks in proportion to the distance from the target, tenfold at the most in a fifth of training,
    and is never below a tenth of `p`. Needs `masking.share` below 1.
    """

    usual_target = 0.25

    def observe_step(self, seen: Answers) -> None:
        self.average("clean", sum(seen.clean_loss), sum(seen.clean))
        self.average("masked", sum(seen.masked_loss), sum(seen.masked))

    def move(self, done: float) -> None:
        rate = max(self.state["rate"], self.p / 10)
        if "clean" in self.state and "masked" in self.state:
            gap = self.state["masked"] / max(self.state["clean"], 1e-6) - 1.0
            rate *= 10.0 ** (min(max((self.target - gap) / self.target, -1.0), 1.0) * done / 0.2)
        self.state["rate"] = min(max(rate, self.p / 10), self.p)


class Ready(Controller):
    """Masks a class as far as the model still answers its masked texts right in a share `target` (0.6) of cases.

    Every class has a level between 0 and 1, which rises or falls as in CUDA (Ahn et al. 2023), from 0 to 1 in a fifth
    of training; its texts are masked at `p` times its level. For tasks with one label a text.
    """

    usual_target = 0.6

    def observe_step(self, seen: Answers) -> None:
        for label, (count, right) in enumerate(zip(seen.masked, seen.masked_right, strict=True)):
            self.average(f"accuracy {label}", right, count)
            self.state.setdefault(f"level {label}", 0.0)

    def move(self, done: float) -> None:
        self.state["rate"] = self.p
        for name in [name for name in self.state if name.startswith("level ")]:
            accuracy = self.state.get(f"accuracy {name.removeprefix('level ')}")
            up = accuracy is None or accuracy >= self.target
            self.state[name] = min(max(self.state[name] + (done if up else -done) / 0.2, 0.0), 1.0)

    def class_scale(self) -> list[float] | None:
        levels = sum(name.startswith("level ") for name in self.state)  # a checkpoint may hold them in another order
        return [self.state[f"level {label}"] for label in range(levels)] or None


SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "linear": Linear, "cosine": Cosine, "warmup": Warmup}
SCHEDULES |= {"overfit": Overfit, "gap": Gap, "ready": Ready}
"""By the name in `masking.schedule`. Add one of your own before the recipe is read: `SCHEDULES["mine"] = Mine`."""

"""The section `masking` of a recipe: how tokens are masked in training. Imports neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from tokmask_peft.errors import nearest
from tokmask_peft.masking.replacement import REPLACEMENTS
from tokmask_peft.masking.schedule import SCHEDULES, Schedule

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
TokenId = Annotated[int, Field(ge=0, title="a token id")]


@dataclass(frozen=True, eq=False)
class NameIn:
    """Restricts a text field to the names of a registry, which may grow: `Annotated[str, NameIn(SCHEDULES)]`."""

    registry: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.registry:
            known = ", ".join(self.registry)
            context = {"name": name, "known": known, "guess": nearest(name, self.registry)}
            raise PydanticCustomError("unknown_name", "there is no '{name}'.{guess} Known: {known}", context)
        return name


class Section(BaseModel):
    """Base of every part of a recipe: immutable, no unknown keys, and no true or false in place of a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes_a_switch(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("switch", "true or false does not fit here")  # Python would take them as 1 and 0
        return value


def _takes_a_switch(annotation: Any) -> bool:
    return annotation is bool or any(_takes_a_switch(part) for part in get_args(annotation))


class TokenMaskConfig(Section):
    """How input tokens are masked in training (arXiv 2505.11746).

    The rate goes from `p_start` to `p` between the shares `begin` and `end` of training (`constant` stays at `p`).
    """

    p: Rate = Field(0.1, description="masking rate: the share of tokens that are masked in training; 0 is off")
    schedule: Annotated[str, NameIn(SCHEDULES)] = Field(
        "constant",
        description="how the rate moves; warmup is a linear rise over the first tenth unless `end` is set; overfit, "
        "gap and ready react to the training, with p as the highest rate",
    )
    p_start: Rate = Field(0.0, description="the rate before `begin` (linear, cosine, warmup)")
    begin: Share = Field(0.0, description="share of training at which the rate leaves p_start")
    end: Share | None = Field(None, description="share of training at which the rate reaches p (default 1, warmup 0.1)")
    target: float | None = Field(
        None,
        gt=0,
        description="what a schedule that reacts aims at: overfit: this accuracy on unmasked texts (default 0.9); gap: "
        "a loss of masked texts higher by this share (0.25); ready: this accuracy on a class's masked texts (0.6)",
    )
    share: Share = Field(1.0, gt=0, description="share of the texts that are masked at all; the others stay whole")
    per_text: Literal["fixed", "uniform"] = Field(
        "fixed", description="uniform: each text draws a rate of its own, from 0 to twice the rate"
    )
    unit: Literal["token", "word", "span", "continuation"] = Field(
        "token",
        description="what is masked as a whole: a sub-token, a word, or span_length consecutive words; continuation: "
        "only sub-tokens that do not begin a word, so that no word is hidden whole",
    )
    span_length: int = Field(3, ge=1, description="words in a span (unit: span)")
    replace: Annotated[str, NameIn(REPLACEMENTS)] = Field(
        "token",
        description="what happens to a masked token: token: it becomes the mask token; random: it becomes another "
        "token of the vocabulary; drop: it leaves the text, and the others keep their positions",
    )
    where: Literal["all", "prompt", "completion"] = Field(
        "all",
        description="language models: which tokens may be masked: all; prompt: those with the label -100; completion: "
        "the others. In an encoder-decoder model the whole input of the encoder is prompt",
    )
    decoder_p: Rate = Field(
        0.0, description="encoder-decoder models that generate: masking rate of the decoder's input; labels stay"
    )
    score_masked: StrictBool = Field(
        True,
        description="whether words whose labelled sub-token is masked (any, with data.label_on: mean) count in the "
        "loss; dropped ones never do",
    )
    mask_token: Literal["auto", "mask", "spare", "unk"] | TokenId = Field(
        "auto",
        description="auto: the tokenizer's mask token if its embedding row was trained; otherwise the unknown token, "
        "on the same condition; otherwise a spare embedding row. mask, unk and spare choose one of these",
    )
    trainable_mask: StrictBool = Field(False, description="train the mask token's embedding row (saved in the adapter)")
    protect: tuple[TokenId, ...] = Field((), description="further token ids that are never masked")
    seed: int | None = Field(None, ge=0, description="seed of the masked positions; null takes the run's seed")

    @model_validator(mode="after")
    def _makes_a_schedule(self) -> Self:
        self.make_schedule()
        if self.per_text == "uniform" and max(self.p, self.p_start, self.decoder_p) > 0.5:
            raise ValueError("per_text: uniform draws up to twice the rate, so p, p_start and decoder_p end at 0.5")
        if self.schedule in ("overfit", "gap") and self.share == 1.0:
            raise ValueError(f"schedule: {self.schedule} compares masked texts with unmasked ones: set share below 1")
        return self

    def make_schedule(self) -> Schedule:
        """Return a new schedule, at the start of its training."""
        return SCHEDULES[self.schedule](self.p, self.p_start, self.begin, self.end, self.target)

    @property
    def is_off(self) -> bool:
        """Whether nothing is masked at any time of training."""
        return self.make_schedule().is_off and self.decoder_p == 0

    @property
    def rates(self) -> str:
        """The rates of a whole training in short: `p = 0.1`, or `p ≤ 0.2 (linear)` if they move."""
        if self.schedule == "constant":
            return f"p = {self.p:g}"
        highest = self.p if self.make_schedule().reacts else max(self.p, self.p_start)
        return f"p ≤ {highest:g} ({self.schedule})"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `tokmask_config.json` into `folder` and return its path."""
        path = Path(folder) / "tokmask_config.json"
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `tokmask_config.json` from `folder`; FileNotFoundError or pydantic.ValidationError if that fails."""
        return cls.model_validate_json((Path(folder) / "tokmask_config.json").read_text(encoding="utf-8"))

"""The section `masking`: how tokens are masked in training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _takes_a_switch(annotation: Any) -> bool:
    return annotation is bool or any(_takes_a_switch(part) for part in get_args(annotation))


class Section(BaseModel):
    """Base of every part of a recipe: immutable, no unknown keys, and no true or false where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _switches_only_where_they_belong(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes_a_switch(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("switch", "true or false does not fit here")  # Python would take them as 1 and 0
        return value


TokenId = Annotated[int, Field(ge=0, title="a token id")]


class TokenMaskConfig(Section):
    """How input tokens are masked in training (arXiv 2505.11746).

    The rate runs from `p_start` to `p` between the shares `begin` and `end` of training (`constant` stays at `p`).
    """

    p: Rate = Field(
        0.1, description="masking rate: the share of tokens replaced by the mask token in training; 0 is off"
    )
    schedule: Literal["constant", "linear", "cosine", "warmup"] = Field(
        "constant",
        description="how the rate moves: warmup is a linear rise over the first tenth unless `end` says else",
    )
    p_start: Rate = Field(0.0, description="the rate before `begin` (linear, cosine, warmup)")
    begin: Share = Field(0.0, description="share of training at which the rate leaves p_start")
    end: Share | None = Field(None, description="share of training at which the rate reaches p (default 1, warmup 0.1)")
    unit: Literal["token", "word", "span"] = Field(
        "token", description="what is masked as a whole: a sub-token, a word, or span_length words in a row"
    )
    span_length: int = Field(3, ge=1, description="words in a span (unit: span)")
    mask_token: Literal["auto", "mask", "spare", "unk"] | TokenId = Field(
        "auto",
        description="auto takes the tokenizer's mask token, else a spare embedding row set to the mean embedding, "
        "else the unknown token; or name one; or give a token id",
    )
    trainable_mask: StrictBool = Field(False, description="train the mask token's embedding row (saved in the adapter)")
    protect: tuple[TokenId, ...] = Field((), description="further token ids that are never masked")
    seed: int | None = Field(None, ge=0, description="seed of the masked positions; null takes the run's seed")

    @model_validator(mode="after")
    def _schedule_moves_forward(self) -> Self:
        if self.schedule != "constant" and self.ramp_end <= self.begin:
            raise ValueError(f"the rate must rise after it begins: begin is {self.begin}, end is {self.ramp_end}")
        return self

    @property
    def is_off(self) -> bool:
        """Whether nothing is masked at any time of training."""
        return self.p == 0 and (self.schedule == "constant" or self.p_start == 0)

    @property
    def ramp_end(self) -> float:
        """Share of training at which the rate reaches `p`."""
        if self.end is not None:
            return self.end
        return 0.1 if self.schedule == "warmup" else 1.0

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `tokmask_config.json` into `folder` and return its path."""
        path = Path(folder) / "tokmask_config.json"
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `tokmask_config.json` from `folder`.

        Raises:
            FileNotFoundError: the folder holds none, so it was not written by this package.
        """
        return cls.model_validate_json((Path(folder) / "tokmask_config.json").read_text(encoding="utf-8"))

"""What every section of a recipe shares: frozen, no unknown keys, and the types of several sections' fields."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
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

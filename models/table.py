"""The base of every table of a configuration document: a plan's, and an organisation's policy."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

__all__ = ["Table"]


class Table(BaseModel):
    """A table: nothing unknown, nothing infinite, and true is not the number 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            kinds = _members(cls.model_fields[str(info.field_name)].annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


def _members(annotation: Any) -> set[Any]:
    """The types of a union; the type itself where it is none."""
    return set(get_args(annotation)) or {annotation}

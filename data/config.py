"""The table of a plan that says which records are used, and what for. No module that this one imports loads PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TaskName = Literal["sequence-classification", "token-classification", "image-classification"]
_WITHOUT_CLASSES: frozenset[str] = frozenset()


def has_classes(task: str) -> bool:
    """Whether a task's records have classes, of which a plan lists the names (`labels`)."""
    return task not in _WITHOUT_CLASSES


class DataConfig(BaseModel):
    """Where an organization's records are, and which of their columns are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        min_length=1,
        description="a file, a folder with one file per organization, or package:NAME for data in a Python package",
    )
    text: str = Field(default="text", min_length=1, description="the column that holds the text, or the words of one")
    image: str = Field(default="image", min_length=1, description="the column that holds an image: its path, or (Parquet) bytes")
    label: str = Field(default="label", min_length=1, description="the column that holds the label, or the tag of each word")
    unit: str | None = Field(
        default=None,
        min_length=1,
        description="the column that says whose a record is; default: called like privacy.unit",
    )
    encoding: str = Field(default="utf-8", description="of a CSV, TSV or JSON file, such as utf-8, latin-1 or utf-16")
    deduplicate: bool = Field(
        default=False, description="of records with the same input keep the first, or none if their labels differ"
    )

    def without_units(self) -> DataConfig:
        """For records of which nobody need say whose they are, such as a coordinator's test set."""
        return self.model_copy(update={"unit": None})

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "a".encode(value)
        except (LookupError, ValueError) as error:
            raise ValueError(f"{value!r} is not a text encoding: expected one such as utf-8 or latin-1") from error
        return value

    @model_validator(mode="after")
    def _different_columns(self) -> DataConfig:
        for key, other in (("text", "label"), ("image", "label"), ("unit", "label"), ("unit", "text"), ("unit", "image")):
            if getattr(self, key) == getattr(self, other):
                raise ValueError(f"{key} and {other} are both {getattr(self, key)!r}: expected two different columns")
        return self

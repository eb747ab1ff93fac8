"""The table of a plan that says what each organization keeps to itself: `[personal]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from cotune.models.config import TrainMode
from cotune.storage.config_table import ConfigTable

Part = Literal["head", "norm"]


class PersonalConfig(ConfigTable):
    """What each organization trains and keeps to itself (the `personal` table; `personal = ["head"]` for short)."""

    parts: tuple[Part, ...] = Field(
        (),
        description="head (FedPer, Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818), norm (the normalization layers of"
        " the encoder, as FedBN has it: Li et al., ICLR 2021, https://arxiv.org/abs/2102.07623): trained with the shared part"
        " in the same steps, under one clip norm and one ε",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, table: Any) -> Any:
        """`personal = ["head"]` names the parts."""
        return table if isinstance(table, Mapping | PersonalConfig) else {"parts": table}

    @property
    def any(self) -> bool:
        """Whether anything is kept."""
        return bool(self.parts)

    def find_problems(self, modes: tuple[TrainMode, ...]) -> Iterator[str]:
        """Yield why stages of these modes cannot keep the parts, in words."""
        if len(set(self.parts)) < len(self.parts):
            yield f"personal.parts names a part twice: {list(self.parts)}"
        if "head" in self.parts and "head" in modes:
            yield 'personal.parts has "head", and a stage trains the head alone, so that nothing would be shared'
        if "norm" in self.parts and "head" in modes:
            yield 'personal.parts has "norm", and a stage with train = head leaves the encoder with its norms as it came'


_PARTS: dict[Part, str] = {"head": "the head", "norm": "the normalization layers"}


def describe_parts(personal: PersonalConfig) -> str:
    """Return what is kept, in words."""
    return " and ".join(_PARTS[part] for part in personal.parts)


def _verb(personal: PersonalConfig) -> str:
    return "stays" if personal.parts == ("head",) else "stay"


def explain(personal: PersonalConfig, *, private: bool) -> str | None:
    """Return what stays with each organization and whether it gets noise, in one sentence; None where everything is shared.

    Args:
        private: Whether the plan has record-level privacy.
    """
    if not personal.any:
        return None
    stays = f"personal: {describe_parts(personal)} {_verb(personal)} with each organization"
    if not private:
        return f"{stays}, trained without noise as all else"
    return f"{stays}, trained with noise in the same steps and under the same ε as what is shared, whose gradients follow from it"

"""The table of a plan that says what each organization keeps to itself: `[personal]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from cotune.models.config import TrainMode
from cotune.storage.config_table import ConfigTable

Part = Literal["head", "norm"]


class PersonalConfig(ConfigTable):
    """What each organization trains and keeps to itself (the `personal` table; `personal = ["head"]` or "ditto" for short)."""

    parts: tuple[Part, ...] = Field(
        (),
        description="head (FedPer, Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818), norm (the normalization layers of"
        " the encoder, as FedBN has it: Li et al., ICLR 2021, https://arxiv.org/abs/2102.07623): trained with the shared part"
        " in the same steps, under one clip norm and one ε",
    )
    method: Literal["parts", "ditto"] = Field(
        "parts",
        description="ditto: instead of parts, a copy of all that is trained, pulled toward the shared model that came (Li et al.,"
        " ICML 2021, https://arxiv.org/abs/2012.04221, algorithm 1); it takes as many steps again, after those of the shared"
        " model, which never reads it",
    )
    pull: float = Field(0.1, ge=0, le=1e3, description="λ of ditto, per step; local.learning_rate · pull must stay below 2")
    noise: bool = Field(
        True,
        description="of ditto: whether the steps of the copy have noise and are charged, too; false where the organization's"
        " policy says that neither the copy nor what it predicts leaves (training.personal_without_noise)",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, table: Any) -> Any:
        """`personal = ["head"]` names the parts, `personal = "ditto"` the method."""
        if isinstance(table, str):
            return {"method": table}
        return table if isinstance(table, Mapping | PersonalConfig) else {"parts": table}

    @property
    def any(self) -> bool:
        """Whether anything is kept."""
        return bool(self.parts) or self.keeps_copy

    @property
    def keeps_copy(self) -> bool:
        """Whether it is a copy, beside a common model that never reads it."""
        return self.method == "ditto"

    def find_problems(self, modes: tuple[TrainMode, ...]) -> Iterator[str]:
        """Yield why stages of these modes cannot keep this, in words."""
        if len(set(self.parts)) < len(self.parts):
            yield f"personal.parts names a part twice: {list(self.parts)}: expected each once"
        if "head" in self.parts and "head" in modes:
            yield (
                'personal.parts has "head", and a stage trains the head alone, so that nothing would be shared: expected train ='
                " lora or full in all rounds"
            )
        if "norm" in self.parts and "head" in modes:
            yield (
                'personal.parts has "norm", and a stage with train = head leaves the encoder with its norms as it came: expected'
                " train = lora or full in all rounds"
            )
        if self.keeps_copy and self.parts:
            yield f'personal.method = "{self.method}" keeps a copy of all that is trained: expected no personal.parts'
        after = modes[next((i for i, mode in enumerate(modes) if mode != "head"), len(modes)) :]
        if self.keeps_copy and "head" in after:
            yield (
                f'personal.method = "{self.method}" has an encoder of its own after a stage that trains it, and a stage with'
                " train = head computes the features of one encoder: expected such stages first"
            )


_PARTS: dict[Part, str] = {"head": "the head", "norm": "the normalization layers"}


def describe_parts(personal: PersonalConfig) -> str:
    """Return what is kept, in words."""
    if personal.keeps_copy:
        return "an own copy of all that is trained"
    return " and ".join(_PARTS[part] for part in personal.parts)


def explain(personal: PersonalConfig, *, private: bool) -> str | None:
    """Return what stays with each organization and whether it gets noise, in one sentence; None where everything is shared.

    Args:
        private: Whether the plan has record-level privacy.
    """
    if not personal.any:
        return None
    verb = "stay" if "norm" in personal.parts else "stays"
    stays = f"personal: {describe_parts(personal)} {verb} with each organization"
    if not private:
        return f"{stays}, trained without noise as all else"
    if not personal.keeps_copy:
        return f"{stays}, with noise in the same steps and under the same ε as what is shared, whose gradients follow from it"
    if personal.noise:
        return (
            f"{stays}, with noise in as many steps again, which are charged to the same ε: the copy and what it tells may leave"
        )
    return f"{stays}, without noise and without ε, as the shared model never reads it: neither it nor what it tells may leave"

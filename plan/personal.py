"""The `[personal]` table of a plan: what each organization trains and keeps to itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from cotune.models.config import TrainMode
from cotune.storage.config_table import ConfigTable

Part = Literal["head", "norm", "adapter"]


class PersonalConfig(ConfigTable):
    """What each organization trains and keeps to itself (the `personal` table; `personal = ["head"]` or "ditto" for short)."""

    parts: tuple[Part, ...] = Field(
        (),
        description="head (FedPer, Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818), norm (the normalization layers of"
        " the encoder, as FedBN has it: Li et al., ICLR 2021, https://arxiv.org/abs/2102.07623), adapter (an own LoRA beside the"
        " shared one): trained with the shared part in the same steps, under one clip norm and one ε",
    )
    order: Literal["together", "own_first"] = Field(
        "together",
        description="with parts: whether each step trains personal and shared parameters together, or each round trains "
        "the personal parts first and the shared ones afterwards (FedRep, Collins et al., ICML 2021, "
        "https://arxiv.org/abs/2102.07078, algorithm 1)",
    )
    own_steps: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="with own_first: steps of a round on the personal parts; default: as many as on the shared ones",
    )
    method: Literal["parts", "ditto", "pfedme"] = Field(
        "parts",
        description="instead of parts, a copy of all that is trained. ditto: pulled toward the received shared model (Li et al.,"
        " ICML 2021, https://arxiv.org/abs/2012.04221, algorithm 1), in as many steps again, after those of the shared"
        " model, which never reads it; pfedme: pulled toward the shared model, which follows it (T. Dinh et al., NeurIPS 2020,"
        " https://arxiv.org/abs/2006.08848, algorithm 1)",
    )
    pull: float = Field(
        0.1, ge=0, le=1e3, description="λ of ditto and pfedme, per step; local.learning_rate · pull must stay below 2"
    )
    inner_steps: int = Field(
        5, ge=1, le=100_000, description="K of pfedme: steps of the copy between two moves of the shared model"
    )
    move: float = Field(
        0.5,
        gt=0,
        le=1,
        description="ηλ of pfedme: the fraction of its distance to the copy by which the shared model moves each time",
    )
    noise: bool = Field(
        True,
        description="of ditto: whether the steps of the copy have noise and are charged, too; false where the organization's"
        " policy says that neither the copy nor what it predicts leaves (training.personal_without_noise)",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, table: Any) -> Any:
        """Expand the short forms: `personal = ["head"]` names the parts, `personal = "ditto"` the method."""
        if isinstance(table, str):
            return {"method": table}
        return table if isinstance(table, Mapping | PersonalConfig) else {"parts": table}

    @property
    def any(self) -> bool:
        """Whether organizations keep anything."""
        return bool(self.parts) or self.keeps_copy

    @property
    def keeps_copy(self) -> bool:
        """Whether organizations keep a copy of all trained parameters, beside a common model."""
        return self.method != "parts"

    @property
    def read_by_shared(self) -> bool:
        """Whether shared parameters depend on personal ones, which then need noise, too."""
        return bool(self.parts) or self.method == "pfedme"

    def count_own_steps(self, steps: int) -> int:
        """Return how many steps of a round train only personal parameters, besides `steps` for the shared ones."""
        if self.order == "own_first":
            return self.own_steps or steps
        return steps if self.method == "ditto" else 0

    def count_charged_steps(self, steps: int) -> int:
        """Return how many steps of a round are noised and charged."""
        return steps + (self.count_own_steps(steps) if self.noise or self.read_by_shared else 0)

    def find_problems(self, modes: tuple[TrainMode, ...]) -> Iterator[str]:
        """Yield, in words, why this is not possible with stages of these modes."""
        if len(set(self.parts)) < len(self.parts):
            yield f"personal.parts names a part twice: {list(self.parts)}: expected each once"
        yield from self._wrong_parts(modes)
        if self.keeps_copy and self.parts:
            yield f'personal.method = "{self.method}" keeps a copy of all that is trained: expected no personal.parts'
        if self.order == "own_first" and not self.parts:
            yield 'personal.order = "own_first" is for parts, which are trained before what is shared: expected personal.parts'
        if self.own_steps is not None and self.order != "own_first":
            yield f'personal.own_steps = {self.own_steps} is for personal.order = "own_first": leave it out'
        yield from self._wrong_stages(modes)

    def _wrong_parts(self, modes: tuple[TrainMode, ...]) -> Iterator[str]:
        if "head" in self.parts and "head" in modes:
            yield (
                'personal.parts has "head", and a stage trains the head alone, so that nothing would be shared: expected train ='
                " lora, blocks or full in all rounds"
            )
        if "norm" in self.parts and "head" in modes:
            yield (
                'personal.parts has "norm", and a stage with train = head leaves the encoder and its norms unchanged: expected'
                " train = lora, blocks or full in all rounds"
            )
        if "adapter" in self.parts and any(mode != "lora" for mode in modes):
            yield 'personal.parts has "adapter", which stands beside a shared one: expected train = lora in all rounds'

    def _wrong_stages(self, modes: tuple[TrainMode, ...]) -> Iterator[str]:
        after = modes[next((i for i, mode in enumerate(modes) if mode != "head"), len(modes)) :]
        if self.keeps_copy and "head" in after:
            yield (
                f'personal.method = "{self.method}" has an encoder of its own after a stage that trains it, and a stage with'
                " train = head computes the features of one encoder: expected such stages first"
            )


_PARTS: dict[Part, str] = {
    "head": "the head",
    "norm": "the normalization layers",
    "adapter": "an own adapter beside the shared one",
}


def describe_parts(personal: PersonalConfig) -> str:
    """Return what organizations keep, in words."""
    if personal.keeps_copy:
        return "an own copy of all that is trained"
    return " and ".join(_PARTS[part] for part in personal.parts)


def explain(personal: PersonalConfig, *, private: bool) -> str | None:
    """Return one sentence about what stays with each organization and whether it is noised; None if everything is shared.

    Args:
        personal: The plan's table.
        private: Whether the plan has record-level privacy.
    """
    if not personal.any:
        return None
    verb = "stay" if "norm" in personal.parts or len(personal.parts) > 1 else "stays"
    stays = f"personal: {describe_parts(personal)} {verb} with each organization"
    if not private:
        return f"{stays}, trained without noise as all else"
    if personal.method == "pfedme":
        return f"{stays}, with noise in every step, as the shared model follows it: one ε for both, and the copy may leave"
    if personal.order == "own_first":
        return (
            f"{stays}, with noise in steps of its own before those of what is shared, whose gradients follow from it; all are"
            " charged to the same ε"
        )
    if not personal.keeps_copy:
        return f"{stays}, with noise in the same steps and under the same ε as what is shared, whose gradients follow from it"
    if personal.noise:
        return (
            f"{stays}, with noise in as many steps again, which are charged to the same ε: the copy and what it discloses may"
            " leave"
        )
    return f"{stays}, without noise and without ε, as the shared model never reads it: neither it nor what it discloses may leave"

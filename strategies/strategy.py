"""The strategy of a plan: names and parameters of its three parts, checked against the parts' own signatures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cotune.models.errors import nearest
from cotune.strategies.combination import Combination, Held, Streamed
from cotune.strategies.fusion import FUSIONS, Fusion
from cotune.strategies.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer
from cotune.strategies.updates import Update
from cotune.strategies.weighting import JOINT_WEIGHTINGS, WEIGHTINGS

__all__ = ["Part", "StrategyConfig"]


class Part(BaseModel):
    """A part of a strategy: its name and its parameters, as in `{ name = "sgd", lr = 0.5 }`, or the name alone."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _checked(part: Any, kind: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    table = {"name": part} if isinstance(part, str) else dict(part) if isinstance(part, Mapping) else part
    if not isinstance(table, dict | Part):
        raise ValueError(f"expected the name of a {kind}, or a table with its name and parameters, got {table!r}")
    name = str(table.name if isinstance(table, Part) else table.get("name"))
    if name not in known:
        raise ValueError(f'unknown {kind} "{name}"{nearest(name, known)}')
    given = table.parameters if isinstance(table, Part) else {k: v for k, v in table.items() if k != "name"}
    accepted = inspect.signature(known[name]).parameters if given else {}
    for key, value in given.items():
        if key not in accepted:
            raise ValueError(f'{kind} "{name}" has no parameter "{key}"{nearest(key, accepted)}')
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f'{kind} "{name}": expected a number for {key}, got {value!r}')
    return table


class StrategyConfig(BaseModel):
    """weighting → fusion → server optimiser (the `strategy` table of a plan); the default is FedAvg on deltas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weighting: Part = Field(Part(name="examples"), description="who counts how much")
    fusion: Part = Field(Part(name="mean"), description="how the deltas become one")
    server_optimizer: Part = Field(Part(name="sgd"), description="how the one delta moves the model")

    @field_validator("weighting", mode="before")
    @classmethod
    def _weighting(cls, part: Any) -> Any:
        table = _checked(part, "weighting", {**WEIGHTINGS, **JOINT_WEIGHTINGS})
        if table.parameters if isinstance(table, Part) else len(table) > 1:
            raise ValueError("a weighting takes no parameters")
        return table

    @field_validator("fusion", mode="before")
    @classmethod
    def _fusion(cls, part: Any) -> Any:
        return _checked(part, "fusion", FUSIONS)

    @field_validator("server_optimizer", mode="before")
    @classmethod
    def _server_optimizer(cls, part: Any) -> Any:
        return _checked(part, "server optimiser", SERVER_OPTIMIZERS)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.weighting.name in JOINT_WEIGHTINGS and self.fusion.name != "mean":
            raise ValueError(
                f'the weighting "{self.weighting.name}" weighs every parameter by itself, which the fusion "{self.fusion.name}"'
                ' cannot follow: expected fusion = "mean", or a weighting such as "examples"'
            )
        return self

    @property
    def compares_noise(self) -> bool:
        """Whether the weights depend on the noise that updates state."""
        return self.weighting.name in JOINT_WEIGHTINGS

    def weigh(self, update: Update) -> float:
        return WEIGHTINGS[self.weighting.name](update)

    def new_fusion(self) -> Fusion:
        return FUSIONS[self.fusion.name](**self.fusion.parameters)

    def new_combination(self) -> Combination:
        """Weighting and fusion for one round."""
        joint = JOINT_WEIGHTINGS.get(self.weighting.name)
        return Held(joint, self.new_fusion()) if joint else Streamed(self.weigh, self.new_fusion())

    def new_server_optimizer(self) -> ServerOptimizer:
        built: ServerOptimizer = SERVER_OPTIMIZERS[self.server_optimizer.name](**self.server_optimizer.parameters)
        return built

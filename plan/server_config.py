"""The `[server]` table of a plan, which configures rounds."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from cotune.storage.config_table import ConfigTable

_MAX_WAIT_SECONDS = 30 * 24 * 3600.0


class RoundsConfig(ConfigTable):
    """How rounds go (the `server` table of a plan)."""

    sample_rate: float = Field(1.0, gt=0, le=1, description="probability with which each organization is asked in a round")
    sample_size: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="number of organizations that are asked in each round, drawn without replacement from the plan's "
        "seed; 0: as sample_rate says",
    )
    quorum: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the asked organizations whose updates a round needs; absent: half, and at least two "
        "where all real organizations are asked, as one update alone is no fusion",
    )
    over_selection: float = Field(
        0.0,
        ge=0,
        le=10,
        description="organizations that are asked beyond sample_size, as a fraction of it; a round closes after its first"
        " sample_size updates",
    )
    deadline_seconds: float = Field(
        3600.0, gt=0, le=_MAX_WAIT_SECONDS, description="how long a round waits for an organization that was asked"
    )
    timeout_factor: float = Field(
        10.0,
        ge=0,
        le=1e6,
        description="once half of the asked organizations have answered, the server waits for the others up to their "
        "median time times this factor; an organization that takes longer gets a strike; 0: always "
        "deadline_seconds",
    )
    min_timeout_seconds: float = Field(
        300.0,
        gt=0,
        le=_MAX_WAIT_SECONDS,
        description="the least time for which the server waits for an organization, whatever timeout_factor gives",
    )
    absent_seconds: float = Field(
        60.0,
        ge=0,
        le=_MAX_WAIT_SECONDS,
        description="how long a round waits for those who are not connected, where the others reach the quorum",
    )
    wait_seconds: float = Field(
        3600.0,
        ge=0,
        le=_MAX_WAIT_SECONDS,
        description="how long a round waits for the quorum to be connected; then the run stops, to be resumed",
    )
    approval_seconds: float = Field(
        7 * 24 * 3600.0,
        ge=0,
        le=_MAX_WAIT_SECONDS,
        description="how long a round waits for people to approve the plan, where too few have for the quorum; then the run"
        " stops, to be resumed",
    )
    late: Literal["ignore", "fold"] = Field(
        "ignore", description="what happens to late updates: fold uses them in a later round, with less weight"
    )
    max_staleness: int = Field(2, ge=1, le=100, description="with late = fold: by how many rounds an update may be late")
    max_update_norm: float | None = Field(
        None,
        gt=0,
        le=1e12,
        description="the largest L2 norm of an update; larger ones are refused; absent: the most that training by the "
        "plan can reach",
    )
    max_accuracy_drop: float = Field(
        0.1,
        gt=0,
        le=1,
        description="a round after which the accuracy on the coordinator's validation records, or in a real run without them on"
        " its test set, has fallen by more is not applied; 1: never",
    )
    max_examples: int = Field(
        10_000_000, ge=1, le=10**12, description="the largest number of records that an update may declare; others are refused"
    )
    strikes: int = Field(
        3,
        ge=0,
        le=100_000,
        description="number of refused updates and timeouts after which an organization is excluded from the run; 0: never",
    )
    visibility: Literal["updates", "sum"] = Field(
        "updates", description="sum: allow only strategies that need the sum of the updates and no single update"
    )

    def needed(self, updates: int, *, fuses: bool) -> int:
        """Return the number of updates that form the quorum.

        Args:
            updates: Number of updates that complete the round.
            fuses: Whether at least two are needed.
        """
        least = 2 if fuses and self.quorum is None and self.asks_everybody else 1
        return max(least, math.ceil((0.5 if self.quorum is None else self.quorum) * updates - 1e-9))  # 0.55 · 20 is 11, and more

    def enough_seconds(self, usual: float, most: float) -> float:
        """Return the timeout of one organization, in seconds.

        Args:
            usual: Median of the seconds that the others took.
            most: Upper limit of the timeout, in seconds.
        """
        return min(most, max(self.min_timeout_seconds, self.timeout_factor * usual))

    @property
    def asks_everybody(self) -> bool:
        """Whether every round asks all organizations."""
        return self.sample_rate >= 1 and not self.sample_size

    @model_validator(mode="after")
    def _one_way_to_sample(self) -> Self:
        if self.sample_size and self.sample_rate < 1:
            raise ValueError(
                f"sample_size = {self.sample_size} asks a fixed number, and sample_rate = {self.sample_rate:g} each by chance:"
                " expected one of the two"
            )
        if self.over_selection and not self.sample_size:
            raise ValueError(
                f"over_selection = {self.over_selection:g} asks more than sample_size, which is not given: expected both"
            )
        return self

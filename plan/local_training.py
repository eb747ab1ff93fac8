"""The tables of a plan that say how an organization trains: `[local]`, and the stages of `train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cotune.models.config import TrainMode
from cotune.storage.config_table import ConfigTable
from cotune.strategies.server_optimizers.schedules import Schedule, decay

_MOST_RECORDS = 1_000_000  # per step
_MOST_ROWS = 65_536  # in memory at a time
_MAX_RATE = 1e3  # far above any useful rate; a single step with a much larger one could amplify rounding errors


class LocalTraining(ConfigTable):
    """How an organization trains in one round (the `local` table of a plan)."""

    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="the local optimizer; its state is reset in every round"
    )
    learning_rate: float = Field(0.5, gt=0, le=_MAX_RATE, description="learning rate of the local optimizer")
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        le=_MAX_RATE,
        description="learning rate of the head where the stage trains more than the head; default: learning_rate",
    )
    schedule: Schedule = Field(
        "constant", description="how learning rates decay over the rounds of a stage; they are constant within a round"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, le=10, description="weight decay of the optimizer, toward zero")
    base_decay: float = Field(
        0.0,
        ge=0,
        le=10,
        description="pull of the encoder's trained parameters toward the base model's, added to the gradient after its noise"
        " (L2-SP, Li et al., ICML 2018, https://arxiv.org/abs/1802.01483)",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability with which the dropout layers of what is trained leave an entry out, in training alone; the"
        " head's alone trains on features, which have none",
    )
    batch_size: float | Literal["all"] = Field(
        256.0,
        description="expected records per step, at most 1,000,000; below 1: the fraction of the records; all: every record in"
        " every step, which nothing amplifies",
    )
    steps: int | None = Field(20, ge=1, le=100_000, description="optimizer steps per round; null if epochs are given")
    epochs: float | None = Field(
        None, gt=0, le=1000, description="passes over the organization's records per round, instead of steps"
    )
    physical_batch_size: int | Literal["auto"] = Field(
        32,
        description="records held in memory at a time, 1 to 65,536; no influence on the result but rounding; auto: as many as a"
        " step has, up to 512 on a GPU and 32 on a CPU, and half of that, again and again, while they do not fit into memory",
    )
    activation_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="recompute activations in the backward pass: less memory, a third more time, the same result (auto: "
        "for models of a billion parameters and more)",
    )

    keep_lower_layers: Literal["auto", "on", "off"] = Field(
        "auto",
        description="where only the last layers are trained, compute what is below them once for each record and keep it on disk"
        " (auto: up to 16 GiB); the same result",
    )

    @field_validator("batch_size", mode="before")
    @classmethod
    def _records_or_all(cls, value: Any) -> Any:
        if value == "all":
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_RECORDS:
            raise ValueError(f'expected a number above 0 and at most {_MOST_RECORDS:,}, or "all", got {value!r}')
        if value >= 1 and value != int(value):
            raise ValueError(f"expected a whole number of records, or a fraction below 1, got {value}")
        return float(value)

    @field_validator("physical_batch_size", mode="before")
    @classmethod
    def _rows_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_ROWS):
            raise ValueError(f'expected a whole number from 1 to {_MOST_ROWS:,}, or "auto", got {value!r}')
        return value

    @model_validator(mode="before")
    @classmethod
    def _epochs_instead_of_steps(cls, table: Any) -> Any:
        if isinstance(table, Mapping) and table.get("epochs") is not None and "steps" not in table:
            return {**table, "steps": None}
        return table

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"expected either steps or epochs, got steps = {self.steps} and epochs = {self.epochs}: leave one out"
            )
        return self

    def in_round(self, done: int, rounds: int) -> Self:
        """Return the training of one round, with the learning rates that the schedule gives.

        Args:
            done: Rounds of the stage that are over.
            rounds: All rounds of the stage.
        """
        if self.schedule == "constant":
            return self
        part = decay(self.schedule, done, rounds)
        head = None if self.head_learning_rate is None else self.head_learning_rate * part
        return self.model_copy(update={"learning_rate": self.learning_rate * part, "head_learning_rate": head})

    def sample_rate(self, examples: int) -> float:
        """Return q, the probability with which each of `examples` records is in a batch."""
        if self.batch_size == "all":
            return 1.0
        return self.batch_size if self.batch_size < 1 else min(1.0, self.batch_size / examples)

    def fewest_records(self) -> float:
        """Return the number of records that fill a batch."""
        if self.batch_size == "all":
            return 1.0
        return self.batch_size if self.batch_size >= 1 else 1 / self.batch_size

    def steps_per_round(self, examples: int) -> int:
        """Return the optimizer steps per round of an organization with `examples` records; max(1, epochs / q) for epochs."""
        if self.epochs is not None:
            return max(1, round(self.epochs / self.sample_rate(examples)))
        assert self.steps is not None, "a plan gives one of both"
        return self.steps


class Stage(ConfigTable):
    """Consecutive rounds that train the same group of parameters."""

    mode: TrainMode = Field(
        description="head, lora (adapters and head), blocks (the encoder's last `layers`, and head) or full (encoder and head)"
    )
    rounds: int = Field(ge=1, le=100_000, description="number of rounds of this stage")
    local: LocalTraining = Field(LocalTraining(), description="keys that override the plan's [local] in this stage")
    freeze_embeddings: bool = Field(True, description="with full: do not train the embedding tables")
    layers: int | None = Field(
        None, ge=1, description="with blocks: how many of the last transformer blocks are trained; default: the plan's `layers`"
    )

    @model_validator(mode="after")
    def _blocks_are_counted(self) -> Self:
        if (self.mode == "blocks") == (self.layers is None):
            raise ValueError(
                f"train = {self.mode} and layers = {self.layers}: expected layers with train = blocks, and without it none"
            )
        if self.mode == "head" and self.local.dropout:
            raise ValueError(
                f"local.dropout = {self.local.dropout:g}, and train = head reads features, which are computed once: expected"
                " dropout = 0 in that stage"
            )
        return self

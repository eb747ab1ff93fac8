"""The tables of a plan that need nothing but themselves to be checked. Every key is typed, has a default and a unit.

Tables of models, records, privacy and strategies stand beside what they configure. No module that this one imports loads
PyTorch, so that a slip is told at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cotune.data.class_names import class_name
from cotune.data.config import DataConfig, TaskName
from cotune.models.config import LoraConfig, ModelConfig, TrainMode
from cotune.privacy.config import ClientPrivacy, RecordPrivacy
from cotune.storage.config_table import ConfigTable
from cotune.strategies.server_optimizers.schedules import Schedule, decay

_LARGEST_RATE = 1e3  # far beyond what trains anything; with much larger ones a single step could carry any rounding error out
_LONGEST_WAIT = 30 * 24 * 3600.0


class LocalTraining(ConfigTable):
    """How an organization trains in one round (the `local` table of a plan)."""

    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="started afresh in every round")
    learning_rate: float = Field(0.5, gt=0, le=_LARGEST_RATE, description="length of a step along the mean gradient")
    head_learning_rate: float | None = Field(
        None, gt=0, le=_LARGEST_RATE, description="for the head where the stage trains more; default: the same"
    )
    schedule: Schedule = Field("constant", description="how the rates fall over the rounds of a stage; within a round they stay")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    weight_decay: float = Field(0.0, ge=0, le=10, description="pull of the trained parameters toward zero, of the optimizer")
    batch_size: float = Field(256, gt=0, le=1e6, description="expected records per step; below 1: the fraction of the records")
    steps: int | None = Field(20, ge=1, le=100_000, description="optimizer steps per round; null where epochs are given")
    epochs: float | None = Field(None, gt=0, le=1000, description="instead of steps: passes over the own records per round")
    physical_batch_size: int = Field(
        32, ge=1, le=65_536, description="records held in memory at a time; no influence on the result"
    )

    @field_validator("batch_size")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"expected a whole number of records, or a fraction below 1, got {value}")
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
        """Return the training of the round after `done` of a stage's `rounds`: with the rates that the schedule gives it."""
        if self.schedule == "constant":
            return self
        part = decay(self.schedule, done, rounds)
        head = None if self.head_learning_rate is None else self.head_learning_rate * part
        return self.model_copy(update={"learning_rate": self.learning_rate * part, "head_learning_rate": head})

    def sample_rate(self, examples: int) -> float:
        """q, the probability with which each of `examples` records enters a batch."""
        return self.batch_size if self.batch_size < 1 else min(1.0, self.batch_size / examples)

    def steps_of(self, examples: int) -> int:
        """Optimizer steps per round of an organization with so many records: max(1, epochs / q) where epochs are given."""
        if self.epochs is not None:
            return max(1, round(self.epochs / self.sample_rate(examples)))
        assert self.steps is not None, "a plan gives one of both"
        return self.steps


class Stage(ConfigTable):
    """Consecutive rounds that train the same group of parameters."""

    mode: TrainMode = Field(description="head, lora (adapters and head) or full (encoder and head)")
    rounds: int = Field(ge=1, le=100_000, description="of this stage")
    local: LocalTraining = Field(LocalTraining(), description="what differs from the plan's [local]")
    freeze_embeddings: bool = Field(True, description="in full: leave the embedding tables as they are")


class RoundsConfig(ConfigTable):
    """How rounds go (the `server` table of a plan)."""

    sample_rate: float = Field(1.0, gt=0, le=1, description="probability with which each organization is asked in a round")
    sample_size: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="exactly so many are asked, drawn without replacement from the plan's seed; 0: by sample_rate",
    )
    quorum: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the asked organizations whose updates a round needs; absent: half, and where real ones are all"
        " asked at least two, as one update is no fusion",
    )
    over_selection: float = Field(
        0.0,
        ge=0,
        le=10,
        description="asked beyond sample_size, as a fraction of it; a round closes with its first sample_size updates",
    )
    deadline_seconds: float = Field(
        3600.0, gt=0, le=_LONGEST_WAIT, description="how long a round waits for an organization that was asked"
    )
    patience: float = Field(
        10.0,
        ge=0,
        le=1e6,
        description="once half of the asked organizations have answered, the others are waited for so many times their median"
        " time; anyone who needs longer gets a strike; 0: always deadline_seconds",
    )
    least_seconds: float = Field(
        300.0,
        gt=0,
        le=_LONGEST_WAIT,
        description="an organization that was asked is waited for at least so long, whatever patience says",
    )
    absent_seconds: float = Field(
        60.0,
        ge=0,
        le=_LONGEST_WAIT,
        description="how long a round waits for those who are not connected, where the others reach the quorum",
    )
    wait_seconds: float = Field(
        3600.0,
        ge=0,
        le=_LONGEST_WAIT,
        description="how long a round waits for the quorum to be connected; then the run stops, to be resumed",
    )
    approval_seconds: float = Field(
        7 * 24 * 3600.0,
        ge=0,
        le=_LONGEST_WAIT,
        description="how long a round waits for people to approve the plan, where too few have for the quorum; then the run"
        " stops, to be resumed",
    )
    late: Literal["ignore", "fold"] = Field(
        "ignore", description="of updates that come after their round: fold them into a later one, with less weight"
    )
    max_staleness: int = Field(2, ge=1, le=100, description="with late = fold: rounds that an update may be late")
    max_update_norm: float | None = Field(
        None,
        gt=0,
        le=1e12,
        description="updates with a larger L2 norm are refused; absent: as far as training can go by the plan",
    )
    max_accuracy_drop: float = Field(
        0.1,
        gt=0,
        le=1,
        description="a round after which the accuracy on the coordinator's validation records, or in a real run without them on"
        " its test set, has fallen by more is not applied; 1: never",
    )
    max_examples: int = Field(10_000_000, ge=1, le=10**12, description="updates that declare more records are refused")
    strikes: int = Field(
        3,
        ge=0,
        le=100_000,
        description="refused updates and time-outs after which an organization is left out of the run; 0: never",
    )
    visibility: Literal["updates", "sum"] = Field(
        "updates", description="sum: only strategies for which the server need not see a single update, but their sum alone"
    )

    def needed(self, updates: int, *, fuses: bool) -> int:
        """Updates that a round needs. updates: that would close it. fuses: whether several must be there to be fused."""
        least = 2 if fuses and self.quorum is None and self.asks_everybody else 1
        return max(least, math.ceil((0.5 if self.quorum is None else self.quorum) * updates - 1e-9))  # 0.55 · 20 is 11, and more

    def enough_seconds(self, usual: float, most: float) -> float:
        """How long one organization is waited for where others took `usual`: at least `least_seconds`, and at most `most`."""
        return min(most, max(self.least_seconds, self.patience * usual))

    @property
    def asks_everybody(self) -> bool:
        return self.sample_rate >= 1 and not self.sample_size

    @model_validator(mode="after")
    def _one_way_to_sample(self) -> Self:
        if self.sample_size and self.sample_rate < 1:
            raise ValueError(
                f"sample_size = {self.sample_size} asks exactly so many, and sample_rate = {self.sample_rate:g} each by chance:"
                " expected one of the two"
            )
        if self.over_selection and not self.sample_size:
            raise ValueError(
                f"over_selection = {self.over_selection:g} asks more than sample_size, which is not given: expected both"
            )
        return self


class TellConfig(ConfigTable):
    """What organizations are asked to tell beside their updates (the `tell` table); each one's policy has the last word."""

    local_metrics: bool = Field(False, description="how many of its records the received model classifies rightly, every round")
    label_histogram: bool = Field(False, description="how many records each class has, once per run")


class PersonalizeConfig(ConfigTable):
    """How organizations adapt the finished model to themselves (the `personalize` table): nothing leaves, no ε is spent."""

    methods: tuple[Literal["prior", "head", "mix", "alone"], ...] = Field(
        ("prior", "head", "mix", "alone"),
        description="tried beside the model as it came, on own records; empty: nothing is adapted",
    )
    folds: int = Field(5, ge=2, le=20, description="parts that the own records are cut into, to choose a method by")


class SimulationConfig(ConfigTable):
    """Only for simulations (the `simulation` table of a plan)."""

    clients: int = Field(4, ge=1, le=10_000, description="organizations that one pooled file is split over")
    partition: str = Field(
        "dirichlet:0.5",
        description="iid, dirichlet:ALPHA (label skew), quantity:ALPHA, shards:K, or column:NAME (as a column of the file says)",
    )
    min_examples: int = Field(20, ge=1, le=10**9, description="per organization")
    epsilons: tuple[float, ...] = Field(
        (), description="own ε of each organization, in their order, where it is smaller than the plan's; empty: the plan's"
    )
    ranks: tuple[int, ...] = Field(
        (), description="rank of adapters that each organization trains, in their order, at most lora.rank; empty: that"
    )
    baselines: tuple[Literal["alone", "pooled"], ...] = Field(
        ("alone", "pooled"),
        description="what the federated model is compared with: alone is trained twice, with the same privacy and without any",
    )
    pooled: LocalTraining | None = Field(
        None, description="how models without privacy are trained for comparison, where not like [local]"
    )

    @field_validator("epsilons")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(epsilon > 0 for epsilon in value):
            raise ValueError(f"expected ε above 0 for every organization, got {list(value)}")
        return value


class PlanTables(ConfigTable):
    """A plan but for its strategy, whose parts must be imported, and for what tables must be together (see `schema.Plan`)."""

    name: str = Field(
        "plan", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="of the plan and its runs; default: the file's"
    )
    seed: int = Field(7, ge=0, lt=2**31, description="of everything random but privacy noise and private sampling")
    task: TaskName = Field(
        "sequence-classification", description="a class for a text (sequence-), for each word of one (token-), or for an image"
    )
    labels: tuple[str, ...] = Field((), description="class names or tags in the order of the head; empty: as found in the data")
    class_weights: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        {},
        description="how much a record (with tags, a word) of a class counts in the loss, such as { common = 0.05 }; classes that"
        " are not named: 1; declared here and never counted from records; as gradients are clipped after weighting, a weight"
        " below 1 for a frequent class does more under privacy than one above 1 for a rare class",
    )
    train: TrainMode | tuple[Stage, ...] = Field("head", description="one mode for all rounds, or a list of stages")
    rounds: int = Field(10, ge=1, le=100_000, description="where train is one mode; with stages, their sum")
    test_fraction: float = Field(0.15, gt=0, lt=1, description="of the records, held out as the common test set")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="of the other records, held by the server: some strategies judge updates by them"
    )
    keep_checkpoints: int = Field(0, ge=0, le=100_000, description="how many rounds' checkpoints stay on disk; 0: all")
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    local: LocalTraining = LocalTraining()
    privacy: RecordPrivacy | Literal["none"] = RecordPrivacy()
    client_privacy: ClientPrivacy | None = Field(None, description="absent: no promise to whole organizations")
    strategy: Any = Field(None, description="left to `Plan`: its parts must be imported to be checked")
    server: RoundsConfig = RoundsConfig()
    tell: TellConfig = TellConfig()
    personalize: PersonalizeConfig = PersonalizeConfig()
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="before")
    @classmethod
    def _unit_names_its_column(cls, table: Any) -> Any:
        """Where `data` does not name the column of the units, it is called like the unit."""
        if not isinstance(table, Mapping):
            return table
        privacy = table.get("privacy")
        data = table.get("data")
        unit = privacy.get("unit") if isinstance(privacy, Mapping) else getattr(privacy, "unit", None)
        if unit in (None, "record") or not isinstance(data, Mapping) or data.get("unit") is not None:
            return table
        return {**table, "data": {**data, "unit": unit}}

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit(cls, table: Any) -> Any:
        """A stage's `local` says only what differs from the plan's; so does simulation.pooled."""
        if not isinstance(table, dict):
            return table
        given = table.get("local")
        common: dict[str, Any] = given if isinstance(given, dict) else {}
        table = dict(table)
        if isinstance(table.get("train"), list | tuple):
            table["train"] = [_inherit(stage, "local", common) for stage in table["train"]]
            table["rounds"] = sum(s["rounds"] for s in table["train"] if isinstance(s, dict) and _is_count(s.get("rounds"))) or 1
        if isinstance(table.get("simulation"), dict) and isinstance(table["simulation"].get("pooled"), dict):
            table["simulation"] = _inherit(table["simulation"], "pooled", common)
        return table

    @field_validator("labels")
    @classmethod
    def _labels_as_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """As they are read from every format, see `class_name`."""
        return tuple(map(class_name, value))

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_are_numbers(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and any(isinstance(weight, bool) for weight in value.values()):
            raise ValueError("expected a number for each class, got true or false")
        return value

    @field_validator("class_weights")
    @classmethod
    def _weights_of_labels_as_read(cls, value: dict[str, float]) -> dict[str, float]:
        named = {class_name(name): weight for name, weight in value.items()}
        if len(named) < len(value):
            raise ValueError(f"expected one weight for each class, got two spellings of one in {list(value)}")
        return named

    @field_validator("train", mode="before")
    @classmethod
    def _some_stage(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and not value:
            raise ValueError("expected at least one stage")
        return value


def _inherit(table: Any, key: str, common: dict[str, Any]) -> Any:
    if not isinstance(table, dict):
        return table
    own = table.get(key, {})
    if not isinstance(own, dict):
        return table
    either = {"steps", "epochs"}
    replaced = either if either & own.keys() else set()
    return {**table, key: {**{k: v for k, v in common.items() if k not in replaced}, **own}}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

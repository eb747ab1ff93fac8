"""The tables of a plan that can be validated by themselves. Every key has a type, a default and a unit.

Tables of models, records, privacy and strategies are beside what they configure. Nothing that this module imports loads PyTorch,
so that a mistake is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cotune.data.class_names import class_name
from cotune.data.config import DataConfig, TaskName
from cotune.models.config import LoraConfig, ModelConfig, TrainMode
from cotune.plan.local_training import LocalTraining, Stage
from cotune.plan.personal import PersonalConfig
from cotune.plan.public import Collaboration, PublicConfig
from cotune.plan.server_config import RoundsConfig
from cotune.plan.several_tasks import Balance, TaskConfig, write_out
from cotune.plan.wire import Codec
from cotune.privacy.config import ClientPrivacy, RecordPrivacy
from cotune.storage.config_table import ConfigTable


class DisclosureConfig(ConfigTable):
    """What organizations are asked to disclose beside their updates (`disclosures`); each one's policy has the last word."""

    local_metrics: bool = Field(
        False,
        description="how many of its records the received model predicts correctly, every round; of numbers, within a tenth of"
        " model.target_range",
    )
    label_histogram: bool = Field(False, description="how many records each class has, once per run")


class PersonalizeConfig(ConfigTable):
    """How organizations adapt the finished model to themselves (the `personalize` table): nothing leaves, no ε is spent."""

    methods: tuple[Literal["prior", "head", "mix", "alone"], ...] = Field(
        ("prior", "head", "mix", "alone"),
        description="methods that are compared with the unchanged model on an organization's own records; empty: nothing "
        "is adapted",
    )
    folds: int = Field(5, ge=2, le=20, description="folds of the cross-validation on own records that chooses a method")


class GenerateConfig(ConfigTable):
    """What language models write after prompts of the common test set, at the end (the `generate` table)."""

    examples: int = Field(100, ge=1, le=10_000, description="the most test records, drawn by the seed")
    max_new_tokens: int = Field(64, ge=1, le=4096, description="the most tokens of each text")


class SimulationConfig(ConfigTable):
    """Only for simulations (the `simulation` table of a plan)."""

    clients: int = Field(4, ge=1, le=10_000, description="organizations that one pooled file is split over")
    partition: str = Field(
        "dirichlet:0.5",
        description="iid, dirichlet:ALPHA (label skew), quantity:ALPHA, shards:K, or column:NAME (as a column of the file says)",
    )
    min_examples: int = Field(20, ge=1, le=10**9, description="the fewest records of each organization")
    epsilons: tuple[float, ...] = Field(
        (),
        description="ε that the policy of each organization allows, in their order, if smaller than the plan's; empty: "
        "the plan's",
    )
    ranks: tuple[int, ...] = Field(
        (), description="rank of the adapters that each organization trains, in their order, at most lora.rank; empty: lora.rank"
    )
    bases: tuple[str, ...] = Field(
        (),
        description='with collaboration = "predictions": the base model of each organization, in their order, as model.base names'
        " it; empty: the plan's",
    )
    tasks: tuple[tuple[str, ...], ...] = Field(
        (), description="with [[tasks]]: which of them each organization has labels of, in their order; empty: all of them"
    )
    baselines: tuple[Literal["alone", "pooled", "plain", "single"], ...] = Field(
        ("alone", "pooled", "plain", "single"),
        description="what the federated model is compared with: alone is trained twice, with the same privacy and without any;"
        " plain, where the plan keeps something personal, is the same run without that; single, where it has several tasks, is"
        " the same run for each task by itself",
    )
    pooled: LocalTraining | None = Field(
        None,
        description="keys that override [local] for models that are trained without privacy, for comparison; absent, and only a"
        " head is trained: pooled is a head that is fitted to the end",
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
        "plan",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name of the plan and its runs; default: the name of the file",
    )
    seed: int = Field(7, ge=0, lt=2**31, description="seed of all randomness except privacy noise and private sampling")
    task: TaskName = Field(
        "sequence-classification",
        description="a class for a text (sequence-), for each word of one (token-), or for an image; any number of labels for a"
        " text (multi-label), or a number (regression); the part of a text that answers a question"
        " (question-answering); or a text that goes on with another (causal-lm) or answers it (seq2seq)",
    )
    tasks: tuple[TaskConfig, ...] = Field(
        (), description="several tasks on one encoder, each with a head of its own; `task` and `labels` follow from them"
    )
    balance: Balance = Field(
        "plan",
        description="of several tasks: λ as each says (plan), or times what grows with the noise in its head (noise_to_signal:"
        " the square root of its classes, 1 in the mean), which follows from the plan and never from records",
    )
    labels: tuple[str, ...] = Field((), description="class names or tags in the order of the head; empty: as found in the data")
    class_weights: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(
        {},
        description="how much a record (with tags, a word) of a class counts in the loss, such as { common = 0.05 }; classes that"
        " are not named: 1; declared here and never counted from records; as gradients are clipped after weighting, a weight"
        " below 1 for a frequent class does more under privacy than one above 1 for a rare class",
    )
    train: TrainMode | tuple[Stage, ...] = Field("head", description="one mode for all rounds, or a list of stages")
    layers: int | None = Field(
        None, ge=1, description="with train = blocks: how many of the encoder's last transformer blocks are trained"
    )
    rounds: int = Field(10, ge=1, le=100_000, description="where train is one mode; with stages, their sum")
    collaboration: Collaboration = Field(
        "parameters",
        description="what organizations share: updates of one model's parameters; or predictions for public inputs alone, each of"
        " a model of its own, of whatever architecture",
    )
    test_fraction: float = Field(0.15, gt=0, lt=1, description="of the records, held out as the common test set")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="of the other records, held by the server: some strategies judge updates by them"
    )
    wire: Codec = Field(
        "float32",
        description="how the values of updates travel: int8 takes about a quarter of the bytes of float32, int4 an eighth; each"
        " organization rounds after its noise, at random and without bias, which costs no privacy",
    )
    wire_down: Codec = Field(
        "float32",
        description="how the shared model travels to organizations that have an earlier version of it: as its changes since then,"
        " where they are fewer bytes than the whole in float32; the server rounds what a round has changed, at random and without"
        " bias, and makes up for it in the next one; float32: always the whole",
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
    disclosures: DisclosureConfig = DisclosureConfig()
    public: PublicConfig = PublicConfig()
    personal: PersonalConfig = PersonalConfig()
    personalize: PersonalizeConfig = PersonalizeConfig()
    generate: GenerateConfig | None = Field(
        None, description="absent: nothing is written; needs data.prompt or data.messages, and at the coordinator a test set"
    )
    simulation: SimulationConfig = SimulationConfig()

    @model_validator(mode="before")
    @classmethod
    def _tasks_are_written_out(cls, table: Any) -> Any:
        """Derive `task`, `labels` and the columns of labels from `[[tasks]]`."""
        return write_out(table) if isinstance(table, Mapping) else table

    @model_validator(mode="before")
    @classmethod
    def _unit_names_its_column(cls, table: Any) -> Any:
        """Name the column of units after the unit, if `data` does not name it."""
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
        """Complete the `local` table of each stage, and simulation.pooled, with the plan's `local`."""
        if not isinstance(table, dict):
            return table
        given = table.get("local")
        common: dict[str, Any] = given if isinstance(given, dict) else {}
        table = dict(table)
        if isinstance(table.get("train"), list | tuple):
            stages = [_inherit(stage, "local", common) for stage in table["train"]]
            table["train"] = [_count_blocks(stage, table.get("layers")) for stage in stages]
            table["rounds"] = sum(s["rounds"] for s in table["train"] if isinstance(s, dict) and _is_count(s.get("rounds"))) or 1
        if isinstance(table.get("simulation"), dict) and isinstance(table["simulation"].get("pooled"), dict):
            table["simulation"] = _inherit(table["simulation"], "pooled", common)
        return table

    @field_validator("labels")
    @classmethod
    def _labels_as_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Normalize labels as readers of every format do, see `class_name`."""
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


def _count_blocks(stage: Any, layers: Any) -> Any:
    """Complete a stage of blocks that does not give their number with the plan's."""
    counts = isinstance(stage, dict) and stage.get("mode") == "blocks" and stage.get("layers") is None
    return {**stage, "layers": layers} if counts and layers is not None else stage


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

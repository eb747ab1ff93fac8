"""The policy of an organization (policy.toml in its site): limits of its own, which overrule any plan.

The defaults are strict: a plan is declined unless the organization has allowed what it asks for. A simulated organization without
a policy allows everything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from cotune.data.config import TaskName
from cotune.errors import PlanError, nearest
from cotune.privacy.config import check_delta
from cotune.storage.config_table import ConfigTable, format_validation_error
from cotune.storage.json_documents import parse_toml

_EVERYTHING = ("*",)


def _check_each(values: tuple[str, ...], pattern: re.Pattern[str], expected: str) -> tuple[str, ...]:
    """Return the values, each "*" or one that a plan can have; any other would silently never match.

    Raises:
        ValueError: For a value that no plan can have.
    """
    for value in values:
        if value != "*" and not pattern.fullmatch(value):
            raise ValueError(f'{value[:80]!r} can never match: expected {expected}, or "*"')
    return values


class BudgetRules(ConfigTable):
    """How much privacy may be spent (the `budget` table). ε is composed over all charges, at the δ of the same table."""

    own_epsilon: float | None = Field(None, gt=0, description="ε for a run, where it is smaller than the plan's: more noise")
    epsilon_per_run: float = Field(3.0, gt=0, description="a plan that would spend more in one run is declined")
    delta_per_run: float | str = Field("1/n^1.5", description='δ at most: a number or "1/n^p"; a plan with more is declined')
    delta_times_records: float = Field(
        0.1,
        gt=0,
        le=1,
        description="the most that δ times the number of records may be: how many records may be fully disclosed in expectation",
    )
    epsilon_total: float = Field(
        8.0, gt=0, description="total ε over all runs and years of this site, or of each collection in it"
    )
    delta_total: float | str = Field("1/n^1.5", description="δ at which epsilon_total is measured")

    def epsilon_for(self, planned: float) -> float:
        """Return ε of a run: the plan's, or the organization's own where that is smaller."""
        return min(planned, self.own_epsilon or planned)

    def largest_delta(self, examples: int) -> float:
        """Return the largest δ that `delta_times_records` allows for that many records."""
        return self.delta_times_records / max(1, examples) * (1 + 1e-9)

    @field_validator("delta_per_run", "delta_total")
    @classmethod
    def _delta(cls, value: float | str) -> float | str:
        return check_delta(value)


class TrainingRules(ConfigTable):
    """What may be trained (the `training` table). Lists: what is allowed; "*": everything."""

    approval: Literal["each", "none"] = Field(
        "each", description="each: a plan is trained on only after somebody here has approved it; none: whatever the rules allow"
    )
    record_privacy: bool = Field(True, description="true: a plan without record-level differential privacy is declined")
    personal_without_noise: bool = Field(
        False,
        description="true: no own copy of the model leaves, nor what it predicts, so that a plan may train it without noise",
    )
    handed_over_members: bool = Field(
        False,
        description="true: a plan may stack models that were trained without privacy and handed over, or with an ε above"
        " budget.epsilon_per_run; they may reveal single records of those that they come from to everybody who takes part",
    )
    units: tuple[str, ...] = Field(
        (), description="whom a plan may promise its privacy to: a unit such as patient_id; record, where each record is a person"
    )
    min_examples: int = Field(500, ge=0, description="records that a data set must have")
    min_batch: float = Field(64, ge=0, description="expected records per step at least")
    max_rounds: int = Field(200, ge=1, description="rounds of one plan")
    max_rounds_per_day: int | None = Field(None, ge=1, description="rounds of all plans on one day (UTC); absent: no limit")
    min_cohort: int = Field(1, ge=1, description="organizations in the round before, by the list that the server signs, at least")
    max_hours: float = Field(24.0, gt=0, description="of training for one plan, by this machine's clock")
    max_gpu_memory_gib: float | None = Field(None, gt=0, description="of this process; absent: all there is")
    own_rank: int | None = Field(None, ge=1, description="rank of adapters to train, where it is smaller than the plan's")
    tasks: tuple[str, ...] = Field(_EVERYTHING, description="such as sequence-classification")
    base_models: tuple[str, ...] = Field((), description="hashes of the models that may be trained, as `plan check` shows them")
    train_modes: tuple[str, ...] = Field(("head", "lora"), description="head, lora, blocks, full")
    collaborations: tuple[str, ...] = Field(
        _EVERYTHING,
        description="parameters: updates of a common model may leave; predictions: those of an own model for public inputs",
    )
    weightings: tuple[str, ...] = Field(_EVERYTHING, description="of the strategy")
    fusions: tuple[str, ...] = Field(("mean", "robust"), description="of the strategy")
    client_terms: tuple[str, ...] = Field((), description="of the strategy: what is added to the gradients here, and kept here")

    @field_validator("base_models")
    @classmethod
    def _whole_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse a part of a hash, which would never match."""
        return _check_each(
            value, re.compile("[0-9a-f]{64}"), "the 64 hexadecimal digits of a base model's hash, as `client check` shows"
        )

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_each(value, re.compile("|".join(get_args(TaskName))), f"one of {', '.join(get_args(TaskName))}")

    @field_validator("train_modes")
    @classmethod
    def _known_modes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_each(value, re.compile("head|lora|blocks|full"), "head, lora, blocks or full")

    @field_validator("collaborations")
    @classmethod
    def _known_collaborations(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _check_each(value, re.compile("parameters|predictions"), "parameters or predictions")

    def rank_for(self, planned: int) -> int:
        """Return the rank of the adapters to train: the plan's, or the organization's own where that is smaller."""
        return min(planned, self.own_rank or planned)


class DisclosureRules(ConfigTable):
    """What may be disclosed to the server beside the update (`disclosures`); noised numbers are charged to the ledger."""

    example_count: Literal["exact", "rounded", "noised", "declared"] = Field(
        "noised",
        description="the number that the server may know, and noise and weight follow from: with noise, once per plan; as in"
        " declared_examples; or, where the true one is public, as it is or to one digit",
    )
    declared_examples: int | None = Field(None, ge=1, description="a number that may be public, near the true one")
    local_metrics: Literal["none", "noised", "clear"] = Field("none", description="accuracy on the own records before a round")
    local_loss: Literal["none", "noised", "clear"] = Field(
        "none", description="the received model's mean loss, for strategies that weigh by it; noised: where training is, too"
    )
    loss_ceiling: float = Field(4.0, gt=0, description="nats; of a noised loss, what one record counts for at most")
    label_histogram: Literal["none", "noised"] = Field("none", description="how many records each class has, once per plan")
    noise_multiplier: float = Field(
        20.0, ge=1.0, description="σ of what is noised, in records: Gaussian noise, for the number of records geometric"
    )
    statistics: bool = Field(
        False, description="squared gradients and input products of the records, without noise; never with record privacy"
    )
    noise_level: bool = Field(True, description="how much noise is in an update; the weighting noise_aware needs it")


class Policy(ConfigTable):
    """What an organization allows: the content of policy.toml."""

    budget: BudgetRules = BudgetRules()
    training: TrainingRules = TrainingRules()
    disclosures: DisclosureRules = DisclosureRules()

    @classmethod
    @lru_cache(maxsize=1024)
    def permissive(cls, epsilon: float | None = None, rank: int | None = None, examples: int | None = None) -> Policy:
        """Return the policy of a simulated organization, which allows everything.

        Args:
            epsilon: Its own ε for a run, where it is smaller than the plan's.
            rank: Its own rank of adapters, where it is smaller than the plan's.
            examples: The number of records that it declares; None: its true number is public.
        """
        return cls(
            budget=BudgetRules(
                own_epsilon=epsilon, epsilon_per_run=1e6, delta_per_run="1/n", delta_times_records=1.0, epsilon_total=1e6
            ),
            training=TrainingRules(
                approval="none",
                record_privacy=False,
                personal_without_noise=True,
                handed_over_members=True,
                units=_EVERYTHING,
                min_examples=0,
                min_batch=0,
                max_rounds=10**6,
                max_hours=1e6,
                own_rank=rank,
                base_models=_EVERYTHING,
                train_modes=_EVERYTHING,
                fusions=_EVERYTHING,
                client_terms=_EVERYTHING,
            ),
            disclosures=DisclosureRules(
                example_count="declared" if examples else "exact",
                declared_examples=examples,
                local_metrics="noised",
                local_loss="noised",
                label_histogram="noised",
                statistics=True,
            ),
        )


def read_policy(file: Path) -> Policy:
    """Return the policy in a TOML file.

    Raises:
        PlanError: For an unreadable file, an unknown rule, or a value that a rule cannot have.
    """
    try:
        return _parse(file.read_text(encoding="utf-8-sig"))
    except ValidationError as error:
        raise PlanError(
            f"{format_validation_error(error, Policy, 'policy')} ({file}; see `cotune client policy`)", code="plan.invalid_policy"
        ) from None
    except (OSError, ValueError) as error:
        raise PlanError(
            f"the policy {file} cannot be read ({error}): expected TOML like that of `cotune client policy`",
            code="plan.policy_unreadable",
        ) from None


@lru_cache(maxsize=64)
def _parse(text: str) -> Policy:
    """The policy of a text; the file is read whenever a rule is asked for, and says the same most of the time."""
    return Policy.model_validate(parse_toml(text))


def check_rules(names: Iterable[str]) -> None:
    """Check that these are full names of rules, such as training.max_rounds.

    Raises:
        PlanError: For an unknown rule.
    """
    tables = dict(Policy())
    rules = {f"{name}.{rule}" for name, table in tables.items() for rule in type(table).model_fields}
    for name in names:
        if name not in rules:
            raise PlanError(f'the policy has no rule "{name}"{nearest(name, rules)}', code="plan.unknown_rule")


def change_policy(policy: Policy, changes: Mapping[str, Any]) -> Policy:
    """Return the policy with other values for some rules, such as {"training.max_rounds": 50}.

    Raises:
        PlanError: For an unknown rule, or a value that a rule cannot have.
    """
    check_rules(changes)
    tables = policy.model_dump()
    for key, value in changes.items():
        table, _, rule = key.partition(".")
        tables[table][rule] = value
    try:
        return Policy.model_validate(tables)
    except ValidationError as error:
        raise PlanError(format_validation_error(error, Policy, "policy"), code="plan.invalid_policy") from None


def dump_policy(policy: Policy) -> str:
    """Return the policy as TOML, with a comment for each rule; `read_policy` reads the same policy back."""
    lines: list[str] = []
    for name in Policy.model_fields:
        rules = getattr(policy, name)
        lines += [*([""] if lines else []), f"[{name}]"]
        for key, field in type(rules).model_fields.items():
            value = getattr(rules, key)
            line = f"# {key} = …" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
            lines.append(f"{line:<40}  # {field.description}")
    return "\n".join(lines) + "\n"

from __future__ import annotations

import hashlib
import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cotune.errors import PlanError
from cotune.plan.load import dump_plan, load_plan, parse_plan, preset_names
from cotune.plan.local_training import LocalTraining
from cotune.plan.plan import Plan
from tests.support.failures import fails_with

BASE: dict[str, Any] = {"model": {"base": "some/encoder"}, "data": {"source": "records.csv"}}
STAGES = [
    {"mode": "head", "rounds": 2},
    {"mode": "lora", "rounds": 3, "local": {"learning_rate": 0.01, "optimizer": "adamw"}},
    {"mode": "full", "rounds": 1, "local": {"steps": 5}, "freeze_embeddings": False},
]
COMMON = {"steps": 7, "batch_size": 0.1, "learning_rate": 0.3, "head_learning_rate": 0.2}


def plan(**tables: Any) -> Plan:
    return parse_plan({**BASE, **tables})


def rich() -> Plan:
    """A plan that says something in every table."""
    return plan(
        name="all-of-it",
        seed=11,
        labels=["so so", 'the "good"', "schön"],
        train=STAGES,
        local=COMMON,
        lora={"rank": 4, "targets": ["query", "value"]},
        privacy={"epsilon": 3, "delta": "1/n^1.5"},
        strategy={"fusion": "mean", "server_optimizer": {"name": "sgd", "lr": 0.5}},
        server={"quorum": 0.75},
        simulation={"clients": 3, "partition": "iid", "baselines": ["alone"], "pooled": {"steps": 50}},
    )


PLANS = {
    **{name: lambda name=name: load_plan(name) for name in preset_names()},
    "rich": rich,
    "public": lambda: plan(privacy="none"),
}


# --- one plan, one identity


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_written_as_toml_is_the_same_plan(name: str) -> None:
    one = PLANS[name]()
    again = parse_plan(tomllib.loads(dump_plan(one)))
    assert again == one
    assert again.plan_id == one.plan_id
    assert dump_plan(again) == dump_plan(one)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "trimmed_mean", "robust", "fisher", "qfedavg", "fedprox", "ties"])
def test_a_dumped_plan_is_the_same_without_its_parts(strategy: str) -> None:
    """A folder of a run is looked at without importing the strategy's parts; the identity that is shown must be the run's."""
    one = plan(strategy=strategy, privacy="none", train="lora")
    again = parse_plan(tomllib.loads(dump_plan(one)), complete=True)
    assert (again.plan_id, again.canonical()) == (one.plan_id, one.canonical())


@pytest.mark.parametrize("name", PLANS)
def test_the_canonical_form_is_the_plan(name: str) -> None:
    """It is what travels: an organization reads it and must arrive at the same identity."""
    one = PLANS[name]()
    again = parse_plan(json.loads(one.canonical()))
    assert again == one
    assert again.canonical() == one.canonical()
    assert one.plan_id == hashlib.sha256(one.canonical().encode("utf-8")).hexdigest()


def test_the_canonical_form_is_sorted_strict_json() -> None:
    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = rich().canonical()
    table = json.loads(text, parse_constant=no_constants)
    assert text == json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert "schön" in text


def test_plan_id_ignores_key_order_and_defaults() -> None:
    one = parse_plan({"model": {"base": "m"}, "data": {"source": "d"}, "rounds": 10, "seed": 7})
    other = parse_plan({"data": {"source": "d"}, "model": {"base": "m"}})
    assert one.plan_id == other.plan_id


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"seed": 8},
        {"labels": ["a", "b"]},
        {"labels": ["b", "a"]},
        {"train": "lora"},
        {"rounds": 11},
        {"local": {"steps": 21}},
        {"privacy": "none"},
        {"privacy": {"clip_norm": 1.5}},
        {"model": {"base": "m", "base_hash": "0" * 64}},
    ],
)
def test_whatever_differs_is_another_plan(change: dict[str, Any]) -> None:
    assert plan(**change).plan_id != plan().plan_id


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan().rounds = 3  # type: ignore[misc]


# --- stages


def test_stages_say_only_what_differs() -> None:
    stages = plan(train=STAGES, local=COMMON).stages
    common = LocalTraining.model_validate(COMMON)
    assert [(s.mode, s.rounds, s.freeze_embeddings) for s in stages] == [
        ("head", 2, True),
        ("lora", 3, True),
        ("full", 1, False),
    ]
    assert stages[0].local == common
    assert stages[1].local == common.model_copy(update={"learning_rate": 0.01, "optimizer": "adamw"})
    assert stages[2].local == common.model_copy(update={"steps": 5})


def test_the_pooled_baseline_says_only_what_differs() -> None:
    pooled = plan(local=COMMON, simulation={"pooled": {"steps": 500}}).simulation.pooled
    assert pooled == LocalTraining.model_validate(COMMON).model_copy(update={"steps": 500})
    assert plan(local=COMMON).simulation.pooled is None


def test_inheriting_leaves_the_given_tables_alone() -> None:
    table = {**BASE, "train": [dict(stage) for stage in STAGES], "local": COMMON}
    before = json.dumps(table)
    parse_plan(table)
    assert json.dumps(table) == before


def test_rounds_of_stages_are_their_sum() -> None:
    assert plan(train=STAGES).rounds == 6
    assert plan(train=STAGES, rounds=99).rounds == 6
    assert plan(rounds=4).rounds == 4


def test_stage_of() -> None:
    staged = plan(train=STAGES)
    assert [staged.get_stage(round).mode for round in range(1, 7)] == ["head", "head", "lora", "lora", "lora", "full"]
    one = plan(train="lora", rounds=3, local=COMMON)
    assert [one.get_stage(round) for round in (1, 2, 3)] == list(one.stages * 3)
    assert one.stages[0].local == one.local


def test_a_changed_copy_has_its_own_stages() -> None:
    falling = plan(train="head", rounds=4, local={**COMMON, "learning_rate": 4.0, "schedule": "linear"})
    assert [falling.get_stage(round).local.learning_rate for round in (3, 1, 3, 3)] == [2.0, 4.0, 2.0, 2.0]
    changed = falling.model_copy(update={"train": "lora", "rounds": 8})
    assert [stage.mode for stage in changed.stages] == ["lora"]
    assert changed.get_stage(3).local.learning_rate == 3.0
    assert falling.get_stage(3).mode == "head"
    assert falling == plan(train="head", rounds=4, local={**COMMON, "learning_rate": 4.0, "schedule": "linear"})


def test_rates_fall_over_the_rounds_of_each_stage() -> None:
    """Linear: 1 − t/S of the full rate after t of a stage's S rounds; each stage starts at its own full rate."""
    local = {"learning_rate": 4.0, "head_learning_rate": 8.0, "schedule": "linear"}
    stages = [{"mode": "head", "rounds": 2}, {"mode": "lora", "rounds": 4, "local": {"learning_rate": 2.0}}]
    falling = plan(train=stages, local={**COMMON, **local})
    rates = [falling.get_stage(round).local for round in range(1, 7)]
    assert [of.learning_rate for of in rates] == [4.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert [of.head_learning_rate for of in rates] == [8.0, 4.0, 8.0, 6.0, 4.0, 2.0]
    assert falling.stages[1].local.learning_rate == 2.0


@pytest.mark.parametrize("round", [-1, 0, 7, 100])
def test_there_is_no_stage_for_other_rounds(round: int) -> None:
    with pytest.raises(ValueError, match=f"expected a round from 1 to 6, got {round}"):
        plan(train=STAGES).get_stage(round)


def test_uses_lora() -> None:
    assert [plan(train=mode).uses_lora for mode in ("head", "lora", "full")] == [False, True, False]
    assert plan(train=STAGES).uses_lora
    assert not plan(train=STAGES[::2]).uses_lora


def test_no_stages_are_refused() -> None:
    with pytest.raises(PlanError, match=r"train.*expected at least one stage"):
        plan(train=[])


# --- sampling


@settings(max_examples=100, deadline=None)
@given(size=st.one_of(st.floats(1e-6, 0.999), st.integers(1, 10_000)), examples=st.integers(1, 100_000))
def test_the_sample_rate_is_a_probability(size: float, examples: int) -> None:
    rate = LocalTraining(batch_size=size).sample_rate(examples)
    assert 0 < rate <= 1
    if size < 1:
        assert rate == size
    elif size <= examples:
        assert rate * examples == pytest.approx(size)
    else:
        assert rate == 1


def test_batches_are_whole_or_fractions() -> None:
    with fails_with("plan.invalid", "local.batch_size", "1.5", "1"):
        plan(local={"batch_size": 1.5})
    assert plan(local={"batch_size": 64}).local.batch_size == 64


@given(examples=st.integers(1, 100_000), steps=st.integers(1, 50))
def test_all_records_in_a_step_need_no_sampling(examples: int, steps: int) -> None:
    local = LocalTraining(batch_size="all", steps=steps)
    assert local.sample_rate(examples) == 1.0
    assert local.steps_per_round(examples) == steps
    assert LocalTraining(batch_size="all", epochs=3).steps_per_round(examples) == 3


@pytest.mark.parametrize("size", ["none", "ALL", True, 0, -1, 1e7, [1]])
def test_batches_of_another_kind_are_refused(size: object) -> None:
    with pytest.raises(PlanError) as caught:
        plan(local={"batch_size": size})
    assert caught.value.code == "plan.invalid"


def test_labels_are_distinct() -> None:
    with pytest.raises(PlanError, match=r"labels: expected distinct class names, got \['a', 'b', 'a'\]"):
        plan(labels=["a", "b", "a"])


def test_asking_more_than_a_sample_needs_a_sample() -> None:
    with fails_with("plan.invalid", "over_selection", "0.5", "sample_size"):
        plan(server={"over_selection": 0.5})
    assert plan(server={"over_selection": 0.5, "sample_size": 2}).server.over_selection == 0.5


def test_weights_of_classes_stand_in_the_order_of_the_head() -> None:
    weighted = plan(labels=["rare", "common", "true"], class_weights={"common": 0.05, "True": 2})
    assert weighted.weights_of_classes() == (1.0, 0.05, 2.0)
    assert plan(labels=["a", "b"], class_weights={"a": 1}).weights_of_classes() is None
    assert plan().weights_of_classes() is None


@pytest.mark.parametrize(
    "weights", [{"a": 0}, {"a": -1}, {"a": True}, {"a": float("nan")}, {"a": 1e7}, {"c": 1}, {"a": 1, " a": 2}, 3]
)
def test_weights_that_are_none_are_refused(weights: object) -> None:
    with pytest.raises(PlanError):
        plan(labels=["a", "b"], class_weights=weights)


def test_a_changed_copy_has_its_own_plan_id() -> None:
    one = rich()
    before = one.plan_id
    other = one.model_copy(update={"seed": one.seed + 1})
    deep = one.model_copy(update={"seed": one.seed + 1}, deep=True)
    assert other.plan_id == deep.plan_id == parse_plan(json.loads(other.canonical())).plan_id
    assert other.plan_id != before == one.plan_id

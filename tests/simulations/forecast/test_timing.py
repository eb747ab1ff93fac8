"""What an estimate counts, with a watch by which everything takes one second."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.data.dataset import Dataset
from cotune.data.inputs.batching import LENGTHS, fixed_batches
from cotune.models.encoding import encoded_examples
from cotune.models.features.feature_batches import feature_batches, feature_slots
from cotune.models.features.kept_states import StateReader, get_states
from cotune.models.features.lower_layers import find_lower_layers
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.simulations.forecast.stopwatch import Seconds, Stopwatch, by_length, measure
from cotune.simulations.forecast.timing import _expect_batches, draw_sample, estimate
from cotune.simulations.prepare import Prepared, prepare
from tests.support.language_models import language_model
from tests.support.simulations import NewPlan

__all__ = ["language_model"]  # fixtures

ALONE = {"baselines": ["alone"]}
POOLED = {"baselines": ["pooled"]}


@pytest.fixture(autouse=True)
def _no_features_of_other_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))


def a_second(work: Callable[[], object]) -> Seconds:
    work()
    return Seconds(1.0, 1.0)


def counted(plan: Plan) -> float:
    """Seconds of a plan, each batch and each step taking one; without what is waited for beside them."""
    prepared = prepare(plan, "cpu")
    return estimate(prepared, get_plan_model(prepared.plan, "cpu"), 0.0, a_second, math.inf).seconds.low


def batches(prepared: Prepared, lengths: Any, slots: int) -> int:
    """Of all records, as they are really made; lengths None: of features."""
    model = get_plan_model(prepared.plan, "cpu")
    total = 0
    for records in prepared.records.values():
        examples = encoded_examples(Dataset(((records, range(len(records))),), prepared.plan.labels), model)  # type: ignore[arg-type]
        task = model.loaded.task
        longest = model.loaded.max_length
        if lengths is None:
            total += len(list(feature_batches(model, examples, slots)))
            continue
        total += len(list(fixed_batches(range(len(examples)), lambda i: task.bucket(examples[i], longest, lengths), slots)))  # noqa: B023
    return total


def simulation(**changes: Any) -> dict[str, Any]:
    return {"clients": 2, "partition": "iid", "baselines": [], **changes}


def test_steps_rounds_and_encoding_are_counted(toy_plan: NewPlan) -> None:
    one, three = (counted(toy_plan(rounds=rounds, local={"steps": 7}, simulation=simulation())) for rounds in (1, 3))
    assert three - one == pytest.approx(2 * 2 * 7, rel=0.02)  # two rounds more, of two organizations
    prepared = prepare(toy_plan(), "cpu")
    encoded = batches(prepared, None, feature_slots(torch.device("cpu")))
    assert one == pytest.approx(2 * 7 + encoded, abs=0.3)


def test_baselines_are_counted(toy_plan: NewPlan) -> None:
    def of(**changes: Any) -> float:
        return counted(toy_plan(rounds=3, local={"steps": 7}, simulation=simulation(**changes)))

    without = of()
    steps = 3 * 2 * 7
    assert of(**POOLED) - without == pytest.approx(0.4 * (6 * 2 + 1), rel=0.02)  # heads fitted to two parts, then to all records
    assert of(**POOLED, pooled={"steps": 20}) - without == pytest.approx(3 * 2 * 20, rel=0.02)
    fits = 2 * (12 * 2 + 2)  # heads fitted to two parts, then to all records, for each organization
    assert of(**ALONE) - without == pytest.approx(steps + 0.4 * fits, rel=0.02)


def test_evaluation_and_step_batches_count_for_trained_encoder(toy_plan: NewPlan) -> None:
    """With a watch by which a forward pass of the encoder takes one second: steps have as many as their records fill batches."""
    local = {"steps": 2, "batch_size": 64, "physical_batch_size": 8}
    changes = {"train": "full", "local": local, "simulation": simulation(), "privacy": {"epsilon": 8.0}}
    prepared = prepare(toy_plan(**changes), "cpu")
    model = get_plan_model(prepared.plan, "cpu")
    passes = list[int]()
    encoder = getattr(model.module, model.module.base_model_prefix)

    def by_passes(work: Callable[[], object]) -> Seconds:
        passes.clear()
        work()
        return Seconds(float(len(passes)), float(len(passes)))

    with encoder.register_forward_hook(lambda *_: passes.append(1)):
        one, three = (
            estimate(prepare(toy_plan(**changes, rounds=n), "cpu"), model, 0.0, by_passes, math.inf).seconds.low for n in (1, 3)
        )
    apart = (three - one) / 2  # of a round
    records = sum(map(len, prepared.records.values()))
    filled = batches(prepared, LENGTHS, 8) * 64 / records
    judged = 1  # 36 test records are in one batch
    assert 2 * 2 * filled + judged - 0.5 <= apart <= 2 * 2 * (filled + 3) + judged + 0.5  # the last batch of a length is not full


def test_what_was_spent_before_is_spent_again(toy_plan: NewPlan) -> None:
    prepared = prepare(toy_plan(simulation=simulation()), "cpu")
    model = get_plan_model(prepared.plan, "cpu")
    none, ten = (estimate(prepared, model, spent, a_second).seconds for spent in (0.0, 10.0))
    assert ten.low - none.low == pytest.approx(10.0)


def test_measuring_leaves_the_model_as_it_came(toy_plan: NewPlan) -> None:
    for changes in ({"train": "full"}, {"train": "head"}, {"train": "lora"}):
        prepared = prepare(toy_plan(**changes, privacy={"epsilon": 8.0}), "cpu")
        model = get_plan_model(prepared.plan, "cpu")
        model.load({})
        before = {name: parameter.detach().clone() for name, parameter in model.parameters()}
        found = estimate(prepared, model, 0.0).seconds
        assert 0 < found.low < found.high
        for name, parameter in model.parameters():
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("records", "rows"), [(0.3, 32), (2.4, 4), (30.0, 8), (500.0, 64)])
def test_batches_of_drawn_records_are_counted_as_they_are_drawn(records: float, rows: int) -> None:
    drawn = np.random.default_rng(0).poisson(records, 200_000)
    assert _expect_batches(records, rows) == pytest.approx(float(np.ceil(drawn / rows).mean()), rel=0.02)


@pytest.mark.parametrize(
    ("each", "expected", "slots"),
    [(0.001, 0.05 + 0.128, [4, 16, 64, 128]), (0.01, 2 * (0.05 + 0.64), [4, 16, 64]), (0.2, 32 * (0.05 + 0.8), [4])],
)
def test_what_a_batch_costs_whatever_it_holds_is_not_multiplied(
    toy_plan: NewPlan, each: float, expected: float, slots: list[int]
) -> None:
    """As far as patience goes, larger batches are tried: of a small model four rows cost little more than none."""
    prepared = prepare(toy_plan(), "cpu")
    watch = Stopwatch(prepared.plan, get_plan_model(prepared.plan, "cpu"), draw_sample(prepared))
    tried = list[int]()

    def time(rows: int) -> Seconds:
        tried.append(rows)
        return Seconds(0.05 + each * rows, 0.05 + each * rows)

    assert watch._scaled(128, time).low == pytest.approx(expected)
    assert tried == slots


def test_a_batch_of_a_length_between_costs_something_between() -> None:
    costs = {8: Seconds(1.0, 2.0), 32: Seconds(4.0, 8.0)}
    assert by_length(costs, 8) == costs[8]
    assert by_length(costs, 20) == Seconds(2.5, 5.0)
    assert by_length(costs, 64) == costs[32]


def test_the_watch_runs_what_it_measures_again() -> None:
    runs = list[int]()
    found = measure(lambda: runs.append(1))
    assert len(runs) >= 2
    assert 0 <= found.low <= found.high


@pytest.mark.parametrize(
    ("lasting", "found"),
    [
        ([4.0, 0.5], Seconds(0.4, 0.55)),  # the first is ten times as slow as what follows, and does not count
        ([0.01, 0.02, 0.04, 0.03], Seconds(0.02, 0.04)),
        ([10.0], Seconds(8.0, 11.0)),  # nobody waits for that again
    ],
)
def test_what_ran_first_is_no_measure_unless_it_takes_very_long(lasting: list[float], found: Seconds) -> None:
    now = [0.0]
    left = iter(lasting)

    def work() -> None:
        now[0] += next(left)

    measured = measure(work, lambda: now[0])
    assert (measured.low, measured.high) == (pytest.approx(found.low), pytest.approx(found.high))
    assert next(left, None) is None


def test_batches_that_are_measured_are_of_one_length_each(toy_plan: NewPlan) -> None:
    """So that none pays for another's padding; the shortest and the longest are among them."""
    prepared = prepare(toy_plan(), "cpu")
    model = get_plan_model(prepared.plan, "cpu")
    ((file, records),) = prepared.records.items()
    sample = Dataset(((records, range(len(records))),), prepared.plan.labels)  # type: ignore[arg-type]
    watch = Stopwatch(prepared.plan, model, sample, a_second)
    lengths = watch.lengths(None)
    measured = set(watch.encoding())
    assert measured <= set(lengths)
    assert {min(lengths), max(lengths)} <= measured
    assert file is None


# --- a large model: what is below the trained layers is kept, and batches take long


def language_plan(language_model: Callable[..., Path]) -> Plan:
    local = {"optimizer": "sgd", "learning_rate": 0.1, "steps": 1, "batch_size": 0.5, "physical_batch_size": 32}
    table = {
        "name": "language",
        "task": "causal-lm",
        "train": "lora",
        "rounds": 1,
        "privacy": "none",
        "lora": {"rank": 2, "layers": 1, "targets": ["gate_proj", "up_proj", "down_proj"]},
        "model": {"base": str(language_model("llama")), "max_length": 32},
        "data": {"source": "package:cotune", "prompt": "long", "target": "short"},
        "local": local,
        "simulation": {"partition": "column:team", "baselines": []},
    }
    return parse_plan(table)


def test_hidden_states_are_computed_for_few_records_and_counted_for_all(language_model: Callable[..., Path]) -> None:
    """Rows that pass the first layer, against those of a run, which computes the states of every record once."""
    prepared = prepare(language_plan(language_model), "cpu")
    model = get_plan_model(prepared.plan, "cpu")
    rows = list[int]()
    lower = find_lower_layers(model, model.adapter_names())
    assert lower is not None
    estimate_of = partial(estimate, prepared, model, 0.0, patience=-1.0)  # nothing is measured whole

    def by_rows(work: Callable[[], object]) -> Seconds:
        before = sum(rows)
        work()
        return Seconds(float(sum(rows) - before), float(sum(rows) - before))

    with lower.layers[0].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0]))):  # type: ignore[operator]
        found = estimate_of(by_rows)
        assert sum(rows) < 100
        records = sum(map(len, prepared.records.values()))
        assert found.records == records == 2000
        assert 0 < found.timed_records < 20
        assert records <= found.seconds.low - 10 * 0.04 < 1.2 * records  # 31 of 32 slots are filled; 10 organizations wait
        reader = StateReader(model, lower, 32, False)
        everything = next(iter(prepared.records.values()))
        get_states(reader, Dataset(((everything, np.arange(1)),), (), "causal-lm"), {})
        assert estimate_of(by_rows).seconds.low == pytest.approx(10 * 0.04)  # they are on disk now


def test_the_sample_is_drawn_by_the_seed_of_the_plan(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.simulations.forecast.timing._SAMPLE", 20)
    ((_, rows),), ((_, again),), ((_, other),) = (draw_sample(prepare(toy_plan(seed=seed), "cpu")).parts for seed in (1, 1, 2))
    assert len(set(rows.tolist())) == 20
    assert rows.tolist() == again.tolist() != other.tolist()

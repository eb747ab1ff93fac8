from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Optional

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from cotune.errors import PlanError, RunError
from cotune.strategies.aggregator import Aggregator
from cotune.strategies.flower import FlowerFusion, _Roll, build_flower_component, load_flower_strategy
from cotune.strategies.flower_state import list_state, restore_state
from cotune.strategies.registry import Visibility, get_builtin_components
from cotune.strategies.types import RoundContext, Update
from tests.support.failures import fails_with

SHAPES = {"z.weight": (4, 3), "a.bias": (4,)}
EXAMPLES = (100, 250, 70, 330, 120)


@pytest.fixture(autouse=True)
def _a_server() -> Iterator[None]:
    """Flower's messages want to know who makes them."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def trained(state: dict[str, Tensor], round: int) -> list[Update]:
    """Updates that depend on the state, as those of organizations do."""
    generator = torch.Generator().manual_seed(round)
    return [
        Update(
            f"org-{i}",
            round,
            {n: 0.1 * torch.randn(t.shape, generator=generator) - 0.05 * t.float() for n, t in state.items()},
            n,
            1,
        )
        for i, n in enumerate(EXAMPLES)
    ]


def through_cotune(name: str, parameters: dict[str, Any], rounds: int) -> list[dict[str, Tensor]]:
    """θ after every round, with a checkpoint between any two."""
    info = load_flower_strategy(f"flwr.serverapp.strategy:{name}")
    given = info.check(parameters)
    state = model()
    memory = dict[str, Tensor]()
    found = []
    for round in range(1, rounds + 1):
        driver = Aggregator(
            (get_builtin_components("weighting")["examples"], {}),
            (info, given),
            RoundContext(round=round, state=state, memory=memory),
        )
        for update in trained(state, round):
            driver.add(update)
        fused = driver.result()
        memory = load(save(dict(fused.memory))) if fused.memory else {}
        state = {n: state[n] + fused.delta[n] for n in state}
        found.append(state)
    return found


def through_flower(strategy: Strategy, rounds: int) -> list[dict[str, Tensor]]:
    """The same with one strategy, used as Flower's own loop does: whole weights, in one process."""
    state = model()
    found = []
    for round in range(1, rounds + 1):
        arrays = ArrayRecord({n: Array(t.numpy()) for n, t in state.items()})
        messages = list(strategy.configure_train(round, arrays, ConfigRecord(), _Roll(len(EXAMPLES))))
        assert len(messages) == len(EXAMPLES)
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({n: Array((state[n] + d.double()).numpy()) for n, d in update.delta.items()}),
                        "metrics": MetricRecord({"num-examples": update.examples}),
                    }
                ),
                reply_to=message,
            )
            for message, update in zip(messages, trained(state, round), strict=True)
        ]
        result, _ = strategy.aggregate_train(round, replies)
        assert result is not None
        state = {n: torch.from_numpy(np.array(result[n].numpy())) for n in state}
        found.append(state)
    return found


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("FedAvg", {}),
        ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.7}),
        ("FedMedian", {}),
        ("FedTrimmedAvg", {"beta": 0.25}),
        ("Krum", {"num_malicious_nodes": 1}),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}),
        ("FedAdam", {"eta": 0.05, "tau": 0.01}),
        ("FedYogi", {"eta": 0.05, "tau": 0.01}),
        ("FedAdagrad", {"eta": 0.05, "tau": 0.01}),
    ],
)
def test_three_rounds_are_those_of_flower(name: str, parameters: dict[str, Any]) -> None:
    own = through_cotune(name, parameters, 3)
    theirs = through_flower(getattr(flower, name)(**parameters), 3)
    for one, other in zip(own, theirs, strict=True):
        for key in SHAPES:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-12)


def test_state_matters_in_the_third_round() -> None:
    """Otherwise the test above would say nothing about what is remembered."""
    state = through_cotune("FedAdam", {"eta": 0.05}, 2)[-1]
    info = load_flower_strategy("flwr.serverapp.strategy:FedAdam")
    forgetful = Aggregator(
        (get_builtin_components("weighting")["examples"], {}),
        (info, info.check({"eta": 0.05})),
        RoundContext(round=3, state=state),
    )
    for update in trained(state, 3):
        forgetful.add(update)
    third = through_cotune("FedAdam", {"eta": 0.05}, 3)[-1]
    assert not torch.allclose(state["a.bias"] + forgetful.result().delta["a.bias"], third["a.bias"], atol=1e-4)


# --- what it says of itself


def test_parameters_are_those_of_the_constructor() -> None:
    info = load_flower_strategy("flwr.serverapp.strategy:Krum")
    assert info.check({}) == {"min_train_nodes": 1, "min_available_nodes": 1, "num_malicious_nodes": 0}
    assert info.min_updates() == 1
    assert (info.needs.visibility, info.needs.sets_state) == (Visibility.PER_CLIENT, True)
    assert info.summary.startswith("Krum")
    with pytest.raises(ValueError, match="has no parameter \"num_malicious\"; did you mean 'num_malicious_nodes'"):
        info.check({"num_malicious": 1})
    with pytest.raises(ValueError, match="num_malicious_nodes = 'many'"):
        info.check({"num_malicious_nodes": "many"})
    with pytest.raises(ValueError, match='no parameter "fraction_train"'):
        info.check({"fraction_train": 0.5})  # the plan's server.sample_rate says who is asked


def test_its_minimum_is_the_least_number_of_updates() -> None:
    """Flower would wait for more of them forever."""
    info = load_flower_strategy("flwr.serverapp.strategy:FedAvg")
    given = info.check({"min_train_nodes": 3})
    assert info.min_updates(**given) == 3
    driver = Aggregator((get_builtin_components("weighting")["uniform"], {}), (info, given), RoundContext(state=model()))
    for update in trained(model(), 1)[:2]:
        driver.add(update)
    with fails_with("run.too_few_updates", "3", "2"):
        driver.result()


class Own(FedAvg):
    """A strategy of one's own: it counts its rounds and keeps what it likes."""

    def __init__(self, temperature: float = 1.0, note: str | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.temperature = temperature
        self.note = note
        self.seen: dict[str, Any] = {"rounds": 0, "norms": [], "last": None, 3: (True, 1.5)}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        self.seen["rounds"] += 1
        self.seen["norms"].append(float(np.linalg.norm(arrays["a.bias"].numpy())))
        self.seen["last"] = arrays
        self.note = f"round {server_round} ✓"
        return arrays, metrics


def test_state_of_any_form_comes_back() -> None:
    info = build_flower_component("mine.py:Own", Own)
    given = info.check({"temperature": 0.5})
    assert given == {"temperature": 0.5, "note": None, "min_train_nodes": 1, "min_available_nodes": 1}
    memory: dict[str, Tensor] = {}
    for round in (1, 2):
        driver = Aggregator(
            (get_builtin_components("weighting")["uniform"], {}),
            (info, given),
            RoundContext(round=round, state=model(), memory=memory),
        )
        for update in trained(model(), round):
            driver.add(update)
        memory = load(save({n: t.contiguous() for n, t in driver.result().memory.items()}))
    assert isinstance(info.build, FlowerFusion)
    strategy = info.build.build(given)
    restore_state(strategy, {path: tensor for path, tensor in memory.items() if path.startswith("[")})
    assert isinstance(strategy, Own)
    assert (strategy.seen["rounds"], strategy.note, strategy.temperature) == (2, "round 2 ✓", 0.5)
    assert strategy.seen[3] == (True, 1.5)
    assert len(strategy.seen["norms"]) == 2
    assert list(strategy.seen["last"]) == ["a.bias", "z.weight"]
    assert strategy.seen["norms"][1] == np.linalg.norm(strategy.seen["last"]["a.bias"].numpy())


# --- what is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FedProx", 'expected the strategy "fedprox"'),
        ("QFedAvg", 'expected the strategy "qfedavg"'),
        ("FedXgbBagging", "as cotune trains no trees"),
        ("FedXgbCyclic", "as cotune trains no trees"),
        ("DifferentialPrivacyServerSideFixedClipping", "expected the plan's table client_privacy"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "expected the plan's table client_privacy"),
        ("FedAvgg", "has no strategy \"FedAvgg\"; did you mean 'FedAvg'?"),
        ("Result", 'has no strategy "Result"'),
    ],
)
def test_what_wants_more_of_organizations_is_refused(name: str, words: str) -> None:
    with pytest.raises(PlanError) as error:
        load_flower_strategy(f"flwr.serverapp.strategy:{name}")
    assert words in str(error.value)


def test_a_module_that_is_not_there() -> None:
    with fails_with("plan.flower_import_failed"):
        load_flower_strategy("flwr.no_such:Krum")


class Chatty(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Iterable[Message]:
        config["learning-rate"] = 0.1
        return super().configure_train(server_round, arrays, config, grid)


class Prunes(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Iterable[Message]:
        return super().configure_train(server_round, ArrayRecord({"x": Array(np.ones(1))}), config, grid)


class Calls(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Iterable[Message]:
        return list(grid.send_and_receive([]))


class Modest(FedAvg):
    """As most people write one: it leaves Flower's sampling as it is, which waits for two nodes."""

    def __init__(self, temperature: Optional[float] = None) -> None:  # noqa: UP045
        super().__init__()


class Waits(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Iterable[Message]:
        while len(list(grid.get_node_ids())) < 10:
            pass
        return []


class Bounded(FedAvg):
    def __init__(self, clip: float = 1.0) -> None:
        super().__init__()
        if clip <= 0:
            raise ValueError("clip must be positive")


@pytest.mark.parametrize(
    ("strategy", "parameters", "words"),
    [
        (Chatty, {}, 'sends organizations "learning-rate", and they train as the plan says'),
        (Prunes, {}, "sends organizations other arrays than the model"),
        (Calls, {}, "talks to organizations by itself"),
        (Waits, {}, "waits for more organizations to come"),
        (Bounded, {"clip": -1.0}, "cannot be made (ValueError: clip must be positive)"),
    ],
)
def test_it_is_refused_when_the_plan_is_made(strategy: type[Strategy], parameters: dict[str, Any], words: str) -> None:
    info = build_flower_component("mine.py:Strategy", strategy)
    assert isinstance(info.build, FlowerFusion)
    with pytest.raises(PlanError) as error:
        info.build.rehearse(info.check(parameters))
    assert words in str(error.value)


def test_a_strategy_that_says_nothing_of_sampling_does_not_wait() -> None:
    info = build_flower_component("mine.py:Modest", Modest)
    assert isinstance(info.build, FlowerFusion)
    assert info.check({"temperature": 2}) == {"temperature": 2.0}
    info.build.rehearse(info.check({}))


def test_a_stage_that_shares_other_parameters_starts_again() -> None:
    """FedAdam would look for averages that it does not have."""
    info = load_flower_strategy("flwr.serverapp.strategy:FedAdam")

    def round_of(number: int, names: list[str], memory: Any) -> Any:
        context = RoundContext(round=number, state=model(), memory=memory)
        driver = Aggregator((get_builtin_components("weighting")["uniform"], {}), (info, info.check({})), context)
        for update in trained(model(), number):
            driver.add(replace(update, delta={name: update.delta[name] for name in names}))
        return driver.result()

    first = round_of(1, ["a.bias"], {})
    after = round_of(2, ["a.bias", "z.weight"], first.memory)
    alone = round_of(2, ["a.bias", "z.weight"], {})
    assert all(after.delta[name].equal(alone.delta[name]) for name in SHAPES)


numbers = st.one_of(st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=5))
arrays = st.lists(st.floats(-9, 9), max_size=3).map(lambda values: np.array(values, np.float64))
keys = st.one_of(st.text(max_size=5), st.integers(0, 9))
held = st.recursive(
    numbers | arrays,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Of the same types, values and order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and np.array_equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return all(map(same, one, other)) and len(one) == len(other) if isinstance(one, list | tuple) else bool(one == other)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["m_t", "v_t", "rounds", "note"]), held, min_size=1))
def test_all_that_a_strategy_may_hold_survives_a_checkpoint(attributes: dict[str, Any]) -> None:
    before = FedAvg()
    after = FedAvg()
    vars(before).update(attributes)
    memory = {path: tensor for name, kept in list_state(before) if name in attributes and kept for path, tensor in kept.items()}
    restore_state(after, load(save(memory)))
    assert same({name: vars(after)[name] for name in attributes}, attributes)


def test_a_constructor_that_wants_objects_is_refused() -> None:
    class Wrapper(FedAvg):
        def __init__(self, inner: Strategy) -> None:
            super().__init__()

    with fails_with("plan.flower_unsupported"):
        build_flower_component("mine.py:Wrapper", Wrapper)


class Keeper(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        given = list(replies)
        self.replies = given
        return super().aggregate_train(server_round, given)


class Fails(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        raise KeyError("loss")


class Silent(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        return None, None


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (Keeper, "keeps replies between rounds, which no checkpoint can hold"),
        (Fails, "failed in round 1 (KeyError: 'loss')"),
        (Silent, "gave nothing for the round"),
    ],
)
def test_a_round_that_cannot_be_had_is_one_sentence(strategy: type[Strategy], words: str) -> None:
    info = build_flower_component("mine.py:Strategy", strategy)
    driver = Aggregator((get_builtin_components("weighting")["uniform"], {}), (info, info.check({})), RoundContext(state=model()))
    for update in trained(model(), 1):
        driver.add(update)
    with pytest.raises(RunError) as error:
        driver.result()
    assert words in str(error.value)


def test_organizations_with_other_parameters_are_refused() -> None:
    info = load_flower_strategy("flwr.serverapp.strategy:FedAvg")
    driver = Aggregator((get_builtin_components("weighting")["uniform"], {}), (info, info.check({})), RoundContext(state=model()))
    first, second = trained(model(), 1)[:2]
    driver.add(first)
    driver.add(replace(second, delta={"a.bias": second.delta["a.bias"]}))
    with fails_with("run.flower_unsupported"):
        driver.result()

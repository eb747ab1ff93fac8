from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cotune.strategies import Aggregate, Component, RoundContext, StrategyConfig, Update
from cotune.strategies.aggregator import build_aggregator, build_server_optimizer
from cotune.strategies.config import expand
from cotune.strategies.server_optimizers.sgd import ServerSGD


def config(**table: Any) -> StrategyConfig:
    return StrategyConfig.model_validate(table)


def error(**table: Any) -> str:
    """What is wrong with a table, as the first complaint says."""
    with pytest.raises(ValidationError) as raised:
        config(**table)
    return str(raised.value.errors()[0]["msg"])


def fused(strategy: StrategyConfig, *pairs: tuple[float, int]) -> float:
    """The fused delta of updates (Δ, n)."""
    combination = build_aggregator(strategy, RoundContext())
    for value, examples in pairs:
        combination.add(Update("a", 1, {"w": torch.tensor([value])}, examples=examples, steps=1))
    result = combination.result()
    assert isinstance(result, Aggregate)
    return result.delta["w"].item()


def test_the_default_is_federated_averaging() -> None:
    strategy = StrategyConfig()
    assert build_server_optimizer(strategy) == ServerSGD(lr=1.0, momentum=0.0)
    assert fused(strategy, (1.0, 100), (5.0, 300)) == 4.0
    assert strategy == config(weighting="examples", fusion="mean", server_optimizer="sgd")


def test_a_name_alone_and_a_table_mean_the_same() -> None:
    assert config(fusion="mean", server_optimizer="sgd", weighting="uniform") == config(
        fusion={"name": "mean"}, server_optimizer={"name": "sgd"}, weighting={"name": "uniform"}
    )


def test_a_plan_says_every_parameter_whether_given_or_not() -> None:
    """Another default in another version must not change what a kept plan means."""
    assert config(server_optimizer="sgd").server_optimizer.parameters == {
        "lr": 1.0,
        "momentum": 0.0,
        "nesterov": False,
        "schedule": "constant",
        "warmup": 0,
    }
    assert config(server_optimizer={"lr": 0.5}) == config(server_optimizer={"name": "sgd", "lr": 0.5, "momentum": 0.0})
    assert config(server_optimizer={"name": "sgd", "lr": 1}) == config(server_optimizer="sgd")


def test_parameters_reach_the_part() -> None:
    strategy = config(server_optimizer={"name": "sgd", "lr": 0.5, "momentum": 0.9}, weighting={"name": "examples", "cap": 100})
    assert build_server_optimizer(strategy) == ServerSGD(lr=0.5, momentum=0.9)
    assert fused(strategy, (1.0, 100), (5.0, 300)) == 3.0


def test_every_round_gets_a_combination_of_its_own() -> None:
    strategy = StrategyConfig()
    assert fused(strategy, (1.0, 1)) == 1.0
    assert fused(strategy, (3.0, 1)) == 3.0


def test_a_strategy_survives_json() -> None:
    strategy = config(server_optimizer={"name": "sgd", "lr": 1, "momentum": 0.25}, weighting="noise_aware")
    again = StrategyConfig.model_validate_json(strategy.model_dump_json())
    assert again == strategy
    assert again.sends == ("noise",)


def test_a_finished_part_is_checked_too() -> None:
    assert build_server_optimizer(config(server_optimizer=Component.model_validate({"name": "sgd", "lr": 2.0}))) == ServerSGD(
        lr=2.0
    )
    assert "has no parameter" in error(server_optimizer=Component.model_validate({"name": "sgd", "rate": 2.0}))
    assert "unknown fusion" in error(fusion=Component(name="no such"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weighting": "exampels"}, "unknown weighting \"exampels\"; did you mean 'examples'? Known: "),
        ({"fusion": "men"}, "unknown fusion \"men\"; did you mean 'mean'? Known: "),
        ({"server_optimizer": {"name": "sdg"}}, "unknown server optimizer \"sdg\"; did you mean 'sgd'? Known: "),
        ({"fusion": {"name": 3}}, "expected the name of a fusion, or a table with its name and parameters"),
        ({"client_term": {"mu": 3}}, "expected the name of a client term, or a table with its name and parameters"),
        ({"fusion": "os.system"}, 'unknown fusion "os.system"'),
        (
            {"server_optimizer": {"name": "sgd", "mommentum": 0.9}},
            'server optimizer "sgd" has no parameter "mommentum"; did you mean \'momentum\'? Known: ',
        ),
        ({"fusion": {"name": "mean", "density": 0.2}}, 'fusion "mean" has no parameter "density": it takes no parameters'),
        (
            {"server_optimizer": {"name": "sgd", "lr": True}},
            'server optimizer "sgd" has lr = True: input should be a valid number',
        ),
        ({"server_optimizer": {"name": "sgd", "lr": "0.5"}}, "has lr = '0.5': input should be a valid number"),
        ({"server_optimizer": {"name": "sgd", "lr": None}}, "has lr = None: input should be a valid number"),
        ({"server_optimizer": {"name": "sgd", "lr": [1.0]}}, "has lr = [1.0]: input should be a valid number"),
        ({"server_optimizer": {"name": "sgd", "momentum": 1.0}}, "has momentum = 1.0: input should be less than 1"),
        ({"weighting": {"name": "examples", "update": 1}}, 'weighting "examples" has no parameter "update"'),
        ({"weighting": {"name": "uniform", "context": 1}}, 'has no parameter "context"'),
        ({"optimizer": "sgd"}, "Extra inputs are not permitted"),
        ({"fusion": "rules.py:best"}, "has no SHA-256 of its file"),
        ({"client_term": "rules.py:best"}, "expected one of cotune, or of a package that every organization has"),
    ],
)
def test_what_is_wrong_is_said(table: dict[str, Any], message: str) -> None:
    assert message in error(**table)


@pytest.mark.parametrize("part", ["weighting", "fusion", "server_optimizer", "client_term"])
@pytest.mark.parametrize("value", [3, None, ["mean"], True, 0.5])
def test_a_part_of_another_type_is_refused(part: str, value: object) -> None:
    """As an error of validation, which names the key: not as an AttributeError."""
    if not (part == "client_term" and value is None):
        assert error(**{part: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_refused(value: float) -> None:
    """TOML can say nan and inf; a model cannot be moved by either."""
    assert "lr" in error(server_optimizer={"name": "sgd", "lr": value})


@pytest.mark.parametrize(("name", "key"), [("geometric_median", "fusion"), ("uniform", "weighting"), ("proximal", "client_term")])
def test_a_part_in_the_place_of_a_strategy_is_told_its_own(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf'"{name}" is a part and no strategy: expected strategy\.{key} = "{name}"'):
        expand({"strategy": name})

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cotune.strategies import Part, ServerSGD, StrategyConfig, Update, WeightedMean


def config(**table: Any) -> StrategyConfig:
    return StrategyConfig.model_validate(table)


def error(**table: Any) -> str:
    """What is wrong with a table, as the first complaint says."""
    with pytest.raises(ValidationError) as raised:
        config(**table)
    return str(raised.value.errors()[0]["msg"])


def test_the_default_is_federated_averaging() -> None:
    strategy = StrategyConfig()
    assert (strategy.weighting.name, strategy.fusion.name, strategy.server_optimizer.name) == (
        "examples",
        "mean",
        "sgd",
    )
    assert isinstance(strategy.new_fusion(), WeightedMean)
    assert strategy.new_server_optimizer() == ServerSGD(lr=1.0, momentum=0.0)
    assert strategy.weigh(Update("a", 1, {}, examples=12, steps=1)) == 12.0


def test_a_name_alone_and_a_table_mean_the_same() -> None:
    assert config(fusion="mean", server_optimizer="sgd", weighting="uniform") == config(
        fusion={"name": "mean"}, server_optimizer={"name": "sgd"}, weighting={"name": "uniform"}
    )


def test_parameters_reach_the_part() -> None:
    strategy = config(server_optimizer={"name": "sgd", "lr": 0.5, "momentum": 0.9}, weighting="uniform")
    assert strategy.server_optimizer.parameters == {"lr": 0.5, "momentum": 0.9}
    assert strategy.new_server_optimizer() == ServerSGD(lr=0.5, momentum=0.9)
    assert strategy.weigh(Update("a", 1, {}, examples=12, steps=1)) == 1.0


def test_every_run_gets_a_fusion_of_its_own() -> None:
    strategy = StrategyConfig()
    first = strategy.new_fusion()
    first.add({"w": torch.ones(1)}, 1.0)
    assert strategy.new_fusion().result() == {}


def test_a_strategy_survives_json() -> None:
    strategy = config(server_optimizer={"name": "sgd", "lr": 1, "momentum": 0.25}, weighting="uniform")
    again = StrategyConfig.model_validate_json(strategy.model_dump_json())
    assert again == strategy
    assert again.new_server_optimizer() == ServerSGD(lr=1, momentum=0.25)


def test_a_finished_part_is_checked_too() -> None:
    assert config(server_optimizer=Part.model_validate({"name": "sgd", "lr": 2.0})).new_server_optimizer() == ServerSGD(lr=2.0)
    assert "has no parameter" in error(server_optimizer=Part.model_validate({"name": "sgd", "rate": 2.0}))
    assert "unknown fusion" in error(fusion=Part(name="median"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"weighting": "exampels"},
            "unknown weighting \"exampels\"; did you mean 'examples'? Known: examples, noise_aware, uniform",
        ),
        ({"fusion": "men"}, "unknown fusion \"men\"; did you mean 'mean'? Known: mean"),
        ({"server_optimizer": {"name": "sdg"}}, "unknown server optimiser \"sdg\"; did you mean 'sgd'? Known: sgd"),
        ({"fusion": {}}, "unknown fusion"),
        ({"fusion": "os.system"}, 'unknown fusion "os.system"'),
        (
            {"server_optimizer": {"name": "sgd", "mommentum": 0.9}},
            'server optimiser "sgd" has no parameter "mommentum"; did you mean \'momentum\'? Known: lr, momentum',
        ),
        ({"fusion": {"name": "mean", "density": 0.2}}, 'fusion "mean" has no parameter "density"'),
        (
            {"server_optimizer": {"name": "sgd", "lr": True}},
            'server optimiser "sgd": expected a number for lr, got True',
        ),
        ({"server_optimizer": {"name": "sgd", "lr": "0.5"}}, "expected a number for lr, got '0.5'"),
        ({"server_optimizer": {"name": "sgd", "lr": None}}, "expected a number for lr, got None"),
        ({"server_optimizer": {"name": "sgd", "lr": [1.0]}}, "expected a number for lr, got [1.0]"),
        ({"weighting": {"name": "examples", "update": 1}}, "a weighting takes no parameters"),
        ({"weighting": {"name": "uniform", "power": 1}}, "parameter"),
        ({"optimizer": "sgd"}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_said(table: dict[str, Any], message: str) -> None:
    assert message in error(**table)


@pytest.mark.parametrize("part", ["weighting", "fusion", "server_optimizer"])
@pytest.mark.parametrize("value", [3, None, ["mean"], True, 0.5])
def test_a_part_of_another_type_is_refused(part: str, value: object) -> None:
    """As an error of validation, which names the key: not as an AttributeError."""
    assert error(**{part: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_refused(value: float) -> None:
    """TOML can say nan and inf; a model cannot be moved by either."""
    assert "lr" in error(server_optimizer={"name": "sgd", "lr": value})

"""The matrix of strategies and runs, with made-up parts that need one thing each."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cotune.strategies import Needs, StrategyConfig, Visibility
from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.registry import ComponentInfo, Kind


def part(kind: Kind, least: int = 1, **needs: Any) -> dict[Kind, ComponentInfo]:
    return {kind: ComponentInfo(kind, "tried", lambda updates: {}, "a test", Needs(**needs), lambda **_: least)}


def problem(facts: PlanFacts, infos: dict[Kind, ComponentInfo], **strategy: Any) -> str | None:
    return find_problem(StrategyConfig.model_validate(strategy), facts, infos)


NOTHING = PlanFacts()


def strategy(**parts: Any) -> StrategyConfig:
    return StrategyConfig.model_validate({"weighting": "uniform", **parts})


def test_federated_averaging_goes_with_everything() -> None:
    everything = PlanFacts(
        record_privacy=True, sums_only=True, participation=0.01, organizations=1, optimizers=("adamw",), momentum=True, one_rate=False,
        modes=("full",), mixed_ranks=True,
    )  # fmt: skip
    assert find_problem(StrategyConfig(), everything) is None
    uniform = StrategyConfig.model_validate({"weighting": "uniform", "server_optimizer": {"momentum": 0.9}})
    assert find_problem(uniform, PlanFacts(client_privacy=True, record_privacy=True, sums_only=True)) is None


@pytest.mark.parametrize("sends", [["fisher"], ["gram"]])
def test_statistics_are_refused_under_record_privacy(sends: list[str]) -> None:
    """Parts in files are never opened by organizations: what the plan says is all that they know of what is sent."""
    for strategy in ({"sends": sends}, {"sends": sends, "fusion": {"name": "mine.py:mine", "sha256": "00" * 32}}):
        found = problem(PlanFacts(record_privacy=True), {}, **strategy)
        assert found is not None
        assert "strategy.sends asks for statistics" in found
        assert problem(NOTHING, {}, **strategy) is None


@pytest.mark.parametrize(
    ("facts", "infos", "reason"),
    [
        (PlanFacts(record_privacy=True), part("fusion", sends=("fisher",)), r"statistics of the records \(fisher\) that no noise protects"),
        (PlanFacts(client_privacy=True), part("weighting"), 'expected strategy.weighting = "uniform"'),
        (PlanFacts(client_privacy=True), part("fusion"), 'expected strategy.fusion = "mean"'),
        (PlanFacts(client_privacy=True), part("server_optimizer", client_privacy="it is told norms"), "with client_privacy: it is told norms"),
        (PlanFacts(sums_only=True), part("fusion", visibility=Visibility.PER_CLIENT), "must see each update, and server.visibility"),
        (PlanFacts(sums_only=True), part("fusion", visibility=Visibility.SUM_2PASS), "must see sums, in several passes"),
        (PlanFacts(sums_only=True), part("weighting"), "compares the updates, and server.visibility allows one sum"),
        (PlanFacts(participation=0.05), part("server_optimizer", participation=0.1), "every 10 rounds, and each is asked with 0.05"),
        (PlanFacts(organizations=4), part("fusion", least=5), "needs 5 updates in a round, and the plan asks 4 organizations"),
        (PlanFacts(optimizers=("sgd", "adam")), part("server_optimizer", optimizers=("sgd",)), "local.optimizer = sgd, and the plan has adam"),
        (PlanFacts(momentum=True), part("server_optimizer", momentum=False), "local.momentum above 0: expected 0"),
        (PlanFacts(one_rate=False), part("server_optimizer", optimizers=("sgd",)), "another local.head_learning_rate"),
        (NOTHING, part("fusion", adapters=("b",)), "no stage of the plan trains any: expected train = lora"),
        (PlanFacts(modes=("head", "lora"), factors="ab"), part("fusion", adapters=("b",)), "is for lora.factors = b, and the plan has ab"),
        (PlanFacts(mixed_ranks=True), part("fusion"), "cannot fuse adapters of different ranks"),
        (NOTHING, part("fusion", server_data=True), "expected validation_fraction above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(facts: PlanFacts, infos: dict[Kind, ComponentInfo], reason: str) -> None:
    found = problem(facts, infos, weighting="uniform")
    assert found is not None
    assert re.search(reason, found), found
    assert problem(PlanFacts(modes=("lora",), factors="b", server_data=True), infos) is None


def test_per_parameter_weights_need_a_fusion_that_takes_them() -> None:
    assert problem(NOTHING, part("fusion", by_parameter=True), weighting="noise_aware") is None
    found = problem(NOTHING, part("fusion"), weighting="noise_aware")
    assert found is not None
    assert 'the weighting "noise_aware" weighs every parameter by itself, which the fusion "mean" cannot follow' in found


def test_what_is_named_instead_can_be_had() -> None:
    """Of two reasons the one whose way out leaves no other."""
    assert 'expected weighting = "uniform"' in str(find_problem(strategy(weighting="noise_aware", fusion="krum"), NOTHING))
    assert 'a weighting such as "uniform"' in str(find_problem(strategy(weighting="noise_aware", fusion="ties"), NOTHING))
    sums = PlanFacts(sums_only=True, server_data=True)
    assert 'a rule of one sum, such as "uniform"' in str(find_problem(strategy(weighting="validation"), sums))
    ranks = PlanFacts(sums_only=True, mixed_ranks=True, modes=("lora",), factors="alternate")
    assert 'a fusion that can, such as "mean"' in str(find_problem(strategy(fusion="model_stock"), ranks))
    assert find_problem(strategy(), ranks) is None


def test_a_judge_of_whole_models_takes_no_smaller_ranks() -> None:
    ranks = PlanFacts(mixed_ranks=True, server_data=True, modes=("lora",), factors="ab")
    assert "is about whole adapters" in str(find_problem(strategy(weighting="validation", fusion="flexlora"), ranks))


@pytest.mark.parametrize("fusion", ["median", "krum", "norm_bound", "centered_clipping", "model_stock", "dare"])
def test_a_step_found_from_the_norms_needs_the_mean(fusion: str) -> None:
    """One update of a huge norm, which a robust fusion leaves out, would make the step huge."""
    assert "counts on the mean" in str(find_problem(strategy(fusion=fusion, server_optimizer="fedexp"), NOTHING))
    assert find_problem(strategy(weighting="examples", server_optimizer="fedexp"), NOTHING) is None


def test_smoothness_by_learning_rate_needs_gradient_descent() -> None:
    """With Adam at 0.001 and 10^5 parameters L‖Δ‖² is in the thousands, and the model all but stays."""
    found = str(find_problem(strategy(fusion="q_fedavg"), PlanFacts(optimizers=("adam",))))
    assert "assumes local.optimizer = sgd, and the plan has adam" in found


def test_rounds_of_too_few_by_chance_are_refused() -> None:
    found = str(find_problem(strategy(fusion="krum"), PlanFacts(participation=0.3, organizations=2)))
    assert found.endswith("the plan may ask as few as 2 organizations: expected server.sample_size of 5 or more")


def test_weights_that_nobody_uses_are_refused() -> None:
    assert problem(NOTHING, part("fusion", weights=False), weighting="uniform") is None
    assert 'weighting "examples" would do nothing' in str(problem(NOTHING, part("fusion", weights=False), weighting="examples"))


@pytest.mark.parametrize("server", [{"lr": 0.5}, {"momentum": 0.9}])
def test_a_new_state_is_not_to_be_bent(server: dict[str, float]) -> None:
    assert problem(NOTHING, part("fusion", sets_state=True)) is None
    found = problem(NOTHING, part("fusion", sets_state=True), server_optimizer=server)
    assert found is not None
    assert 'expected server_optimizer = "sgd" with lr 1, no momentum and no schedule' in found

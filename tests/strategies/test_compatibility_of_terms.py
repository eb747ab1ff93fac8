"""Which plans a client term fits into."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import StrategyConfig
from cotune.strategies.registry import ComponentInfo, Needs


def problem(term: str, *, facts: PlanFacts = PlanFacts(), **parts: Any) -> str | None:
    return find_problem(StrategyConfig.model_validate({"client_term": term, **parts}), facts)


@pytest.mark.parametrize("term", ["proximal", "scaffold", "feddyn"])
def test_plain_training_takes_each(term: str) -> None:
    assert problem(term) is None
    assert problem(term, weighting="uniform", facts=PlanFacts(participation=0.5)) is None


@pytest.mark.parametrize("server", [{"name": "sgd", "lr": 0.5}, {"name": "sgd", "momentum": 0.9}, "adam"])
def test_the_model_of_feddyn_is_not_to_be_bent(server: Any) -> None:
    """With momentum 0.9 the quadratics of client_terms/ diverge: its server half sums up the deltas already."""
    assert problem("scaffold", server_optimizer=server) is None
    assert problem("proximal", server_optimizer=server) is None
    assert "gives a new model rather than a direction" in str(problem("feddyn", server_optimizer=server))


@pytest.mark.parametrize("term", ["scaffold", "feddyn"])
def test_sums_of_what_is_kept_want_weights_that_stay(term: str) -> None:
    some = PlanFacts(participation=0.5, server_data=True)
    assert "where not all of them are asked" in str(problem(term, weighting="examples", facts=some))
    for weighting in ("q_fair", "inverse_loss", "tilted", "validation"):
        assert "changes from round to round: expected" in str(
            problem(term, weighting=weighting, facts=PlanFacts(server_data=True))
        )
    assert problem("proximal", weighting="tilted", facts=some) is None


@pytest.mark.parametrize("fusion", ["dare", "norm_bound", "fisher", "regmean", "fedsvd", "median", "fednova"])
def test_what_is_kept_follows_the_mean_alone(fusion: str) -> None:
    adapters = PlanFacts(modes=("lora",), factors="b")
    assert "counts on the mean" in str(problem("scaffold", fusion=fusion, facts=adapters))
    assert problem("scaffold", fusion="fedit", facts=PlanFacts(modes=("lora",), factors="ab")) is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (PlanFacts(optimizers=("adamw",)), "assumes local.optimizer = sgd, and the plan has adamw"),
        (PlanFacts(momentum=True), "assumes plain gradient steps"),
        (PlanFacts(one_rate=False), "assumes one learning rate"),
        (PlanFacts(participation=0.05), "needs every organization at least every 10 rounds"),
        (PlanFacts(client_privacy=True), "is not supported with client_privacy"),
    ],
)
def test_what_scaffold_assumes(facts: PlanFacts, words: str) -> None:
    assert words in str(problem("scaffold", facts=facts, weighting="uniform"))


def test_feddyn_needs_state_but_no_sgd() -> None:
    assert problem("feddyn", facts=PlanFacts(optimizers=("adamw",), one_rate=False)) is None
    assert "every 10 rounds" in str(problem("feddyn", weighting="uniform", facts=PlanFacts(participation=0.05)))


@pytest.mark.parametrize("term", ["proximal", "scaffold", "feddyn"])
def test_noise_fed_back_by_a_term_is_not_the_stated_noise(term: str) -> None:
    assert "knows the noise of plain training" in str(problem(term, weighting="noise_aware"))


@pytest.mark.parametrize("needs", [Needs(sets_state=True), Needs(rewrites=("weight",))])
def test_a_term_with_state_needs_a_mean(needs: Needs) -> None:
    other = ComponentInfo("fusion", "mean", lambda updates: {}, "", needs)
    for term, said in (("scaffold", True), ("feddyn", True), ("proximal", False)):
        strategy = StrategyConfig.model_validate({"client_term": term})
        assert ("counts on the mean" in str(find_problem(strategy, PlanFacts(), {"fusion": other}))) == said

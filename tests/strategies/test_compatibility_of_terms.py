"""Which plans a client term fits into."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.strategies.compatibility import Facts, first_problem
from cotune.strategies.parts import Needs, PartInfo
from cotune.strategies.strategy import StrategyConfig


def problem(term: str, *, facts: Facts = Facts(), **parts: Any) -> str | None:
    return first_problem(StrategyConfig.model_validate({"client_term": term, **parts}), facts)


@pytest.mark.parametrize("term", ["proximal", "scaffold", "feddyn"])
def test_plain_training_takes_each(term: str) -> None:
    assert problem(term) is None
    assert problem(term, weighting="uniform", server_optimizer={"name": "sgd", "lr": 0.5}) is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (Facts(optimizers=("adamw",)), "assumes local.optimizer = sgd, and the plan has adamw"),
        (Facts(momentum=True), "assumes plain gradient steps"),
        (Facts(one_rate=False), "assumes one learning rate"),
        (Facts(participation=0.05), "needs every organisation at least every 10 rounds"),
        (Facts(client_privacy=True), "cannot be had with client_privacy"),
    ],
)
def test_what_scaffold_assumes(facts: Facts, words: str) -> None:
    assert words in str(problem("scaffold", facts=facts, weighting="uniform"))


def test_feddyn_needs_state_but_no_sgd() -> None:
    assert problem("feddyn", facts=Facts(optimizers=("adamw",), one_rate=False)) is None
    assert "every 10 rounds" in str(problem("feddyn", facts=Facts(participation=0.05)))


@pytest.mark.parametrize("term", ["proximal", "scaffold", "feddyn"])
def test_noise_that_a_term_feeds_back_is_not_the_one_that_is_stated(term: str) -> None:
    assert "knows the noise of plain training" in str(problem(term, weighting="noise_aware"))


@pytest.mark.parametrize("needs", [Needs(sets_state=True), Needs(rewrites=("weight",))])
def test_a_term_with_state_needs_a_mean(needs: Needs) -> None:
    other = PartInfo("fusion", "mean", lambda updates: {}, "", needs)
    for term, said in (("scaffold", True), ("feddyn", True), ("proximal", False)):
        strategy = StrategyConfig.model_validate({"client_term": term})
        assert ("counts on the mean" in str(first_problem(strategy, Facts(), {"fusion": other}))) == said

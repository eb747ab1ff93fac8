from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor
from torch.nn import functional

from cotune.strategies.compatibility import PlanFacts, find_problem
from cotune.strategies.config import StrategyConfig
from cotune.strategies.conformance.samples import Case, sample
from cotune.strategies.fusions.predictions.ensemble_distillation import combine_scores
from cotune.strategies.registry import get_builtin_components

NAME = "ensemble_distillation"


def scores(models: int, answers: int = 5, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(models, answers, classes)))


def case(**parameters: object) -> Case:
    info = get_builtin_components("fusion")[NAME]
    return sample(info, info.check(parameters))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 2**16))
def test_mean_is_the_softmax_of_weighted_scores(weights: list[float], seed: int) -> None:
    each = scores(len(weights), seed=seed)
    expected = softmax(np.average(each.numpy(), axis=0, weights=weights), axis=1)
    assert combine_scores(each, torch.tensor(weights, dtype=torch.float64), "mean").numpy() == pytest.approx(expected, abs=1e-12)


def test_vote_is_the_weighted_share_of_each_class() -> None:
    each = torch.tensor([[[1.0, 0.0]], [[0.0, 5.0]], [[0.2, 0.1]]], dtype=torch.float64)
    assert combine_scores(each, torch.tensor([1.0, 1.0, 2.0]), "vote").tolist() == [[0.75, 0.25]]


def test_median_ignores_one_model_however_far_away() -> None:
    each = scores(3)
    hostile = torch.cat([each[:2], torch.full_like(each[2:], 1e9)])
    found = combine_scores(hostile, torch.tensor([1.0, 1.0, 1e9]), "median")
    assert found.numpy() == pytest.approx(softmax(each[:2].max(dim=0).values.numpy(), axis=1))


@pytest.mark.parametrize("combine", ["mean", "median", "vote"])
def test_answer_that_one_model_did_not_read_is_left_out(combine: str) -> None:
    each = scores(3)
    each[1, 2] = torch.nan
    found = combine_scores(each, torch.ones(3, dtype=torch.float64), combine)  # type: ignore[arg-type]
    assert found.isnan().any(dim=1).tolist() == [False, False, True, False, False]
    assert found[[0, 1, 3, 4]].sum(dim=1).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("combine", ["median", "vote"])
def test_distilled_model_is_nearer_to_the_ensemble_than_the_mean(combine: Literal["median", "vote"]) -> None:
    """With the mean of scores there is nothing to distill here: the scores of these samples are linear in the parameters."""
    made = case(combine=combine, learning_rate=0.5, epochs=50)
    public = made.context.public
    assert public is not None
    weights = torch.tensor([made.weights[update.organization] for update in made.updates], dtype=torch.float64)
    taught = combine_scores(torch.stack([public.predict(update.delta) for update in made.updates]), weights, combine)

    def divergence(delta: dict[str, Tensor]) -> float:
        return float(functional.kl_div(functional.log_softmax(public.predict(delta), dim=1), taught, reduction="batchmean"))

    shares = weights / weights.sum()
    middle = {
        name: sum(share * update.delta[name].double() for share, update in zip(shares, made.updates, strict=True))
        for name in made.sent
    }
    assert divergence(middle) > 1e-4  # type: ignore[arg-type]
    assert divergence(dict(made.fuse().delta)) < 0.5 * divergence(middle)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        (PlanFacts(organizations=3), "public.source"),
        (PlanFacts(organizations=3, public_inputs=True, sums_only=True), "server.visibility"),
        (PlanFacts(organizations=3, public_inputs=True, client_privacy=True), "client_privacy"),
        (PlanFacts(organizations=3, public_inputs=True, personal=True), "personal.parts"),
        (PlanFacts(organizations=3, public_inputs=True, folds_late=True), "server.late"),
    ],
)
def test_plans_that_it_cannot_have_are_refused(facts: PlanFacts, part: str) -> None:
    problem = find_problem(StrategyConfig.model_validate({"weighting": "uniform", "fusion": NAME}), facts)
    assert problem is not None
    assert NAME in problem
    assert part in problem


def test_plan_with_public_inputs_can_have_it() -> None:
    facts = PlanFacts(organizations=3, public_inputs=True, record_privacy=True)
    assert find_problem(StrategyConfig.model_validate({"fusion": NAME}), facts) is None

"""Attack: within one run, choose which round to ask for next after seeing an answer.

A run is composed by PLD, on the ground that all its parameters are fixed before the first answer. But a malicious server may ask for a
round again, with another state: it is charged again, and the rest is calibrated again. Two stages (q = 1 for one step, q = .11 for eight),
ε = 3 at δ = 600^-1.5: after round 1 the server goes on as planned (σ = 1.36), or has round 1 again and then goes on (σ = 3.42), whichever
its answer makes better. Each way spends ε = 3, and the choice between them had 1.12 times the δ that is stated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution

from cotune.client.noise_calibration import get_budget, noise_multiplier
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.models.trainable import State
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import DisclosureRules, Policy
from tests.support.failures import fails_with

RECORDS = 600
INTERVAL = 1e-3
POLICY = Policy(disclosures=DisclosureRules(example_count="declared", declared_examples=RECORDS))
PLAN = parse_plan(
    {
        "labels": ("a", "b"),
        "model": {"base": "any"},
        "data": {"source": "records.csv"},
        "privacy": {"epsilon": 3.0},
        "train": [
            {"mode": "head", "rounds": 1, "local": {"batch_size": 600, "steps": 1}},
            {"mode": "head", "rounds": 1, "local": {"batch_size": 66, "steps": 8}},
        ],
    }
)
Array = np.ndarray[tuple[int], np.dtype[np.float64]]


def charged(rounds: list[int], spent: list[Steps]) -> list[Steps]:
    """What the run has spent after these rounds were asked for, one after the other."""
    assert isinstance(PLAN.privacy, RecordPrivacy)
    budget = get_budget(PLAN.privacy, POLICY, RECORDS)
    done = list(spent)
    for round in rounds:
        sigma = noise_multiplier(PLAN, POLICY, budget, RECORDS, round, spent=done)
        local = PLAN.get_stage(round).local
        done.append(Steps(sigma, local.sample_rate(RECORDS), local.steps_per_round(RECORDS)))
        assert epsilon(done, budget.delta) <= budget.epsilon
    return done


def losses(steps: list[Steps]) -> tuple[Array, Array]:
    """Privacy losses of the steps together, and their probabilities; a record is removed."""
    whole = privacy_loss_distribution.identity(value_discretization_interval=INTERVAL)
    for s in steps:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            s.noise_multiplier, value_discretization_interval=INTERVAL, sampling_prob=s.sample_rate
        )
        whole = whole.compose(one.self_compose(s.count))
    dense = whole._pmf_remove.to_dense_pmf()
    return (np.arange(len(dense._probs)) + dense._lower_loss) * INTERVAL, np.asarray(dense._probs)


def delta_after(steps: list[Steps], eps: Array) -> Array:
    """δ of the steps at each ε."""
    values, weights = losses(steps)
    rest = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
    scaled = np.append(np.cumsum((weights * np.exp(-values))[::-1])[::-1], 0.0)
    first = np.searchsorted(values, eps, side="right")
    found: Array = rest[first] - np.exp(eps) * scaled[first]
    return found


def test_cost_of_choosing_if_rounds_could_be_repeated() -> None:
    """What the attack is worth: each way by itself is within δ, the better of both for every answer is not."""
    assert isinstance(PLAN.privacy, RecordPrivacy)
    first = charged([1], [])
    ways = [charged(rounds, first)[1:] for rounds in ([2], [1, 2])]
    seen, weights = losses(first)
    left = [delta_after(way, PLAN.privacy.epsilon - seen) for way in ways]
    stated = PLAN.privacy.delta_for(RECORDS)
    assert all(float(weights @ one) <= stated * 1.01 for one in left)
    assert float(weights @ np.maximum(*left)) > stated * 1.1


@pytest.mark.parametrize("history", [[], [1], [1, 1]])
def test_interrupted_attempts_only_add_noise(history: list[int]) -> None:
    """Nothing of them leaves, so that each released round tells at most what it would by the plan."""
    spent = charged(history, [])
    planned = charged([1], [])[0].noise_multiplier
    assert all(steps.noise_multiplier >= planned for steps in charged([2], spent))


@pytest.mark.parametrize("lost", ["nothing", "the outbox", "the mark"])
def test_an_answered_round_is_not_answered_again(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., Site],
    state_for: Callable[..., State],
    lost: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor one before it; also where the update is gone, or the process was killed before the ledger knew that it is there."""
    plan = make_plan(rounds=4, privacy={"epsilon": 8.0})
    site = make_site()
    state = state_for(plan)
    other = {name: tensor + 0.01 for name, tensor in state.items()}
    with monkeypatch.context() as killed:
        if lost == "the mark":
            killed.setattr(Account, "answered", lambda self, round: None)
        first = train_round(plan, site, 2, state)
    if lost == "the outbox":
        (site.folder / "outbox" / "update.safetensors").unlink()
    else:
        assert torch.equal(train_round(plan, site, 2, state).delta["classifier.weight"], first.delta["classifier.weight"])
    charges = site.ledger().charges()
    for round, asked in ((2, other), (1, state), (1, other)):
        with fails_with("privacy.answered_round"):
            train_round(plan, site, round, asked)
    assert site.ledger().charges() == charges
    assert train_round(plan, site, 3, other).round == 3

"""The tight audit on a real training: its bound comes near the claim, and noise that is 30 % too small breaks the claim.

Margins are at least seven standard errors of the share of right guesses, beyond intervals that hold with a confidence of
1 − 10⁻⁷: a test that fails is no bad luck.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig
from cotune.simulations.auditing import training as audited_training
from cotune.simulations.auditing.audit import AuditResult, audit, tightened
from cotune.simulations.prepare import prepare
from tests.support.simulations import NewPlan

torch.set_num_threads(1)

CLAIM = {"epsilon": 4, "delta": 1e-5}
LOCAL = {"learning_rate": 1.0, "momentum": 0.5, "batch_size": 0.25, "steps": 7}  # none of which the tight audit keeps


def seven_tenths_of_the_noise(config: DPSGDConfig) -> DPSGD:
    return DPSGD(replace(config, noise_multiplier=config.noise_multiplier * 0.7))


def larger_contributions(config: DPSGDConfig) -> DPSGD:
    """A unit moves the sum by 1.43 C; the noise is as claimed."""
    return DPSGD(replace(config, noise_multiplier=config.noise_multiplier * 0.7, clip_norm=config.clip_norm / 0.7))


def audited(plan: Plan, engine: Any, monkeypatch: pytest.MonkeyPatch) -> AuditResult:
    monkeypatch.setattr(audited_training, "DPSGD", engine)
    return audit(plan, canaries=10_000, tight=True, confidence=1 - 1e-7, device="cpu")


def seen(result: AuditResult) -> float:
    """The bound of who sees every step, by the curve of these steps."""
    (attack,) = (attack for attack in result.attacks if attack.name == "canaries, every step")
    return attack.at_least


def test_at_least_sixty_percent_of_the_claim_are_shown(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, 3.12 of 8 was the most that an audit of a real training had shown."""
    result = audited(toy_plan(privacy=CLAIM, local=LOCAL), DPSGD, monkeypatch)
    assert (result.tight, result.rounds, result.steps, result.broken) == (True, 1, 1, False)
    assert result.epsilon == pytest.approx(epsilon([Steps(result.noise_multiplier, 1.0, 1)], 1e-5)) == pytest.approx(4, rel=1e-2)
    assert 0.6 * result.epsilon < seen(result) <= result.epsilon


def test_noise_that_is_thirty_percent_too_small_breaks_the_claim(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the attack itself, and not only in the test of the drawn noise."""
    result = audited(toy_plan(privacy=CLAIM, local=LOCAL), seven_tenths_of_the_noise, monkeypatch)
    assert result.broken
    assert seen(result) > result.epsilon


@pytest.mark.long
def test_a_bound_that_is_too_large_breaks_the_claim(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the noise is as claimed, canaries show it."""
    result = audited(toy_plan(privacy=CLAIM, local=LOCAL), larger_contributions, monkeypatch)
    assert all(not noise.faults for noise in result.noise)
    assert seen(result) > result.epsilon


def test_tight_audit_takes_one_full_step_per_stage(toy_plan: NewPlan) -> None:
    local = {"learning_rate": 0.01, "momentum": 0.0, "batch_size": 0.5, "epochs": 2, "steps": None}
    stages = [{"mode": "head", "rounds": 3}, {"mode": "lora", "rounds": 2, "local": local}]
    plan = toy_plan(train=stages, privacy=CLAIM, lora={"rank": 2})
    tight = tightened(plan, 77)
    assert [(s.mode, s.rounds, s.local.sample_rate(77), s.local.steps_per_round(77)) for s in tight.stages] == [
        ("head", 1, 1.0, 1),
        ("lora", 1, 1.0, 1),
    ]
    assert tight.rounds == 2
    assert [s.local.learning_rate for s in tight.stages] == [s.local.learning_rate for s in plan.stages]
    assert (tight.privacy, tight.model, tight.lora) == (plan.privacy, plan.model, plan.lora)


def test_each_stage_is_audited_once(toy_plan: NewPlan) -> None:
    plan = toy_plan(train=[{"mode": "head", "rounds": 3}, {"mode": "head", "rounds": 2}], privacy=CLAIM)
    result = audit(plan, canaries=64, tight=True, device="cpu")
    assert (result.steps, result.rounds, result.rounds_planned) == (2, 2, 2)
    assert result.plan_id == prepare(plan, "cpu").plan.plan_id  # of the plan that is audited, not of the tight one

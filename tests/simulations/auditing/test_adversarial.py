"""Adversarial states do nothing to the real engine; engines with the old faults are seen through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, StepReport
from cotune.simulations.auditing import training as audited_training
from cotune.simulations.auditing.audit import AuditResult, audit
from tests.support.engines import engine, take_steps
from tests.support.simulations import NewPlan

torch.set_num_threads(1)


def coupled(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """Every row's loss depends on its neighbors a little, as features in a shared padding did."""

    def with_neighbors(batch: Any) -> torch.Tensor:
        losses = setup.loss(batch)
        return losses * (1 + 1e-3 * losses.detach().mean())

    return take_steps(config, replace(setup, loss=with_neighbors))


def twice(config: DPSGDConfig) -> DPSGD:
    return DPSGD(replace(config, clip_norm=2 * config.clip_norm, noise_multiplier=config.noise_multiplier / 2))


def audited(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch, subject: Any, mode: str, claim: float = 2.0) -> AuditResult:
    monkeypatch.setattr(audited_training, "DPSGD", subject)
    local = {"learning_rate": 0.01, "momentum": 0.0, "batch_size": 0.9, "steps": 1}
    lora = {"lora": {"rank": 2}} if mode == "lora" else {}
    privacy = {"epsilon": claim, "delta": 1e-5}
    plan = toy_plan("shallow-bert", train=mode, rounds=1, privacy=privacy, local=local, simulation={"baselines": []}, **lora)
    return audit(plan, canaries=64, confidence=1 - 1e-7, device="cpu")


@pytest.mark.parametrize("mode", ["head", pytest.param("lora", marks=pytest.mark.long), "full"])
def test_no_state_lets_a_record_do_more(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    result = audited(toy_plan, monkeypatch, DPSGD, mode)
    assert result.faults == ()
    names = {probe.state for probe in result.states}
    assert {"as it begins", "a huge head"} <= names
    assert ("a head from a linear system" in names) == (mode == "head")
    assert max(probe.contribution for probe in result.states) > 0.9
    assert all(probe.influence <= probe.rounding and probe.off_grid == 0 for probe in result.states)
    assert all((0 < probe.rounding < 1e-4) if mode == "head" else probe.rounding == 0 for probe in result.states)


def test_much_noise_is_not_taken_for_influence(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With σ = 69, float32 rounded the noised sums that were compared: 3e-5 C "through others", and an honest engine was accused."""
    result = audited(toy_plan, monkeypatch, DPSGD, "head", claim=0.05)
    assert result.noise_multiplier > 50
    assert result.faults == ()
    assert all(probe.influence <= probe.rounding < 1e-4 for probe in result.states)


def test_records_that_reach_each_other_are_seen(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    result = audited(toy_plan, monkeypatch, engine(coupled), "head")
    assert max(probe.influence / probe.rounding for probe in result.states) > 1
    assert result.broken


def test_a_larger_bound_is_seen(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    result = audited(toy_plan, monkeypatch, twice, "head")
    assert max(probe.contribution for probe in result.states) > 1.5
    assert result.broken

"""An audit trains what the organization would train, claims what its plan claims, and leaves everything as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cotune.client.site import Site
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup, StepReport
from cotune.simulations.auditing import training as audited_training
from cotune.simulations.auditing.audit import AuditResult, audit
from cotune.simulations.forecast.forecast import forecast
from cotune.simulations.prepare import prepare
from cotune.simulations.run import simulate
from tests.support.engines import engine, take_steps
from tests.support.failures import fails_with
from tests.support.simulations import NewPlan

SMALL: dict[str, Any] = {"privacy": {"epsilon": 3}, "rounds": 2, "simulation": {"clients": 2, "baselines": []}}
CERTAIN = 1 - 1e-7
QUICK: dict[str, Any] = {"canaries": 64, "confidence": CERTAIN}  # so few refute nothing, which ends the search for a bound


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DPSGDConfig, DPSGDSetup]]:
    """What an audit gives to `DPSGD`."""
    found: list[tuple[DPSGDConfig, DPSGDSetup]] = []

    def watched(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        found.append((config, setup))
        return take_steps(config, setup)

    monkeypatch.setattr(audited_training, "DPSGD", engine(watched))
    return found


def test_audited_is_what_the_plan_would_do(toy_plan: NewPlan, called: list[tuple[DPSGDConfig, DPSGDSetup]]) -> None:
    plan = toy_plan(**SMALL)
    result = audit(plan, organization="org-2", canaries=64, device="cpu")
    seen = forecast(plan, "cpu").organizations[1]
    assert result.organization == seen.name == "org-2"
    assert (result.examples, result.steps, result.noise_multiplier) == (seen.examples, seen.steps, seen.noise_multiplier)
    assert (result.epsilon, result.delta) == (pytest.approx(seen.epsilon_planned), seen.delta)
    assert (result.rounds, result.rounds_planned) == (2, 2)
    trained = [(config, setup) for config, setup in called if config.steps == 5]  # others look at noise and adversarial states
    for config, setup in trained:
        assert config.sample_rate == 0.5
        assert config.noise_multiplier == seen.noise_multiplier
        assert config.clip_norm == 1.0
        assert setup.noise_generator is None
        assert setup.sampling_generator is None
    assert len(trained) == 2
    assert [(a.name, a.targets) for a in result.attacks] == [("canaries", 64), ("records", 64), ("canaries, every step", 64)]
    assert all(0 <= a.auc <= 1 and math.isfinite(a.at_least) and a.at_least <= a.power for a in result.attacks)


@pytest.fixture(scope="module")
def audits(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[AuditResult], Path]:
    """Two audits of the first of two rounds of a plan, and the folder that was the current one."""
    folder = tmp_path_factory.mktemp("current")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings: dict[str, Any] = {"canaries": 200, "rounds": 1, "confidence": CERTAIN, "device": "cpu"}
        return [audit(toy_plan(**SMALL), **settings) for _ in range(2)], folder


def test_fewer_rounds_claim_less(audits: tuple[list[AuditResult], Path]) -> None:
    [result, _], _ = audits
    assert (result.rounds, result.rounds_planned, result.steps) == (1, 2, 5)
    assert result.epsilon == pytest.approx(epsilon([Steps(result.noise_multiplier, 0.5, 5)], result.delta))
    assert result.epsilon < 3


def test_two_audits_are_two_draws(audits: tuple[list[AuditResult], Path]) -> None:
    [one, other], _ = audits
    assert [a.auc for a in one.attacks] != [a.auc for a in other.attacks]


def test_an_audit_of_a_plan_leaves_nothing(audits: tuple[list[AuditResult], Path]) -> None:
    _, folder = audits
    assert list(folder.iterdir()) == []


@pytest.mark.long  # in short: adapters, in test_text_audit
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_other_train_modes_are_audited_too(toy_plan: NewPlan, mode: str) -> None:
    """Also after a stage of another kind, and in ghost clipping."""
    local = {"learning_rate": 0.01, "momentum": 0.0, "batch_size": 0.5, "steps": 2}
    stages = [{"mode": "head", "rounds": 1}, {"mode": mode, "rounds": 1, "local": local}]
    plan = toy_plan("shallow-bert", train=stages, lora={"rank": 2}, **{k: v for k, v in SMALL.items() if k != "rounds"})
    result = audit(plan, canaries=500, confidence=CERTAIN, device="cpu")
    assert (result.steps, result.broken) == (7, False)
    assert result.attacks[0].auc > 0.55  # about 0.7, give or take 0.02: canaries are seen


@pytest.mark.parametrize(
    ("personal", "train", "steps"),
    [
        pytest.param({"parts": ["head"], "order": "own_first", "own_steps": 3}, "lora", 5, marks=pytest.mark.long),
        pytest.param({"parts": ["adapter"]}, "lora", 2, marks=pytest.mark.long),
        ("ditto", "head", 4),
        ({"method": "ditto", "noise": False}, "head", 2),
        pytest.param({"method": "pfedme", "inner_steps": 2}, "head", 2, marks=pytest.mark.long),
    ],
    ids=["own first", "adapter", "ditto", "ditto without noise", "pfedme"],
)
def test_steps_on_what_is_personal_are_audited_too(toy_plan: NewPlan, personal: Any, train: str, steps: int) -> None:
    """All that has noise and is charged; canaries are seen in it, and nothing breaks the claim."""
    local = {"learning_rate": 0.01, "momentum": 0.0, "batch_size": 0.5, "steps": 2}
    plan = toy_plan("shallow-bert", **{**SMALL, "rounds": 1}, train=train, lora={"rank": 2}, local=local, personal=personal)
    result = audit(plan, canaries=500, confidence=CERTAIN, device="cpu")
    assert (result.steps, result.broken) == (steps, False)
    assert result.attacks[0].auc > 0.55


def test_what_cannot_be_audited_is_one_sentence(toy_plan: NewPlan) -> None:
    with fails_with("privacy.nothing_to_audit"):
        audit(toy_plan())
    with fails_with("data.unknown_organization", "org-3"):
        audit(toy_plan(**SMALL), organization="org-3", device="cpu")
    with fails_with("plan.audited_rounds", "1", "2", "3"):
        audit(toy_plan(**SMALL), rounds=3, device="cpu")


def test_without_noise_nearly_every_canary_is_seen(toy_plan: NewPlan, monkeypatch: pytest.MonkeyPatch) -> None:

    def without_noise(config: DPSGDConfig) -> DPSGD:
        return DPSGD(replace(config, noise_multiplier=0.0))

    monkeypatch.setattr(audited_training, "DPSGD", without_noise)
    plan = toy_plan(**{**SMALL, "privacy": {"epsilon": 1}})
    result = audit(plan, canaries=1000, rounds=1, confidence=CERTAIN, device="cpu")
    canaries, records, _ = result.attacks
    assert canaries.auc > 0.95  # but for those that no batch drew
    assert result.broken
    assert records.targets == result.examples


def test_the_difference_quotient_is_the_gradient_along_the_delta(toy_plan: NewPlan) -> None:
    """Against autograd, record by record."""
    import numpy as np
    import torch

    from cotune.data.dataset import Dataset
    from cotune.plan.trained_parameters import get_plan_model
    from cotune.simulations.prepare import prepare

    prepared = prepare(toy_plan(train="full", **SMALL), "cpu")
    plan = prepared.plan
    share = prepared.shares[0]
    dataset = Dataset(((prepared.records[None], share.rows),), plan.labels)
    model = get_plan_model(plan, "cpu")
    stage = plan.stages[0]
    model.load({})
    names = model.names(stage.mode)
    parameters = model.train_only(names)
    setting = audited_training.build_setup(plan, stage, model, dataset, {}, share.name, expected_batch=8)
    before = model.state(names)
    generator = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in before.items()}
    expected = []
    for i in (0, 3, 7):
        gradients = torch.autograd.grad(setting.exact(setting.alone(i)).sum(), parameters)
        expected.append(-sum(float((g * delta[n]).sum()) for n, g in zip(names, gradients, strict=True)))
    assert plan.privacy != "none"
    targets = audited_training.Targets(np.zeros(0, bool), np.array([0, 3, 7]), np.ones(3, bool))
    training = audited_training.AuditedTraining(
        plan, plan.privacy, dataset, share.name, targets, 1.0, model, 0.01, len(dataset.units)
    )
    found = training._alignment(setting, dict(zip(names, parameters, strict=True)), before, delta)
    assert found == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_an_organization_with_an_own_epsilon_is_audited_at_that(toy_plan: NewPlan) -> None:
    plan = with_own_epsilons(toy_plan)
    result = audit(plan, device="cpu", **QUICK)
    assert result.noise_multiplier == prepare(plan, "cpu").noise["org-1"]
    assert 0.45 < result.epsilon <= 0.5


def test_a_run_is_only_read_and_audited_at_what_each_has_spent(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = with_own_epsilons(toy_plan)
    folder = simulate(plan, tmp_path / "run", device="cpu").folder
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for chosen, name in ((None, "org-1"), ("org-2", "org-2")):
        result = audit(folder, organization=chosen, **QUICK)
        assert result.organization == name
        spent = Site(folder / "sites" / name).ledger().spent()
        assert result.epsilon == pytest.approx(epsilon(spent, result.delta))  # what the run claims, and spent
        assert result.noise_multiplier == prepare(plan, "cpu").noise[name]
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


def with_own_epsilons(toy_plan: NewPlan) -> Plan:
    return toy_plan(**{**SMALL, "simulation": {**SMALL["simulation"], "epsilons": [0.5, 2.0]}})

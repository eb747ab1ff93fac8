"""Noisy votes of teachers: what is charged, what one record changes, and what is released."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from cotune.client.noise_calibration import planned_steps
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.client.training.teachers import deal, release
from cotune.ensembles.public_inputs import pin_public
from cotune.errors import CotuneError
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.privacy.accounting.composition import Steps, epsilon_rdp
from cotune.privacy.config import PateConfig
from tests.support.datasets import sentences, write_csv

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
INPUTS = 12
PATE = {"teachers": 5, "answers": 8, "threshold": 0.2}


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "public.csv", sentences(INPUTS, seed=5))


@pytest.fixture
def site(make_site: MakeSite, public: Path) -> Site:
    made = make_site()
    made.description.write_text(made.file.model_copy(update={"public": public}).model_dump_json())
    return Site(made.folder)


def plan_of(make_plan: MakePlan, source: Path, **changes: Any) -> Plan:
    given = {
        "collaboration": "predictions",
        "rounds": 1,
        "public": {"source": str(source), "share": "votes"},
        "strategy": {"weighting": "uniform"},
        "privacy": {"epsilon": 40.0, "delta": 1e-3, "pate": PATE},
    }
    return pin_public(make_plan(**{**given, **changes}), Path())


class Seeded(Account):
    """An account of nothing but a generator."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)


@given(st.integers(1, 500), st.integers(1, 500), st.floats(1, 20), st.floats(2, 100))
def test_charge_covers_the_bound_of_the_paper(inputs: int, answers: int, ratio: float, s: float) -> None:
    """Proposition 8 and theorem 5: α/σ₂² for each answer, of noise σ₂ = √2·s, and α/(2σ₁²) for each check, of noise σ₁ = c·s."""
    pate = PateConfig(answers=answers, threshold_noise=ratio)
    charged = pate.charged_steps(inputs) / (2 * s**2)  # of α, by the Gaussian mechanism at the multiplier s
    paper = min(answers, inputs) / (math.sqrt(2) * s) ** 2 + inputs / (2 * (ratio * s) ** 2)
    assert charged >= paper * (1 - 1e-9)
    assert charged <= paper + 1 / (2 * s**2)


def test_epsilon_is_that_of_an_independent_accountant() -> None:
    """The vote and the check as the accountant of dp-accounting has them, in units of their own sensitivities."""
    s = 20.0
    pate = PateConfig(answers=100, threshold_noise=3.0)
    accountant = RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(math.sqrt(2) * s / math.sqrt(2)), 100)
    accountant.compose(dp_event.GaussianDpEvent(3.0 * s), 900)
    ours = epsilon_rdp([Steps(s, 1.0, pate.charged_steps(900))], 1e-5)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=40, unique=True), st.integers(2, 9), st.integers(0, 99))
def test_a_unit_that_leaves_moves_no_other(identities: list[bytes], teachers: int, seed: int) -> None:
    def owners(held: list[bytes]) -> dict[bytes, int]:
        return {held[unit]: teacher for teacher, units in enumerate(deal(held, teachers, seed)) for unit in units}

    whole = owners(identities)
    assert whole.keys() == set(identities)
    without = owners(identities[1:])
    assert without == {unit: teacher for unit, teacher in whole.items() if unit != identities[0]}


def test_released_votes_follow_the_distribution_of_the_mechanism() -> None:
    """Of two classes: the check passes with Φ((max − T)/(c·s)), and the first one is named with Φ((n₁ − n₂)/(√2·√2·s))."""
    s = 4.0
    pate = PateConfig(teachers=20, answers=10**6, threshold=0.5, threshold_noise=1.5)
    counts = torch.tensor([[12.0, 8.0]], dtype=torch.float64).repeat(40_000, 1)
    found = release(counts, pate, s, Seeded(0))
    passed = found.sum(dim=1) > 0
    expected = norm.cdf((12 - 10) / (1.5 * s))
    assert float(passed.double().mean()) == pytest.approx(expected, abs=0.01)
    first = float(found[passed][:, 0].mean())
    assert first == pytest.approx(norm.cdf((12 - 8) / (2 * s)), abs=0.01)


def test_no_more_is_released_than_was_charged() -> None:
    pate = PateConfig(teachers=10, answers=3, threshold=0.1)
    counts = torch.tensor([[10.0, 0.0]], dtype=torch.float64).repeat(50, 1)
    found = release(counts, pate, 0.5, Seeded(1))
    assert float(found.sum()) == 3
    assert not found[3:].any()


def test_votes_leave_and_all_of_them_are_charged_before(make_plan: MakePlan, public: Path, site: Site) -> None:
    plan = plan_of(make_plan, public)
    update = train_round(plan, site, 1, {SCORES: torch.zeros(INPUTS, 3)})
    votes = update.delta[SCORES]
    assert set(votes.flatten().tolist()) <= {0.0, 1.0}
    assert bool((votes.sum(dim=1) <= 1).all())
    assert float(votes.sum()) <= 8
    [spent] = site.ledger().spent(plan.plan_id)
    assert (spent.sample_rate, spent.count) == planned_steps(plan, 60)[0]
    assert spent.count == 8 + math.ceil(INPUTS / 9)
    assert update.epsilon is not None
    assert update.epsilon <= 40.0


def test_teachers_are_not_kept(make_plan: MakePlan, public: Path, site: Site) -> None:
    """They have no noise: nothing of them may be taken for a model with ε."""
    plan = plan_of(make_plan, public)
    train_round(plan, site, 1, {SCORES: torch.zeros(INPUTS, 3)})
    assert not list(site.folder.rglob("round-*.safetensors"))


def test_same_request_gets_the_same_votes(make_plan: MakePlan, public: Path, site: Site) -> None:
    plan = plan_of(make_plan, public)
    first = train_round(plan, site, 1, {SCORES: torch.zeros(INPUTS, 3)})
    spent = site.ledger().spent(plan.plan_id)
    again = train_round(plan, site, 1, {SCORES: torch.zeros(INPUTS, 3)})
    assert torch.equal(first.delta[SCORES], again.delta[SCORES])
    assert site.ledger().spent(plan.plan_id) == spent


@pytest.mark.parametrize(
    "changes",
    [{"rounds": 2}, {"public": {"source": "public.csv"}}, {"collaboration": "parameters"}],
)
def test_votes_with_noise_need_votes_and_one_round(make_plan: MakePlan, public: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CotuneError) as caught:
        plan_of(make_plan, public, **changes)
    assert caught.value.code == "plan.invalid"

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.client_dp import RoundNoise, calibrate_round_noise, next_clip_norm
from cotune.privacy.config import ClientPrivacy
from tests.support.failures import fails_with


def noise(rounds: int = 10, organizations: int = 100, sample_rate: float = 1.0, **settings: Any) -> RoundNoise:
    return calibrate_round_noise(ClientPrivacy(**settings), rounds=rounds, organizations=organizations, sample_rate=sample_rate)


def gaussian_delta(epsilon: float, multiplier: float, rounds: int) -> float:
    """δ(ε) of `rounds` Gaussian mechanisms in closed form (Balle & Wang, ICML 2018, theorem 8), μ = √R / z."""
    mu = math.sqrt(rounds) / multiplier
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


@pytest.mark.parametrize(("rounds", "allowed", "delta"), [(1, 1.0, 1e-5), (10, 8.0, 1e-5), (200, 3.0, 1e-7), (10, 0.3, 1e-4)])
def test_all_rounds_together_cost_epsilon_in_closed_form(rounds: int, allowed: float, delta: float) -> None:
    z = noise(rounds, epsilon=allowed, delta=delta).charge.noise_multiplier
    assert gaussian_delta(allowed, z, rounds) <= delta
    assert gaussian_delta(allowed, 0.99 * z, rounds) > delta  # and not much noise more than that


def test_without_amplification_sampling_takes_nothing_off() -> None:
    full = noise(sample_rate=1.0)
    some = noise(sample_rate=0.1)
    assert some.charge == full.charge
    assert some.charge.sample_rate == 1.0
    assert (full.expected, some.expected) == (100.0, 10.0)


def test_amplification_is_that_of_dp_accounting() -> None:
    found = noise(rounds=50, sample_rate=0.1, epsilon=2.0, delta=1e-6, amplification=True)
    accountant = PLDAccountant(value_discretization_interval=2e-4)
    z = found.charge.noise_multiplier
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(z)), 50)
    assert float(accountant.get_epsilon(1e-6)) == pytest.approx(2.0, rel=5e-3)
    assert z < 0.3 * noise(rounds=50, sample_rate=0.1, epsilon=2.0, delta=1e-6).charge.noise_multiplier


def test_fixed_clipping_puts_all_noise_on_the_updates() -> None:
    found = noise()
    assert (found.updates, found.bits) == (found.charge.noise_multiplier, None)
    assert found.charge.count == 1


@pytest.mark.parametrize("bit_noise", [None, 3.0, 50.0])
def test_updates_and_bits_together_cost_one_gaussian(bit_noise: float | None) -> None:
    """The sum of bits has sensitivity ½, hence the multiplier 2σ_b; Gaussian multipliers compose as Σ z⁻²."""
    found = noise(clipping="adaptive", bit_noise=bit_noise, epsilon=3.0)
    assert found.bits is not None
    z = found.charge.noise_multiplier
    assert found.updates**-2 + (2 * found.bits) ** -2 == pytest.approx(z**-2)
    pair = [Steps(found.updates, 1.0, 10), Steps(2 * found.bits, 1.0, 10)]
    assert epsilon(pair, 1e-5) == pytest.approx(epsilon([Steps(z, 1.0, 10)], 1e-5), rel=2e-3)
    assert z == noise(epsilon=3.0).charge.noise_multiplier


def test_the_papers_example() -> None:
    """z = 1, n = 100, σ_b = n/20 = 5: z_Δ = 1.005 (Andrew et al., section 3)."""
    assert pytest.approx(1.005, abs=5e-4) == (1 - (2 * 5) ** -2) ** -0.5
    found = noise(rounds=1, organizations=10_000, clipping="adaptive", epsilon=1.0)
    assert found.bits == 500


def test_bits_of_few_organizations_get_the_noise_of_updates() -> None:
    """n/20 would be 0.2 here, which no budget can pay."""
    found = noise(organizations=4, clipping="adaptive")
    assert found.bits == found.charge.noise_multiplier
    assert found.updates == pytest.approx(found.charge.noise_multiplier * (1 - 1 / 4) ** -0.5)


def test_a_bit_noise_that_costs_more_than_the_budget_is_refused() -> None:
    z = noise().charge.noise_multiplier
    with fails_with("privacy.bit_noise_too_small", "client_privacy.bit_noise"):
        noise(clipping="adaptive", bit_noise=z / 2)
    assert noise(clipping="adaptive", bit_noise=z / 2 * 1.01).updates > 5 * z


def test_a_delta_that_promises_nothing_is_refused() -> None:
    with fails_with("privacy.delta_too_large", "4", "1/4"):
        noise(organizations=4, delta=0.25)


def test_a_budget_out_of_reach_is_refused() -> None:
    with fails_with("privacy.epsilon_unreachable"):
        noise(rounds=1, epsilon=1e-4, delta=1e-9)


# --- adaptive clipping


def test_clip_norm_shrinks_above_its_quantile() -> None:
    privacy = ClientPrivacy(clipping="adaptive", target_quantile=0.5, clip_learning_rate=0.2)
    assert next_clip_norm(privacy, 2.0, 1.0) == pytest.approx(2.0 * math.exp(-0.1))
    assert next_clip_norm(privacy, 2.0, 0.0) == pytest.approx(2.0 * math.exp(0.1))
    assert next_clip_norm(privacy, 2.0, 0.5) == 2.0


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 100.0])
def test_the_clip_norm_converges_to_the_quantile(quantile: float, start: float) -> None:
    """200 organizations with log-normal norms, noised bits."""
    rng = np.random.default_rng(0)
    privacy = ClientPrivacy(clipping="adaptive", target_quantile=quantile, clip_learning_rate=0.2)
    clip = start
    seen = []
    for _ in range(600):
        norms = np.exp(rng.normal(size=200))
        within = 0.5 + (((norms <= clip) - 0.5).sum() + 10 * rng.normal()) / 200
        clip = next_clip_norm(privacy, clip, within)
        seen.append(clip)
    assert math.exp(np.mean(np.log(seen[300:]))) == pytest.approx(math.exp(norm.ppf(quantile)), rel=0.05)


def test_bit_noise_of_few_organizations_keeps_the_clip_norm() -> None:
    """Four organizations, half of their updates always within C: it stays within a few powers of e over 200 rounds."""
    privacy = ClientPrivacy(clipping="adaptive", target_quantile=0.5, clip_learning_rate=0.2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        clip = 1.0
        for _ in range(200):
            clip = next_clip_norm(privacy, clip, 0.5 + 6.0 * rng.normal() / 4)
        assert math.exp(-5) < clip < math.exp(5)  # a walk of steps of at most 0.1; without the cut 5 % would be outside
    assert next_clip_norm(privacy, 1.0, 1e9) == pytest.approx(math.exp(-0.1))
    assert next_clip_norm(privacy, 1.0, -1e9) == pytest.approx(math.exp(0.1))

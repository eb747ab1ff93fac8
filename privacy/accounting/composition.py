"""Compute ε of a sequence of DP-SGD steps, and the noise that a budget requires.

Within one run the privacy-loss-distribution (PLD) accountant of Google's dp-accounting (Doroshenko et al., "Connect the Dots",
PETS 2022) composes every step that ran. Across runs, whose plans may have been chosen after seeing earlier answers, a Rényi
filter does (see `filters`). An answer that decides what follows within a run, as the number of records does, adds its pure ε
(see `mechanisms.geometric`). Neighboring data sets differ by adding or removing one record.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, Literal

from cotune.errors import PrivacyError
from cotune.privacy.accounting.noise_search import bracket_root, estimate_noise
from cotune.privacy.mechanisms.geometric import geometric_epsilon, randomized_response

if TYPE_CHECKING:
    import numpy as np
    from dp_accounting import dp_event
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    Curve = np.ndarray[Any, np.dtype[np.float64]]

MAX_NOISE_MULTIPLIER = 1000.0  # σ above this drowns any signal: the budget counts as out of reach
MIN_NOISE_MULTIPLIER = 0.3  # below this the PLD grid becomes huge and the guarantee meaningless
# width of the grid of privacy losses; each gives an upper bound, the fine one a tight one
_FINE = 5e-4
_COARSE = 2e-3
_FINEST = 1e-5  # of the grid of the lower bound: a finer one takes seconds
_TOLERANCE = 1e-3  # relative, of a calibrated σ


@dataclass(frozen=True)
class Steps:
    """A number of DP-SGD steps with the same parameters: one accounting event.

    Attributes:
        noise_multiplier: σ, noise standard deviation / clip norm.
        sample_rate: q, the probability with which each record enters a batch, independently (Poisson sampling).
        count: How many steps.
        mechanism: "gaussian", or "geometric" for a number whose answer decides the parameters of what follows; it is never
            sampled.
    """

    noise_multiplier: float
    sample_rate: float
    count: int
    mechanism: Literal["gaussian", "geometric"] = "gaussian"

    @property
    def name(self) -> str:
        """Return the mechanism in words: "gaussian", "poisson-subsampled gaussian" or "geometric"."""
        return self.mechanism if self.sample_rate >= 1 else f"poisson-subsampled {self.mechanism}"

    @property
    def is_possible(self) -> bool:
        """Return whether a mechanism can have these parameters."""
        is_known = self.mechanism == "gaussian" or (self.mechanism == "geometric" and self.sample_rate == 1)
        return is_known and 0 < self.noise_multiplier < math.inf and 0 < self.sample_rate <= 1 and self.count >= 0

    def event(self) -> dp_event.DpEvent:
        """Return the steps as an event of dp-accounting."""
        from dp_accounting import dp_event

        gaussian = dp_event.GaussianDpEvent(self.noise_multiplier)
        step = gaussian if self.sample_rate >= 1 else dp_event.PoissonSampledDpEvent(self.sample_rate, gaussian)
        return dp_event.SelfComposedDpEvent(step, self.count)


def epsilon(spent: Iterable[Steps], delta: float) -> float:
    """Return ε of all the steps together at δ: of the Gaussian ones by PLD, plus that of the geometric ones; 0 for no steps.

    >>> epsilon([], 1e-5), round(epsilon([Steps(1.0, 0.01, 100)], 1e-5), 2)
    (0.0, 0.72)
    """
    pure, merged = _merge(spent)
    return pure + _epsilon(merged, delta, _FINE)


def deltas(spent: Iterable[Steps], epsilons: Sequence[float]) -> Curve:
    """Return upper bounds on δ of all the steps together at each ε ≥ 0: the whole privacy curve.

    Geometric steps have a privacy loss of ±ε₁, to which that of the others is added: δ(ε) = p·δ₂(ε - ε₁) + (1 - p)·δ₂(ε + ε₁),
    p = e^ε₁ / (1 + e^ε₁), where δ₂ is the curve of the run that followed: a bound for this run. Runs that other answers would
    have led to have the same ε at their δ; other points of their curves may differ by a few percent.
    """
    import numpy as np  # late, as wherever an account is opened and nothing is composed

    pure, merged = _merge(spent)
    at = np.asarray(epsilons, dtype=np.float64)
    likelier = randomized_response(pure)
    return likelier * _deltas(merged, at - pure) + (1 - likelier) * _deltas(merged, at + pure)


def _deltas(merged: tuple[Steps, ...], epsilons: Curve) -> Curve:
    """Return δ at each ε; for ε < 0 it is 1 - e^ε·(1 - δ(-ε)), by exchanging the two neighbors."""
    import numpy as np

    from cotune.privacy.accounting.loss_distribution import find_deltas

    size = np.abs(epsilons)
    found = find_deltas(_composed(merged, _COARSE), size) if merged else np.zeros_like(size)
    return np.where(epsilons < 0, 1 - np.exp(-size) * (1 - found), found)


def epsilon_rdp(spent: Iterable[Steps], delta: float) -> float:
    """Return ε as `epsilon` does, by the Rényi accountant of dp-accounting: looser, independent of PLD, for cross-checks only."""
    from dp_accounting.rdp import RdpAccountant

    pure, merged = _merge(spent)
    accountant = RdpAccountant()
    for steps in merged:
        accountant.compose(steps.event())
    return pure + float(accountant.get_epsilon(delta))


def epsilon_lower_bound(spent: Iterable[Steps], delta: float) -> float:
    """Return a lower bound on ε of all the steps together at δ: PLD accounting in which every privacy loss is rounded down.

    For cross-checks of `epsilon`, which rounds up: the true ε lies between the two. Geometric steps are added as there.
    """
    pure, merged = _merge(spent)
    return pure + (_epsilon_below(merged, delta) if merged else 0.0)


@lru_cache(maxsize=1024)
def _epsilon_below(merged: tuple[Steps, ...], delta: float) -> float:
    steps_of_all = sum(s.count for s in merged)
    interval = min(_COARSE, max(0.2 * _spread(merged) / math.sqrt(steps_of_all), _FINEST))  # rounding adds up over the steps
    interval = 2.0 ** math.floor(math.log2(interval))  # few different grids, so that a single step is computed once
    parts = [_step_below(s.noise_multiplier, s.sample_rate, interval).self_compose(s.count) for s in merged]
    return float(reduce(lambda whole, part: whole.compose(part), parts).get_epsilon_for_delta(delta))


@lru_cache(maxsize=16)
def _step_below(sigma: float, rate: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=interval,
        sampling_prob=min(rate, 1.0),
        pessimistic_estimate=False,
        use_connect_dots=False,
    )


def add_counts(steps: Iterable[Steps]) -> tuple[Steps, ...]:
    """Return the steps with the counts of equal ones added, in the order of the first of each; those that did not run left out.

    Every ε here and in `filters` is computed from these, so that it is the same to the last digit for a log of charges and for
    their totals.
    """
    counts: dict[tuple[float, float, Literal["gaussian", "geometric"]], int] = {}
    for s in steps:
        kind = s.noise_multiplier, s.sample_rate, s.mechanism
        counts[kind] = counts.get(kind, 0) + s.count
    return tuple(Steps(sigma, rate, count, mechanism) for (sigma, rate, mechanism), count in counts.items() if count)


def _merge(spent: Iterable[Steps]) -> tuple[float, tuple[Steps, ...]]:
    """Return ε of all geometric steps, and the Gaussian ones with the counts of equal steps added: one convolution for each."""
    numbers = []
    sampled = []
    for s in add_counts(spent):
        if s.mechanism == "geometric":
            numbers.append(s.count * geometric_epsilon(s.noise_multiplier))
        elif s.mechanism == "gaussian":
            sampled.append(s)
        else:
            raise PrivacyError(
                f"{s} is of an unknown mechanism: expected gaussian or geometric, or a newer cotune",
                code="privacy.unknown_mechanism",
            )
    return math.fsum(numbers), tuple(sorted(sampled, key=lambda s: (s.noise_multiplier, s.sample_rate)))


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[Steps, ...], delta: float, interval: float) -> float:
    if not merged:
        return 0.0
    import numpy as np

    from cotune.privacy.accounting.loss_distribution import find_epsilon

    with np.errstate(over="ignore"):  # with next to no noise ε is infinite, and that is what comes out
        return find_epsilon(_composed(merged, interval), delta)


@lru_cache(maxsize=16)
def _composed(merged: tuple[Steps, ...], interval: float) -> PrivacyLossDistribution:
    """Return the distribution of all steps' privacy loss: that of dp-accounting's `PLDAccountant`, to the last digit.

    Composing is expensive; reading ε at several δ from it is not.
    """
    from dp_accounting.pld import privacy_loss_distribution

    width = min(interval, interval / _FINE * 0.2 * _spread(merged))
    return reduce(
        lambda whole, steps: whole.compose(_of_steps(steps, width)),
        merged,
        privacy_loss_distribution.identity(value_discretization_interval=width),
    )


def _of_steps(steps: Steps, width: float) -> PrivacyLossDistribution:
    """Steps without sampling are one Gaussian mechanism with less noise; of others, one is computed and composed with itself."""
    from cotune.privacy.accounting.loss_distribution import self_compose

    if steps.sample_rate >= 1:
        return _of_one_step(steps.noise_multiplier / math.sqrt(steps.count), 1.0, width)
    return self_compose(_of_one_step(steps.noise_multiplier, steps.sample_rate, width), steps.count)


@lru_cache(maxsize=64)
def _of_one_step(sigma: float, rate: float, width: float) -> PrivacyLossDistribution:
    """Discretizing one step takes most of the time, and all rounds of a run have the same."""
    from cotune.privacy.accounting.loss_distribution import discretize_gaussian

    return discretize_gaussian(sigma, rate, width)


def _spread(merged: tuple[Steps, ...]) -> float:
    """Return roughly the standard deviation of one step's privacy loss: a coarser grid would cost tightness."""
    variances = [s.sample_rate**2 * math.expm1(min(s.noise_multiplier**-2, 50.0)) for s in merged]
    if len(set(variances)) == 1:  # exactly the same for any number of steps, so that one step is computed once
        return math.sqrt(variances[0])
    total = sum(s.count * variance for s, variance in zip(merged, variances, strict=True))
    return math.sqrt(total / sum(s.count for s in merged))


def calibrate(planned: Sequence[tuple[float, int]], *, epsilon: float, delta: float, spent: Sequence[Steps] = ()) -> float:
    """Return the smallest noise multiplier σ with which the planned steps, on top of those spent, stay within ε.

    Guarantee: composing `spent` with the planned steps at the returned σ gives at most `epsilon` at `delta`; a σ smaller by one
        part in a thousand would not.

    Args:
        planned: (sample rate, number of steps) of every remaining stage.
        epsilon: ε of all together.
        delta: δ.
        spent: Steps that ran already.

    Raises:
        PrivacyError: When no σ up to 1000 suffices.
    """
    pure, merged = _merge(spent)
    found = _calibrate(tuple(planned), epsilon - pure, delta, merged)
    if found is None:
        raise _unreachable_error(planned, epsilon, delta, spent)
    return found


@lru_cache(maxsize=1024)
def _calibrate(planned: tuple[tuple[float, int], ...], target: float, delta: float, spent: tuple[Steps, ...]) -> float | None:
    """Return σ, or None where none suffices."""
    from scipy.optimize import brentq

    def gap(sigma: float, interval: float = _FINE) -> float:
        return _epsilon((*spent, *(Steps(sigma, q, count) for q, count in planned if count)), delta, interval) - target

    def coarse_gap(x: float) -> float:
        return gap(math.exp(x), _COARSE)

    grid = _COARSE
    lowest = _lowest(planned)
    low, high = math.log(lowest), math.log(MAX_NOISE_MULTIPLIER)
    start = math.log(max(estimate_noise(planned, target, delta), MIN_NOISE_MULTIPLIER))
    bracket = bracket_root(coarse_gap, start, (low, high), target)
    if bracket is None and coarse_gap(low) <= 0:
        lowest = MIN_NOISE_MULTIPLIER
        if gap(lowest, _COARSE) <= 0:
            return lowest
        bracket = math.log(lowest), low
    elif bracket is None:
        grid = _FINE
        if gap(MAX_NOISE_MULTIPLIER) > 0:
            return None
        bracket = low, high
    sigma = math.exp(brentq(lambda x: gap(math.exp(x), grid), *bracket, xtol=5e-4))
    while gap(sigma) > 0:  # the coarse grid found the neighborhood, on either side; the fine one decides
        sigma *= 1 + _TOLERANCE
    while sigma > lowest and gap(sigma / (1 + _TOLERANCE)) <= 0:
        sigma /= 1 + _TOLERANCE
    return sigma


def _lowest(planned: tuple[tuple[float, int], ...]) -> float:
    """Where to look for σ from: with far less noise, a grid over the losses of many full batches has millions of points."""
    full = sum(count for q, count in planned if q >= 1)
    return min(MAX_NOISE_MULTIPLIER, MIN_NOISE_MULTIPLIER * math.sqrt(max(1, full)))


def _unreachable_error(planned: Sequence[tuple[float, int]], target: float, delta: float, spent: Sequence[Steps]) -> PrivacyError:
    steps = sum(count for _, count in planned)
    best = epsilon([*spent, *(Steps(MAX_NOISE_MULTIPLIER, q, count) for q, count in planned)], delta)
    already = f" after ε = {epsilon(spent, delta):.3g} was spent before" if spent else ""
    return PrivacyError(
        f"ε = {target:g} at δ = {delta:.2g} cannot be reached by {steps} steps{already}: even with a noise multiplier of"
        f" {MAX_NOISE_MULTIPLIER:g} they cost ε = {best:.3g}; allow a larger ε, or plan fewer steps or smaller batches",
        code="privacy.epsilon_unreachable",
    )

"""The privacy loss of several runs on the same records, where later plans may have been chosen after seeing earlier answers.

Within one run all parameters are fixed before the first answer, except for what the noised number of records decides
(`mechanisms.geometric`), and the PLD accountant is exact: every round has its planned σ, is answered once, and none is answered
after a later one (`client.run_account.Account.check_unanswered`). A round that is skipped, or that has more noise than planned
because an attempt was interrupted, reveals less than the planned one, whatever caused it; interrupted attempts are charged
although nothing of them leaves. A second plan may depend on what the first run revealed. Stopping by the PLD of what has run so
far is then not valid in general (https://arxiv.org/abs/2602.06756); a *Rényi filter* is: if the sum of the Rényi divergences at
one order, fixed beforehand, never exceeds a budget, the whole satisfies it, however each mechanism was chosen (Feldman & Zrnic,
"Individual Privacy Accounting via a Rényi Filter", NeurIPS 2021, https://arxiv.org/abs/2008.11193, theorem 4.3; Lécuyer,
https://arxiv.org/abs/2103.01379).

The order depends on the limit and δ alone: the best one for a Gaussian mechanism that uses up exactly this limit. δ may follow
from a noised number of records, and so may the order. The ε of such numbers is therefore added to what the filter counts: given
all of them, whatever they are, the order and the budget of the filter are fixed, and the numbers themselves are ε-private without
any δ (see `geometric`).

Whether a second run begins at all may also depend on the answers of the first. In the worlds where none does the guarantee is
that of the PLD, in the others that of the filter, and the failure probabilities of the two add up. Each therefore gets half of δ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps, add_counts, epsilon, epsilon_lower_bound
from cotune.privacy.accounting.tradeoff import true_positive_rate
from cotune.privacy.mechanisms.geometric import geometric_epsilon, geometric_renyi

# ε; a limit above the first limits nothing, and takes the order of the second
_MAX_LIMIT = 100.0
_USUAL_LIMIT = 8.0
_ORDERS = (*range(2, 17), 20, 24, 32, 48, 64, 96, 128, 256, 512)  # integers: their divergence is a finite sum, which converges
_ROUNDING = 1e-6  # absolute, in ε: of two sums of floating-point numbers


def filter_order(limit: float, delta: float) -> int:
    """Return the one order α at which a filter for a limit of ε at δ adds up: an integer, 2 or more.

    It is the best one for a Gaussian mechanism that uses up the limit, and depends on these two numbers only. A limit above
    ε = 100 limits nothing; its order is that of ε = 8.
    """
    return _filter_order(limit if limit <= _MAX_LIMIT else _USUAL_LIMIT, delta)


@lru_cache(maxsize=1024)
def _filter_order(limit: float, delta: float) -> int:
    from scipy.optimize import brentq, minimize_scalar

    def best(mu: float) -> tuple[float, float]:
        """(ε, α) of a Gaussian mechanism of sensitivity μ; the search is over log(α - 1)."""
        found = minimize_scalar(
            lambda x: renyi_epsilon((1 + math.exp(x)) * mu**2 / 2, 1 + math.exp(x), delta), bounds=(-5.0, 15.0), method="bounded"
        )
        return float(found.fun), 1 + math.exp(float(found.x))

    mu = float(brentq(lambda mu: best(mu)[0] - limit, 1e-6, 1e3, xtol=1e-9))
    below = max(math.floor(best(mu)[1]), 2)
    return min(below, below + 1, key=lambda order: renyi_epsilon(order * mu**2 / 2, order, delta))


def renyi(steps: Iterable[Steps], order: float) -> float:
    """Return the Rényi divergence of all the steps together at one order α, in nats: the sum over the steps.

    Mironov, Talwar, Zhang, https://arxiv.org/abs/1908.10530, section 3.3, for Poisson sampling. Infinite where it cannot be
    computed.
    """
    return math.fsum(s.count * _renyi_of(replace(s, count=1), order) for s in add_counts(steps))


@lru_cache(maxsize=65536)
def _renyi_of(step: Steps, order: float) -> float:
    if step.mechanism == "geometric":
        return geometric_renyi(geometric_epsilon(step.noise_multiplier), order)
    if step.sample_rate >= 1:
        return order / (2 * step.noise_multiplier**2)
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=[order])
    accountant.compose(step.event())
    return max(float(accountant._rdp[0]), 0.0)


def renyi_epsilon(divergence: float, order: float, delta: float) -> float:
    """Return ε at δ of a mechanism with a Rényi divergence ρ at order α: ρ + log(1 − 1/α) − (log δ + log α)/(α − 1), at least 0.

    Canonne, Kamath, Steinke, https://arxiv.org/abs/2004.00010, proposition 12; Balle et al., https://arxiv.org/abs/1905.09982,
    theorem 21.

    Args:
        divergence: ρ.
        order: α > 1.
        delta: δ.
    """
    if divergence <= 0:
        return 0.0
    return max(0.0, divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))


def epsilon_filter(steps: Iterable[Steps], limit: float, delta: float) -> float:
    """Return the ε that a Rényi filter counts for steps; the limit holds as long as this does not exceed it.

    Numbers released by the geometric mechanism count with their pure ε (Dwork & Roth 2014, theorem B.1), all else by the filter.

    Args:
        steps: Of all runs.
        limit: ε of the limit; with δ, it determines the order of the filter.
        delta: δ.
    """
    return _filter_epsilon(steps, filter_order(limit, delta), delta)


def _filter_epsilon(steps: Iterable[Steps], order: int, delta: float) -> float:
    numbers, trained = _split_off_numbers(steps)
    return numbers + renyi_epsilon(renyi(trained, order), order, delta)


def _split_off_numbers(steps: Iterable[Steps]) -> tuple[float, list[Steps]]:
    """Return the pure ε of the numbers released among the steps, and the other steps."""
    everything = add_counts(steps)
    numbers = [s for s in everything if s.mechanism == "geometric"]
    pure = math.fsum(s.count * geometric_epsilon(s.noise_multiplier) for s in numbers)
    return pure, [s for s in everything if s.mechanism != "geometric"]


def epsilon_over_runs(runs: Mapping[str, Sequence[Steps]], limit: float, delta: float) -> float:
    """Return ε of all runs on the same records, which must stay at or below `limit` at `delta`.

    One run: the PLD accountant. Several: the Rényi filter for that limit, see the module's docstring; both at δ/2.

    Guarantee: if every charge is made only when this, with the charge, is at most `limit`, then everything that is ever released
    is (limit, delta)-differentially private, even if the plans were chosen after seeing all answers before.

    Args:
        runs: Run id -> its charges. Runs without steps count for nothing.
        limit: ε that is allowed in total. Decides the order of the filter.
        delta: δ of everything together.
    """
    charged = [list(steps) for steps in runs.values() if any(s.count for s in steps)]
    return epsilon_of_total(len(charged), [s for steps in charged for s in steps], limit, delta)


def epsilon_of_total(runs: int, total: Iterable[Steps], limit: float, delta: float) -> float:
    """Return the result of `epsilon_over_runs` from totals.

    Args:
        runs: Number of runs that have steps.
        total: Steps of all of them.
        limit: ε of the limit.
        delta: δ.
    """
    return epsilon(total, delta / 2) if runs <= 1 else epsilon_filter(total, limit, delta / 2)


def epsilon_spent(runs: Mapping[str, Sequence[Steps]], limit: float, delta: float, *, at: float | None = None) -> float:
    """Return the ε at δ that these runs have cost: for one run the PLD at all of δ, because no second one has followed.

    For several runs it is that of `epsilon_over_runs`, which decides what may still be charged in either case.

    Args:
        runs: Run id -> its charges.
        limit: ε that is allowed in total.
        delta: δ of everything together.
        at: Another δ to report ε at; the order of the filter stays the one that the limit has fixed.
    """
    charged = [list(steps) for steps in runs.values() if any(s.count for s in steps)]
    if len(charged) <= 1:
        return epsilon(charged[0], at or delta) if charged else 0.0
    return _filter_epsilon([s for steps in charged for s in steps], filter_order(limit, delta / 2), (at or delta) / 2)


def true_positive_rate_over_runs(
    runs: Mapping[str, Sequence[Steps]], limit: float, delta: float, false_positive_rate: float
) -> float:
    """Return a bound on the true positive rate of membership inference attacks on all the runs.

    One run: from its trade-off curve. Several: P(S) ≤ (e^ρ·Q(S))^((α-1)/α), where ρ is the filter's Rényi divergence at its
    order α (Mironov, CSF 2017, https://arxiv.org/abs/1702.07476, proposition 10), times e^ε of the numbers released.

    Args:
        runs: Run -> its steps.
        limit: ε of the limit.
        delta: δ.
        false_positive_rate: Of the attack.
    """
    charged = [list(steps) for steps in runs.values() if any(s.count for s in steps)]
    if len(charged) <= 1:
        return true_positive_rate([s for steps in charged for s in steps], false_positive_rate)
    numbers, trained = _split_off_numbers(s for steps in charged for s in steps)
    order = filter_order(limit, delta / 2)
    divergence = renyi(trained, order)
    return math.exp(min(0.0, numbers + (1 - 1 / order) * (divergence + math.log(false_positive_rate))))


def describe_composition(runs: Mapping[str, Sequence[Steps]], limit: float, delta: float) -> str:
    """Return how `epsilon_over_runs` composes these runs, in words: "pld", or "renyi filter, order α".

    Args:
        runs: Run -> its steps.
        limit: ε of the limit.
        delta: δ.
    """
    charged = sum(any(s.count for s in steps) for steps in runs.values())
    return "pld" if charged <= 1 else f"renyi filter, order {filter_order(limit, delta / 2)}"


def epsilon_renyi(steps: Iterable[Steps], delta: float) -> float:
    """Return ε of a fixed list of steps by Rényi accounting, at the best of some integer orders: an upper bound, looser than
    PLD."""
    return _epsilon_renyi(add_counts(steps), delta)


@lru_cache(maxsize=1024)
def _epsilon_renyi(charged: tuple[Steps, ...], delta: float) -> float:
    return min(renyi_epsilon(renyi(charged, order), order, delta) for order in _ORDERS)


def check_accountants(steps: Sequence[Steps], delta: float) -> None:
    """Check that the accountants do not contradict each other about these steps.

    The PLD's ε rounds up; it must lie between that of the same accountant rounding down, and that of Rényi accounting, which is
    another method and always looser. Where PLD overflows to infinity (ε of hundreds) it understates nothing and passes.

    Raises:
        PrivacyError: Where they do.
    """
    gaussian = [s for s in steps if s.mechanism == "gaussian"]  # the others are added to each accountant's
    claimed = epsilon(gaussian, delta)
    if math.isinf(claimed):
        return
    below = epsilon_lower_bound(gaussian, delta)
    above = epsilon_renyi(gaussian, delta)
    if not below - _ROUNDING <= claimed <= above + _ROUNDING:
        raise PrivacyError(
            f"the accountants disagree about {len(steps)} charges at δ = {delta:.2g}: PLD says ε = {claimed:.6g}, expected"
            f" at least {below:.6g} (rounded down) and at most {above:.6g} (Rényi); nothing is charged: check the"
            " installed dp-accounting",
            code="privacy.accountants_disagree",
        )

"""What all models that were trained on the same records give away together: a run and its baselines, or all runs of a comparison.

Everything that is trained is fixed before anything is answered, by the plan or by the grid, so that the steps compose as one
list: no filter is needed (compare `cotune.privacy.accounting.filters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cotune.client.site import Site
from cotune.client.site_folder import SitePaths
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.accounting.filters import renyi, renyi_epsilon

_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)


def get_charged_steps(run: Path, organization: str) -> list[Steps]:
    """Return all that an organization was charged: for the run, and for those beside it.

    These are training alone, the run without personal parts, and that of each of several tasks by itself.
    """
    baselines = run / "baselines"
    sites = (
        run / "sites" / organization,
        baselines / "alone" / organization / "site",
        baselines / "plain" / "sites" / organization,
        *(task / "sites" / organization for task in sorted(baselines.glob("single/*"))),
    )
    return [steps for site in sites for steps in _charged(site)]


def get_steps_by_organization(run: Path) -> list[list[Steps]]:
    """Return for each organization of a run's folder what `get_charged_steps` says; of a run that never began, nothing."""
    return [get_charged_steps(run, site.name) for site in sorted((run / "sites").glob("*"))]


def _charged(site: Path) -> list[Steps]:
    if not SitePaths(site).description.exists():  # a comparison that the plan does not ask for
        return []
    opened = Site(site)
    return opened.ledger().spent() if opened.has_ledger else []


def compose_epsilon(runs: Iterable[Sequence[Sequence[Steps]]], delta: float) -> float:
    """Return ε at δ of all runs together, for any single record.

    In each run a record is with one organization, which may be another one in the next. At every order the Rényi divergence for a
    record is at most the sum over the runs of the largest over the organizations; the best order decides (Mironov, CSF 2017,
    propositions 1 and 3).

    Args:
        runs: For each run, for each of its organizations, what it was charged.
        delta: δ of the whole.
    """
    curves = [max_divergences(run) for run in runs]
    totals = {order: sum(curve[order] for curve in curves) for order in _ORDERS}
    return min(renyi_epsilon(total, order, delta) for order, total in totals.items())


def max_divergences(organizations: Iterable[Sequence[Steps]]) -> dict[float, float]:
    """Return for each order the largest Rényi divergence among lists of charges, of which a record is in one at most."""
    charged = [list(steps) for steps in organizations]
    return {order: max((renyi(steps, order) for steps in charged), default=0.0) for order in _ORDERS}

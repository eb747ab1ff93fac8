"""Whether a plan suits the organizations that are to run it, as far as their number decides it."""

from __future__ import annotations

from dataclasses import replace

from scipy.stats import binom

from cotune.errors import PlanError
from cotune.plan.plan import Plan
from cotune.server.rounds.selection import check_sample_size
from cotune.server.runs.client_privacy import compute_round_noise
from cotune.strategies.compatibility import find_problem

_MAX_FAILURE_RATE = 1e-3  # how often a run may end because too few organizations were drawn in one of its rounds


def check_feasible(plan: Plan, organizations: int, *, server_data: bool) -> None:
    """Check that so many organizations, and a plug-in's own needs, go with the plan; nobody else opens a plug-in's file.

    Args:
        plan: The plan.
        organizations: How many there are.
        server_data: Whether the server has validation records.

    Raises:
        PlanError: They do not.
        PrivacyError: Client-level privacy cannot be given.
    """
    check_sample_size(plan, organizations)
    size = plan.server.sample_size
    rate = plan.server.sample_rate
    participation = size / organizations if size else rate
    asked = size or max(1, int(binom.ppf(_MAX_FAILURE_RATE / plan.rounds, organizations, rate)))
    infos = {kind: part.info(kind) for kind, part in plan.strategy.components()}
    facts = replace(plan.facts, organizations=asked, participation=participation, server_data=server_data)
    problem = find_problem(plan.strategy, facts, infos)
    if problem:
        raise PlanError(f"the plan is not valid: {problem}", code="plan.incompatible")
    if plan.client_privacy is not None:
        compute_round_noise(plan, organizations)

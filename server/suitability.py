"""Whether a plan suits the organisations that are to run it, as far as their number decides it."""

from __future__ import annotations

from dataclasses import replace

from scipy.stats import binom

from cotune.models.errors import PlanError
from cotune.plan.schema import Plan
from cotune.server.client_level import client_level_noise
from cotune.server.selection import check_sample_size
from cotune.strategies.compatibility import first_problem

_RARELY = 1e-3  # how often a run may end because too few organisations were drawn in one of its rounds


def check_suits(plan: Plan, organisations: int, *, server_data: bool) -> None:
    """Whether so many organisations, and a plug-in's own needs, go with the plan; nobody else opens a plug-in's file.

    server_data: whether the server has validation records. Raises PlanError, or PrivacyError where client-level privacy cannot
    be given.
    """
    check_sample_size(plan, organisations)
    size, rate = plan.server.sample_size, plan.server.sample_rate
    participation = size / organisations if size else rate
    asked = size or max(1, int(binom.ppf(_RARELY / plan.rounds, organisations, rate)))
    infos = {kind: part.info(kind) for kind, part in plan.strategy.parts()}
    facts = replace(plan.facts, organisations=asked, participation=participation, server_data=server_data)
    problem = first_problem(plan.strategy, facts, infos)
    if problem:
        raise PlanError(f"the plan is not valid: {problem}")
    if plan.client_privacy is not None:
        client_level_noise(plan, organisations)

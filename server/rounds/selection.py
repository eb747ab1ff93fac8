"""Select who is asked to train in a round, and list the cohort, which is signed with each request.

All organizations are asked, each with a probability (Poisson, `server.sample_rate`), or a fixed number (`sample_size`).

An organization's rule `training.min_cohort` checks the size of the cohort: those that took part in the previous round or, before
the first round, those that are asked. Organizations that declined only because the cohort was too small count, too; otherwise,
organizations with that rule would wait for each other forever. These come from the previous round, and from a failed attempt at
this round (cohort.json).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from cotune.errors import PlanError, RunError
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms.random_generators import keyed_generator, seeded_generator
from cotune.protocol.refusals import MIN_COHORT, find_declining_rule
from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.runs.run_folder import Participant, RunFolder
from cotune.storage.files import atomic_write
from cotune.storage.json_documents import JsonDocument


def select(folder: RunFolder, round: int, exclude: Collection[str] = ()) -> list[Participant]:
    """Select the organizations of a round; a round that is repeated after a crash gets the same ones.

    They are drawn from the plan's seed, which is public. If privacy amplification relies on the sampling, they are drawn from a
    secret random key of the run, which never leaves the server.

    Args:
        folder: The folder of the run.
        round: Number of the round.
        exclude: Names of those that may not take part any more; with a fixed number, others replace them.

    Returns:
        The organizations in the order in which their updates are added; possibly none.

    Raises:
        PlanError: If the plan asks more organizations than there are.
    """
    plan = folder.plan
    organizations = folder.file.participants
    if plan.server.sample_size:
        check_sample_size(plan, len(organizations))
        return _draw_sample(plan, round, [each for each in organizations if each.name not in exclude])
    if plan.server.sample_rate >= 1:
        return [each for each in organizations if each.name not in exclude]
    secret = plan.client_privacy is not None and plan.client_privacy.amplification
    generator = _secret_generator(folder.path, round) if secret else seeded_generator(plan.seed, "selection", round)
    chosen = [each for each in organizations if generator.random() < plan.server.sample_rate]
    return [each for each in chosen if each.name not in exclude]


def _draw_sample(plan: Plan, round: int, organizations: Sequence[Participant]) -> list[Participant]:
    """Return the sample in the order of the organizations, followed by the spare ones in the order of their draw."""
    size = plan.server.sample_size
    asked = min(len(organizations), math.ceil(size * (1 + plan.server.over_selection) - 1e-9))
    generator = seeded_generator(plan.seed, "selection", round)
    drawn: list[int] = [int(i) for i in generator.choice(len(organizations), asked, replace=False)] if organizations else []
    return [organizations[i] for i in [*sorted(drawn[:size]), *drawn[size:]]]


def count_to_complete(plan: Plan, asked: int) -> int:
    """Return how many updates complete a round: those of all that were asked; with over-selection, of `sample_size` of them."""
    return min(asked, plan.server.sample_size) if plan.server.over_selection else asked


def check_sample_size(plan: Plan, organizations: int) -> None:
    """Raise PlanError if the plan asks more organizations in a round than there are."""
    if plan.server.sample_size > organizations:
        raise PlanError(
            f"the plan has server.sample_size = {plan.server.sample_size} and {organizations} organizations: expected at most as"
            " many as there are, or 0 for all of them",
            code="plan.sample_too_large",
        )


def _secret_generator(path: Path, round: int) -> np.random.Generator:
    file = path / "selection.key"
    if not file.exists():
        atomic_write(file, secrets.token_hex(32).encode())
    key = file.read_text(encoding="ascii", errors="replace").strip()
    if len(key) != 64:
        raise RunError(
            f"{file} is damaged: expected 64 hexadecimal digits; restore it, as another key would draw rounds again",
            code="run.damaged_document",
        )
    return keyed_generator(key, "selection", round)


class WaitingFile(BaseModel):
    """cohort.json: who waited for others in a round that failed."""

    round: int = Field(description="The round that failed.")
    waiting: list[str] = Field(description="Organizations that declined it by their rule `training.min_cohort` alone.")


def build_cohort(folder: RunFolder, history: Sequence[RoundEntry], asked: Iterable[str]) -> list[str]:
    """Return the cohort of the next round, as the module's docstring defines it.

    Args:
        folder: The folder of the run.
        history: The finished rounds.
        asked: Organizations that the next round asks.
    """
    if not history:
        return list(asked)
    last = history[-1]
    dropped = {who.organization: who.reason for who in last.dropped}
    return [*last.participants, *find_waiting(dropped), *_waiting_before(folder, len(history) + 1)]


def find_waiting(dropped: Mapping[str, str]) -> list[str]:
    """Return the organizations that declined only because of their rule `training.min_cohort`.

    Args:
        dropped: Organization -> why its update does not enter the model.
    """
    return [name for name, reason in dropped.items() if find_declining_rule(reason) == MIN_COHORT]


def record_waiting(folder: RunFolder, round: int, dropped: Mapping[str, str]) -> None:
    """Record organizations that waited for others in a failed round, so that they count when it is repeated.

    Args:
        folder: The folder of the run.
        round: The round that failed.
        dropped: Organization -> why its update did not enter the model.
    """
    if waiting := find_waiting(dropped):
        JsonDocument(folder.path / "cohort.json", WaitingFile).write(WaitingFile(round=round, waiting=waiting))


def explain_waiting(dropped: Mapping[str, str]) -> str:
    """Return what a coordinator can do if a round failed because of that rule; "" if it did not."""
    waiting = find_waiting(dropped)
    if not waiting:
        return ""
    return (
        f"; {len(waiting)} wait for others by their rule {MIN_COHORT}: --resume counts them all, and where that is not enough,"
        " begin a run of more organizations or ask them to lower the rule"
    )


def _waiting_before(folder: RunFolder, round: int) -> list[str]:
    """Return the organizations that waited in a failed attempt at a round; none if the file is missing or damaged."""
    try:
        found = JsonDocument(folder.path / "cohort.json", WaitingFile).read()
    except RunError:
        return []
    return found.waiting if found is not None and found.round == round else []

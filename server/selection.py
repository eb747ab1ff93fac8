"""Who is asked to train in a round: everybody, each by chance (Poisson, `server.sample_rate`), or so many (`sample_size`)."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from cotune.models.durable import write_durably
from cotune.models.errors import PlanError, RunError
from cotune.plan.schema import Plan
from cotune.privacy.randomness import keyed_generator, seeded_generator
from cotune.server.run_folder import Participant, RunFolder


def select(folder: RunFolder, round: int, without: Collection[str] = ()) -> list[Participant]:
    """The organisations of a round, in the order in which their updates are added; possibly none. The same again when a round is
    repeated after a crash.

    Drawn from the plan's seed, which everybody knows, unless privacy is to be amplified by it: then from a key that the
    operating system gave this run, and that stays with the server. without: those that may not take part any more; others take
    their place where so many are asked. Raises PlanError where more are to be asked than there are.
    """
    plan, people = folder.plan, folder.file.participants
    if plan.server.sample_size:
        check_sample_size(plan, len(people))
        return _drawn(plan, round, [person for person in people if person.name not in without])
    if plan.server.sample_rate >= 1:
        return [person for person in people if person.name not in without]
    secret = plan.client_privacy is not None and plan.client_privacy.amplification
    generator = _private(folder.path, round) if secret else seeded_generator(plan.seed, "selection", round)
    chosen = [person for person in people if generator.random() < plan.server.sample_rate]
    return [person for person in chosen if person.name not in without]


def _drawn(plan: Plan, round: int, people: Sequence[Participant]) -> list[Participant]:
    """So many in their order; after them, as they were drawn, those that are asked beyond."""
    size = plan.server.sample_size
    asked = min(len(people), math.ceil(size * (1 + plan.server.over_selection) - 1e-9))
    generator = seeded_generator(plan.seed, "selection", round)
    drawn: list[int] = [int(i) for i in generator.choice(len(people), asked, replace=False)] if people else []
    return [people[i] for i in [*sorted(drawn[:size]), *drawn[size:]]]


def enough(plan: Plan, asked: int) -> int:
    """How many updates close a round: those of all that were asked, or of the first so many."""
    return min(asked, plan.server.sample_size) if plan.server.over_selection else asked


def check_sample_size(plan: Plan, organisations: int) -> None:
    """Raises PlanError when the plan asks more organisations in a round than there are."""
    if plan.server.sample_size > organisations:
        raise PlanError(
            f"the plan has server.sample_size = {plan.server.sample_size} and {organisations} organisations: expected at most as"
            " many as there are, or 0 for all of them"
        )


def _private(path: Path, round: int) -> np.random.Generator:
    file = path / "selection.key"
    if not file.exists():
        write_durably(file, secrets.token_hex(32).encode())
    key = file.read_text(encoding="ascii", errors="replace").strip()
    if len(key) != 64:
        raise RunError(f"{file} is damaged: expected 64 hexadecimal digits; restore it, as another key would draw rounds again")
    return keyed_generator(key, "selection", round)

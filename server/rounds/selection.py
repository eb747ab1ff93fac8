"""Who is asked to train in a round: everybody, each by chance (Poisson, `server.sample_rate`), or so many (`sample_size`).

How many take part, as an organization's rule `training.min_cohort` sees it: the roster that is signed with each request.

It names those that took part in the round before; before the first round, those that are asked. Anyone who declined only because
these were too few counts as well, or else those who have the rule would wait for each other: in the round before, and in the
attempt at this round that failed, of which there is no other trace than cohort.json.

cohort.json    in the folder of a run: the round that failed, and who declined it only by that rule
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from cotune.errors import PlanError, RunError
from cotune.plan.schema import Plan
from cotune.privacy.mechanisms.random import keyed_generator, seeded_generator
from cotune.server.runs.run_folder import Participant, RunFolder
from cotune.storage.documents import JsonDocument
from cotune.storage.files import atomic_write


def select(folder: RunFolder, round: int, without: Collection[str] = ()) -> list[Participant]:
    """The organizations of a round, in the order in which their updates are added; possibly none. The same again when a round is
    repeated after a crash.

    Drawn from the plan's seed, which everybody knows, unless privacy is to be amplified by it: then from a key that the
    operating system gave this run, and that stays with the server. without: those that may not take part any more; others take
    their place where so many are asked. Raises PlanError where more are to be asked than there are.
    """
    plan = folder.plan
    people = folder.file.participants
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


def check_sample_size(plan: Plan, organizations: int) -> None:
    """Raises PlanError when the plan asks more organizations in a round than there are."""
    if plan.server.sample_size > organizations:
        raise PlanError(
            f"the plan has server.sample_size = {plan.server.sample_size} and {organizations} organizations: expected at most as"
            " many as there are, or 0 for all of them"
        )


def _private(path: Path, round: int) -> np.random.Generator:
    file = path / "selection.key"
    if not file.exists():
        atomic_write(file, secrets.token_hex(32).encode())
    key = file.read_text(encoding="ascii", errors="replace").strip()
    if len(key) != 64:
        raise RunError(f"{file} is damaged: expected 64 hexadecimal digits; restore it, as another key would draw rounds again")
    return keyed_generator(key, "selection", round)


_RULE = "training.min_cohort"


class _Cohort(BaseModel):
    """cohort.json: who waited for others in a round that failed."""

    round: int
    waiting: list[str]


def cohort_of(folder: RunFolder, history: tuple[Mapping[str, Any], ...], asked: Iterable[str]) -> list[str]:
    """The names on the roster of the round after `history`. asked: of that round."""
    if not history:
        return list(asked)
    last = history[-1]
    dropped = {str(who["organization"]): str(who.get("reason", "")) for who in last.get("dropped", ())}
    return [*last["participants"], *waiting_in(dropped), *_waiting_before(folder, len(history) + 1)]


def waiting_in(dropped: Mapping[str, str]) -> list[str]:
    """Who has declined by the rule alone. dropped: organization -> reason."""
    return [name for name, reason in dropped.items() if _RULE in reason]


def remember_waiting(folder: RunFolder, round: int, dropped: Mapping[str, str]) -> None:
    """That a round failed in which these waited for each other: when it is played again, they count."""
    if waiting := waiting_in(dropped):
        JsonDocument(folder.path / "cohort.json", _Cohort).write(_Cohort(round=round, waiting=waiting))


def advice(dropped: Mapping[str, str]) -> str:
    """What a coordinator can do where a round failed by the rule; "" where it did not."""
    waiting = waiting_in(dropped)
    if not waiting:
        return ""
    return (
        f"; {len(waiting)} wait for others by their rule {_RULE}: --resume counts them all, and where that is not enough, begin a"
        " run of more organizations or ask them to lower the rule"
    )


def _waiting_before(folder: RunFolder, round: int) -> list[str]:
    """A damaged file is none: the roster is then as short as it was."""
    try:
        found = JsonDocument(folder.path / "cohort.json", _Cohort).read()
    except RunError:
        return []
    return found.waiting if found is not None and found.round == round else []

"""How many take part, as an organization's rule `training.min_cohort` sees it: the roster that is signed with each request.

It names those that took part in the round before; before the first round, those that are asked. Whoever declined only because
these were too few counts as well, or else those who have the rule would wait for each other: in the round before, and in the
attempt at this round that failed, of which there is no other trace than cohort.json.

cohort.json    in the folder of a run: the round that failed, and who declined it only by that rule
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cotune.models.durable import write_durably
from cotune.models.nested import json_of
from cotune.server.run_folder import RunFolder

_RULE = "training.min_cohort"


def cohort_of(folder: RunFolder, history: tuple[Mapping[str, Any], ...], asked: Iterable[str]) -> list[str]:
    """The names on the roster of the round after `history`. asked: of that round."""
    if not history:
        return list(asked)
    last = history[-1]
    dropped = {str(who["organisation"]): str(who.get("reason", "")) for who in last.get("dropped", ())}
    return [*last["participants"], *waiting_in(dropped), *_waiting_before(folder, len(history) + 1)]


def waiting_in(dropped: Mapping[str, str]) -> list[str]:
    """Who has declined by the rule alone. dropped: organization -> reason."""
    return [name for name, reason in dropped.items() if _RULE in reason]


def remember_waiting(folder: RunFolder, round: int, dropped: Mapping[str, str]) -> None:
    """That a round failed in which these waited for each other: when it is played again, they count."""
    if waiting := waiting_in(dropped):
        content = json.dumps({"round": round, "waiting": waiting}, ensure_ascii=False)
        write_durably(folder.path / "cohort.json", content.encode())


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
        found = json_of((folder.path / "cohort.json").read_bytes())
        return [str(name) for name in found["waiting"]] if found["round"] == round else []
    except (OSError, ValueError, KeyError, TypeError):
        return []

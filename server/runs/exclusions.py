"""Who has had too many updates refused, or has let too many rounds wait in vain, and is left out of a run.

strikes.json    organization -> its strikes in rounds that failed; those of finished rounds are in the checkpoints
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cotune.server.runs.run_folder import RunFolder
from cotune.storage.documents import JsonDocument

_LONGEST = 300  # characters of a reason, as it is signed


@dataclass(frozen=True)
class Fate:
    """Why an organization's last refused update was refused, and how many strikes it has."""

    refused: str = ""
    strikes: int = 0


def fates_of(folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> dict[str, Fate]:
    """Why the last refused update was, of those that have strikes, as they are told. Raises RunError."""
    reasons = dict[str, str]()
    for entry in history:
        refused = {*entry.get("quarantined", ()), *entry.get("timed_out", ())}
        reasons |= {who["organization"]: who["reason"][:_LONGEST] for who in entry["dropped"] if who["organization"] in refused}
    return {name: Fate(reasons.get(name, ""), count) for name, count in strikes_of(folder, history).items()}


def left_out(folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who has as many strikes as the plan allows. history: the rounds that are finished. Raises RunError."""
    return sorted(name for name, count in strikes_of(folder, history).items() if 0 < folder.plan.server.strikes <= count)


def strikes_of(folder: RunFolder, history: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Refused updates and time-outs of each organization; an answer that came after all, and was folded in, is none."""
    late = {(entry["round"], entry["organization"]) for each in history for entry in each.get("late", ())}
    strikes = _of_failed_rounds(folder) + Counter(name for entry in history for name in entry.get("quarantined", ()))
    return strikes + Counter(
        name for entry in history for name in entry.get("timed_out", ()) if (entry["round"], name) not in late
    )


def remember(folder: RunFolder, names: Iterable[str]) -> None:
    """That a round failed in which these got a strike each: or a round that needs everybody would fail for ever."""
    if strikes := Counter(names):
        _strikes_file(folder).write(dict(_of_failed_rounds(folder) + strikes))


def _of_failed_rounds(folder: RunFolder) -> Counter[str]:
    return Counter(_strikes_file(folder).read() or {})


def _strikes_file(folder: RunFolder) -> JsonDocument[dict[str, int]]:
    advice = "expected organizations with numbers; remove it to begin counting anew"
    return JsonDocument(folder.path / "strikes.json", dict[str, int], advice=advice)

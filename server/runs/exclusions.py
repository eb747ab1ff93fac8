"""Who has had too many updates refused, or has let too many rounds wait in vain, and is left out of a run.

strikes.json    organization -> its strikes in rounds that failed; those of finished rounds are in the checkpoints
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.runs.run_folder import RunFolder
from cotune.storage.documents import JsonDocument

_MAX_REASON_LENGTH = 300  # characters of a reason, as it is signed


@dataclass(frozen=True)
class StrikeRecord:
    """Why an organization's last refused update was refused, and how many strikes it has."""

    refused: str = ""
    strikes: int = 0


def read_strike_records(folder: RunFolder, history: Sequence[RoundEntry]) -> dict[str, StrikeRecord]:
    """Why the last refused update was, of those that have strikes, as they are told. Raises RunError."""
    reasons = dict[str, str]()
    for entry in history:
        struck = {*entry.quarantined, *entry.timed_out}
        reasons |= {who.organization: who.reason[:_MAX_REASON_LENGTH] for who in entry.dropped if who.organization in struck}
    return {name: StrikeRecord(reasons.get(name, ""), count) for name, count in count_strikes(folder, history).items()}


def find_excluded(folder: RunFolder, history: Sequence[RoundEntry]) -> list[str]:
    """Who has as many strikes as the plan allows. history: the rounds that are finished. Raises RunError."""
    return sorted(name for name, count in count_strikes(folder, history).items() if 0 < folder.plan.server.strikes <= count)


def count_strikes(folder: RunFolder, history: Sequence[RoundEntry]) -> Counter[str]:
    """Refused updates and time-outs of each organization; an answer that came after all, and was folded in, is none."""
    late = {(each.round, each.organization) for entry in history for each in entry.late}
    rejected = Counter(name for entry in history for name in entry.quarantined)
    timed_out = Counter(name for entry in history for name in entry.timed_out if (entry.round, name) not in late)
    return _of_failed_rounds(folder) + rejected + timed_out


def record_strikes(folder: RunFolder, names: Iterable[str]) -> None:
    """That a round failed in which these got a strike each: or a round that needs everybody would fail for ever."""
    if strikes := Counter(names):
        _strikes_file(folder).write(dict(_of_failed_rounds(folder) + strikes))


def _of_failed_rounds(folder: RunFolder) -> Counter[str]:
    return Counter(_strikes_file(folder).read() or {})


def _strikes_file(folder: RunFolder) -> JsonDocument[dict[str, int]]:
    advice = "expected organizations with numbers; remove it to begin counting anew"
    return JsonDocument(folder.path / "strikes.json", dict[str, int], advice=advice)

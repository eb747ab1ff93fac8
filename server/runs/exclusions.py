"""Who has had too many updates rejected, or has let too many rounds wait in vain, and is excluded from a run.

strikes.json    organization -> its strikes in rounds that failed; those of finished rounds are in the checkpoints
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cotune.reporting.documents.rounds import RoundEntry
from cotune.server.runs.run_folder import RunFolder
from cotune.storage.json_documents import JsonDocument

_MAX_REASON_LENGTH = 300  # characters of a reason, as it is signed


@dataclass(frozen=True)
class StrikeRecord:
    """The strikes of an organization, as it is told of them.

    Attributes:
        refused: Why its last rejected update was rejected.
        strikes: How many it has.
    """

    refused: str = ""
    strikes: int = 0


def read_strike_records(folder: RunFolder, history: Sequence[RoundEntry]) -> dict[str, StrikeRecord]:
    """Return the record of every organization that has strikes. Raises RunError."""
    reasons = dict[str, str]()
    for entry in history:
        struck = {*entry.quarantined, *entry.timed_out}
        reasons |= {who.organization: who.reason[:_MAX_REASON_LENGTH] for who in entry.dropped if who.organization in struck}
    return {name: StrikeRecord(reasons.get(name, ""), count) for name, count in count_strikes(folder, history).items()}


def find_excluded(folder: RunFolder, history: Sequence[RoundEntry]) -> list[str]:
    """Return who has as many strikes as the plan allows, after the finished rounds. Raises RunError."""
    return sorted(name for name, count in count_strikes(folder, history).items() if 0 < folder.plan.server.strikes <= count)


def count_strikes(folder: RunFolder, history: Sequence[RoundEntry]) -> Counter[str]:
    """Count rejected updates and time-outs of each organization; a reply that came after all, and was folded in, is none."""
    late = {(each.round, each.organization) for entry in history for each in entry.late}
    rejected = Counter(name for entry in history for name in entry.quarantined)
    timed_out = Counter(name for entry in history for name in entry.timed_out if (entry.round, name) not in late)
    return _of_failed_rounds(folder) + rejected + timed_out


def record_strikes(folder: RunFolder, names: Iterable[str]) -> None:
    """Count a strike for each name in a round that failed: or a round that needs everybody would fail for ever."""
    if strikes := Counter(names):
        _strikes_file(folder).write(dict(_of_failed_rounds(folder) + strikes))


def _of_failed_rounds(folder: RunFolder) -> Counter[str]:
    return Counter(_strikes_file(folder).read() or {})


def _strikes_file(folder: RunFolder) -> JsonDocument[dict[str, int]]:
    advice = "expected organizations with numbers; remove it to begin counting again"
    return JsonDocument(folder.path / "strikes.json", dict[str, int], advice=advice)

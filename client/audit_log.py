"""What an organization was asked for and what it has sent, entry by entry, on its own disk before it leaves: site/audit.jsonl.

A request is entered as it was signed, before anything is done for it: it proves what the server has asked for. The log may hold
more than arrived: what was handed over may have been lost on its way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from cotune.client.site_folder import SitePaths
from cotune.protocol.messages import payload_bytes
from cotune.storage.append_only_log import LineLog

# characters of a value, and of one in a list: a server may choose much of it
_MAX_TEXT_LENGTH = 1000
_MAX_ITEM_LENGTH = 100
_SIGNED = ("statement", "refused")  # truncated, they would prove nothing, and none is longer than Statement.parse allows


class AuditLog(LineLog):
    """The log of a site; see `LineLog`."""

    def __init__(self, site: Path) -> None:
        super().__init__(SitePaths(site).audit_log, "nothing is sent that is not entered there")

    @classmethod
    def at(cls, file: Path) -> AuditLog:
        """Open a copy of a log, wherever it is."""
        log = cls(file.parent)
        log.file = file
        return log

    def append(self, what: str, **fields: Any) -> None:
        """Append an entry with its texts truncated; when this returns, it survives a power cut.

        Args:
            what: "request", "update", "refusal", "receipt", "blocked" or "keys".
            fields: Plain values.

        Raises:
            RunError: The log cannot be written, or the entry is too long even so.
        """
        super().append(what, **{name: value if name in _SIGNED else _truncated(value) for name, value in fields.items()})


def _truncated(value: Any, length: int = _MAX_TEXT_LENGTH) -> Any:
    if isinstance(value, list):
        return [_truncated(item, _MAX_ITEM_LENGTH) for item in value]
    return value[:length] if isinstance(value, str) else value


def record_sizes(content: RecordDict) -> dict[str, int]:
    """Return how many bytes the names and values of each record have, before Flower's own framing."""
    return {name: payload_bytes(RecordDict({name: record})) for name, record in content.items()}

"""The log of an organization's requests and replies, written to its own disk before a reply leaves: site/audit.jsonl.

A request is entered with its signature before it is processed, which proves what the server has asked for. The log may contain
replies that never arrived, as they may have been lost in transfer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from cotune.client.site_folder import SitePaths
from cotune.protocol.messages import payload_bytes
from cotune.storage.append_only_log import LineLog

# characters of a value, and of one in a list, as a server chooses many of them
_MAX_TEXT_LENGTH = 1000
_MAX_ITEM_LENGTH = 100
_SIGNED = ("statement", "refused")  # never truncated, as they would prove nothing; Statement.parse bounds their length


class AuditLog(LineLog):
    """The log of a site; see `LineLog`."""

    def __init__(self, site: Path) -> None:
        super().__init__(SitePaths(site).audit_log, "nothing is sent that is not entered there")

    @classmethod
    def at(cls, file: Path) -> AuditLog:
        """Open a log at any path, such as a copy."""
        log = cls(file.parent)
        log.file = file
        return log

    def append(self, what: str, **fields: Any) -> None:
        """Append an entry durably, with long texts truncated.

        Args:
            what: "request", "update", "refusal", "receipt", "blocked" or "keys".
            **fields: Plain values.

        Raises:
            RunError: If the log cannot be written, or the entry is still too long.
        """
        super().append(what, **{name: value if name in _SIGNED else _truncated(value) for name, value in fields.items()})


def _truncated(value: Any, length: int = _MAX_TEXT_LENGTH) -> Any:
    if isinstance(value, list):
        return [_truncated(item, _MAX_ITEM_LENGTH) for item in value]
    return value[:length] if isinstance(value, str) else value


def record_sizes(content: RecordDict) -> dict[str, int]:
    """Return record -> size of its names and values in bytes, before Flower's framing."""
    return {name: payload_bytes(RecordDict({name: record})) for name, record in content.items()}

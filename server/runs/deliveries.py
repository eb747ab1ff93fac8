"""Who has confirmed that it has the finished model: delivered.json in the folder of a run."""

from __future__ import annotations

from datetime import UTC, datetime

from cotune.server.runs.run_folder import RunFolder
from cotune.storage.json_documents import JsonDocument


def read_deliveries(folder: RunFolder) -> dict[str, str]:
    """Return organization -> when it confirmed the finished model (UTC). Raises RunError for a damaged file."""
    return _document(folder).read() or {}


def record_delivery(folder: RunFolder, organization: str) -> None:
    """Note durably that an organization has confirmed the model, now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _document(folder).write({**read_deliveries(folder), organization: now})


def _document(folder: RunFolder) -> JsonDocument[dict[str, str]]:
    advice = "expected organizations with times; remove it to hand the model out again"
    return JsonDocument(folder.path / "delivered.json", dict[str, str], advice=advice)

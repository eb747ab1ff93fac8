"""Who has confirmed that it has the finished model: delivered.json in the folder of a run."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from cotune.errors import RunError
from cotune.server.runs.run_folder import RunFolder
from cotune.storage.documents import parse_json
from cotune.storage.files import atomic_write


def confirmed(folder: RunFolder) -> dict[str, str]:
    """Organization -> when it confirmed that it has the model (UTC). Raises RunError for a damaged file."""
    file = folder.path / "delivered.json"
    try:
        found = parse_json(file.read_bytes())
        return {str(name): str(at) for name, at in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise RunError(f"{file} is damaged: expected organizations with times; remove it to hand the model out again") from None


def record_delivery(folder: RunFolder, organization: str) -> None:
    """Note durably that an organization has confirmed the model, now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    document = json.dumps({**confirmed(folder), organization: now}, ensure_ascii=False, indent=1)
    atomic_write(folder.path / "delivered.json", document.encode())

"""Which organizations have confirmed that they have the finished model: `delivered.json` in the folder of a run."""

from __future__ import annotations

from cotune.errors import RunError
from cotune.server.runs.run_folder import RunFolder
from cotune.storage.documents import parse_json


def read_receipts(folder: RunFolder) -> dict[str, str]:
    """Organization -> when it confirmed that it has the model (UTC). Raises RunError for a damaged file."""
    file = folder.path / "delivered.json"
    try:
        found = parse_json(file.read_bytes())
        return {str(name): str(at) for name, at in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise RunError(f"{file} is damaged: expected organizations with times; remove it to hand the model out again") from None

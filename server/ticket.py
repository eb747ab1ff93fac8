"""superlink.json in a run's folder: what the SuperLink was asked for last."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from cotune.models.durable import write_durably
from cotune.models.errors import RunError
from cotune.server.run_folder import RunFolder


class Ticket(BaseModel):
    """One attempt at a run. run_id: None where the SuperLink was asked and its answer is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    submitted: str
    offset: int  # where the attempt begins in events.jsonl, in bytes
    run_id: int | None = None


def read_ticket(folder: RunFolder) -> Ticket | None:
    """None where nobody was asked yet. Raises RunError for a damaged file."""
    try:
        return Ticket.model_validate_json((folder.path / "superlink.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunError(
            f"{folder.path / 'superlink.json'} is damaged ({type(error).__name__}): remove it once no process plays the run"
        ) from None


def write_ticket(folder: RunFolder, ticket: Ticket) -> Ticket:
    """Durable when it returns. Raises RunError."""
    try:
        write_durably(folder.path / "superlink.json", json.dumps(ticket.model_dump(), indent=1).encode())
    except OSError as error:
        raise RunError(
            f"{folder.path} cannot be written ({error.strerror}): make room for it, or mend its permissions, then continue with"
            " --resume"
        ) from None
    return ticket

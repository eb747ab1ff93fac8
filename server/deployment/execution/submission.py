"""The last submission of a run to the SuperLink: superlink.json in the folder of the run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from cotune.errors import RunError
from cotune.server.runs.run_folder import RunFolder
from cotune.storage.json_documents import JsonDocument


class Submission(BaseModel):
    """One attempt at a run.

    Attributes:
        submitted: When it was submitted (UTC).
        offset: Where the attempt begins in events.jsonl, in bytes.
        run_id: The SuperLink's id of the run; None while the SuperLink's answer is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    submitted: str = Field(description="When (UTC).")
    offset: int = Field(description="Where the attempt begins in events.jsonl, in bytes.")
    run_id: int | None = Field(None, description="The SuperLink's number of the run; null while its answer is not known.")


def read_submission(folder: RunFolder) -> Submission | None:
    """Return the last submission of a run; None if there is none.

    Raises:
        RunError: If the file is damaged.
    """
    return _submission_file(folder).read()


def _submission_file(folder: RunFolder) -> JsonDocument[Submission]:
    return JsonDocument(folder.path / "superlink.json", Submission, advice="remove it once no process plays the run")


def write_submission(folder: RunFolder, ticket: Submission) -> Submission:
    """Write the submission of a run durably, and return it.

    Raises:
        RunError: If the file cannot be written.
    """
    try:
        _submission_file(folder).write(ticket)
    except OSError as error:
        raise RunError(
            f"{folder.path} cannot be written ({error.strerror}): free space for it, or correct its permissions, then continue"
            " with --resume",
            code="run.not_writable",
        ) from None
    return ticket

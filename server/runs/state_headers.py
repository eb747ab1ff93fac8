"""The small JSON documents in the folder of a run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cotune.reporting.documents.base import Document, Number

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0)]  # of a dimension


class CheckpointHeader(Document):
    """What a checkpoint says beside its tensors."""

    round: int = Field(description="The last finished round.")
    plan_id: str = Field(description="SHA-256 of the plan's canonical form.")
    history_bytes: int = Field(description="How many bytes of history.jsonl are those of the finished rounds.")
    history_sha256: str = Field(description="SHA-256 of the last of these lines, over the hash of the one before and its text.")
    clip_norm: Number | None = Field(None, description="With adaptive clipping of client-level privacy: that of the next round.")


class ChangeHeader(Document):
    """What a file with the change of a round says beside the packed values."""

    round: int = Field(description="Number of the round.")
    before: _Digest = Field(description="SHA-256 over the state after the round before.")
    start: _Digest = Field(
        description="SHA-256 over the state that organizations received, with parameters that the round added."
    )
    after: _Digest = Field(description="SHA-256 over the state after the round.")
    names: list[str] = Field(description="All parameters of the state that organizations received.")
    shapes: dict[str, list[_Size]] = Field(description="The parameters that the round has changed, with their shapes.")


class QuarantineHeader(Document):
    """What a file in quarantine says beside its arrays."""

    organization: str = Field(description="The organization that sent it.")
    round: int = Field(description="Number of the round.")
    reason: str = Field(description="What is wrong with it.")
    at: str = Field(description="When it was rejected (UTC).")
    bytes: int = Field(description="Size of the arrays.")
    sha256: str = Field(description="SHA-256 over the arrays.")
    arrays: list[str] = Field(description="The arrays as their headers describe them.")
    records: dict[str, dict[str, Any]] = Field(description="The other records, as text.")

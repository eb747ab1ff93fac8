"""The lines of trail.jsonl as models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cotune.reporting.documents.events import Event


class RequestSigned(Event):
    """A request, as the server has signed it."""

    event: Literal["request"] = "request"
    statement: str = Field(description="The statement that is signed, as canonical JSON.")
    signature: str = Field(description="Ed25519 signature of the statement, by the federation's key.")
    roster: list[str] = Field(description="Fingerprints of the organizations that took part in the round before.")


class ReplySigned(Event):
    """A reply, as its organization has signed it."""

    event: Literal["reply"] = "reply"
    round: int = Field(description="Number of the round.")
    words: str = Field("", description="The text of a refusal.")
    statement: str = Field(description="The statement that is signed, as canonical JSON.")
    signature: str = Field(description="ECDSA signature of the statement, by the organization's key.")

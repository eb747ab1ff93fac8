"""The two ends of a trail: the coordinator's trail of a run, and an organization's log of what it was asked for and has sent.

Both hold what the server has signed and what the organization has signed; each can show the other's signatures to a third party.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from cotune.errors import RunError
from cotune.protocol.signatures import (
    RECEIPT,
    REFUSAL,
    UPDATE,
    ReplyStatement,
    RequestStatement,
    is_signed_by_node,
    is_signed_by_server,
    refusal_digest,
)

_ANSWERS = (UPDATE, RECEIPT, REFUSAL, "blocked")  # the last: an answer that was refused on its way out
Entries = Iterable[Mapping[str, Any]]


@dataclass
class TrailEnd:
    """One end: digest of a request -> the request; the replies; and what is wrong in it by itself, in sentences."""

    requests: dict[str, RequestStatement] = field(default_factory=dict)
    replies: dict[str, ReplyStatement] = field(default_factory=dict)  # by the digest of the reply
    wrong: list[str] = field(default_factory=list)

    def for_run(self, run: str) -> TrailEnd:
        """Its part about one run."""
        requests = {digest: request for digest, request in self.requests.items() if request.run == run}
        replies = {digest: reply for digest, reply in self.replies.items() if reply.request in requests}
        return TrailEnd(requests, replies, self.wrong)

    def recipients(self) -> set[str]:
        return {request.recipient for request in self.requests.values()}


@dataclass(frozen=True)
class TrailComparison:
    """contradictions: what one end has and the other must have; one_sided: what may have been lost on its way."""

    requests: int
    replies: int
    contradictions: tuple[str, ...]
    one_sided: tuple[str, ...]


def read_coordinator_end(
    entries: Entries, organization: str, server: Sequence[str], node: Sequence[EllipticCurvePublicKey]
) -> TrailEnd:
    """The part of a run's trail.jsonl about one organization. server, node: the keys of both sides, those before included."""
    end = TrailEnd()
    for entry in entries:
        try:
            if entry.get("event") == "request":
                _take_request(end, entry, server, organization)
            elif entry.get("event") == "reply":
                reply = _take_reply(end, entry, node, organization)
                if reply is not None and "words" in entry and refusal_digest(str(entry["words"])) != reply.sha256:
                    end.wrong.append(f"the trail of the run: {_of_reply(end, reply)} has other words than were signed")
        except RunError as error:
            end.wrong.append(f"the trail of the run: {error}")
    return end


def read_organization_end(entries: Entries, server: Sequence[str], node: Sequence[EllipticCurvePublicKey]) -> TrailEnd:
    """An organization's log, as `entries` of it gives the lines."""
    end = TrailEnd()
    for entry in entries:
        try:
            if entry.get("what") == "request":
                _take_request(end, entry, server)
            elif entry.get("what") in _ANSWERS and "statement" in entry:
                if "refused" in entry:  # what was refused is in no line of its own
                    _take_request(end, {"statement": entry["refused"], "signature": entry.get("refused_signature")}, server)
                reply = _take_reply(end, entry, node)
                if reply is not None and reply.sha256 != entry.get("sha256"):
                    end.wrong.append(f"the log: {_of_reply(end, reply)} has another SHA-256 than was signed")
        except RunError as error:
            end.wrong.append(f"the log: {error}")
    return end


def compare_ends(coordinator: TrailEnd, organization: TrailEnd) -> TrailComparison:
    """What both have, and what they do not agree on. Both ends: of the same run and organization."""
    contradictions = [*coordinator.wrong, *organization.wrong]
    for digest in organization.requests.keys() - coordinator.requests.keys():
        contradictions.append(f"the trail lacks {_of_request(organization.requests[digest])}, which the server has signed")
    for digest in coordinator.replies.keys() - organization.replies.keys():
        what = _of_reply(coordinator, coordinator.replies[digest])
        contradictions.append(f"the log lacks {what}, which the organization has signed")
    one_sided = [
        f"{_of_request(coordinator.requests[digest])} was not accepted by the organization, or did not arrive"
        for digest in coordinator.requests.keys() - organization.requests.keys()
    ]
    for digest in organization.replies.keys() - coordinator.replies.keys():
        one_sided.append(f"{_of_reply(organization, organization.replies[digest])} did not arrive, or was not taken")
    both_requests = coordinator.requests.keys() & organization.requests.keys()
    both_replies = coordinator.replies.keys() & organization.replies.keys()
    return TrailComparison(len(both_requests), len(both_replies), tuple(sorted(contradictions)), tuple(sorted(one_sided)))


def _take_request(end: TrailEnd, entry: Mapping[str, Any], keys: Sequence[str], organization: str | None = None) -> None:
    request = RequestStatement.parse(str(entry.get("statement")))
    if organization not in (None, request.recipient):
        return
    if not any(is_signed_by_server(request, str(entry.get("signature")), key) for key in keys):
        end.wrong.append(f"{_of_request(request)} has not the signature of the server's key")
        return
    end.requests[request.digest] = request


def _take_reply(
    end: TrailEnd, entry: Mapping[str, Any], keys: Sequence[EllipticCurvePublicKey], organization: str | None = None
) -> ReplyStatement | None:
    reply = ReplyStatement.parse(str(entry.get("statement")))
    if organization not in (None, reply.sender):
        return None
    if not any(is_signed_by_node(reply, str(entry.get("signature")), key) for key in keys):
        end.wrong.append(f"{_of_reply(end, reply)} has not the signature of the organization's key")
        return None
    end.replies[reply.digest] = reply
    return reply


def _of_request(request: RequestStatement) -> str:
    return f"the request ({request.kind}) of {request.at} for round {request.round} to {request.recipient}"


def _of_reply(end: TrailEnd, reply: ReplyStatement) -> str:
    request = end.requests.get(reply.request)
    to = f"round {request.round}" if request else f"an unknown request {reply.request[:12]}"
    return f"the {reply.kind} of {reply.sender} for {to} (SHA-256 {reply.sha256[:16]}…)"

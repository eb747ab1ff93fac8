"""Compare the two sides of a trail: the coordinator's trail of a run, and an organization's log of requests and replies.

Both contain the signatures of server and organization, so that each side can prove to a third party what the other has signed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from cotune.errors import RunError
from cotune.protocol.refusals import refusal_digest
from cotune.protocol.statements import (
    RECEIPT,
    REFUSAL,
    UPDATE,
    ReplyStatement,
    RequestStatement,
    is_signed_by_node,
    is_signed_by_server,
)

_REPLY_ENTRIES = (UPDATE, RECEIPT, REFUSAL, "blocked")  # "blocked": a reply that was stopped before it was sent
Entries = Iterable[Mapping[str, Any]]


@dataclass
class TrailEnd:
    """One side of a trail.

    Attributes:
        requests: Digest of the statement -> request.
        replies: Digest of the reply -> reply.
        wrong: Problems of this side by itself, in sentences.
    """

    requests: dict[str, RequestStatement] = field(default_factory=dict)
    replies: dict[str, ReplyStatement] = field(default_factory=dict)  # by the digest of the reply
    wrong: list[str] = field(default_factory=list)

    def for_run(self, run: str) -> TrailEnd:
        """Return the part about one run."""
        requests = {digest: request for digest, request in self.requests.items() if request.run == run}
        replies = {digest: reply for digest, reply in self.replies.items() if reply.request in requests}
        return TrailEnd(requests, replies, self.wrong)

    def recipients(self) -> set[str]:
        """Return the organizations that were asked."""
        return {request.recipient for request in self.requests.values()}


@dataclass(frozen=True)
class TrailComparison:
    """The result of comparing both sides.

    Attributes:
        requests: Number of requests that both sides have.
        replies: Number of replies that both sides have.
        contradictions: Entries that one side lacks although it must have them, in sentences.
        one_sided: Entries that one side lacks because they may have been lost in transfer, in sentences.
    """

    requests: int
    replies: int
    contradictions: tuple[str, ...]
    one_sided: tuple[str, ...]


def read_coordinator_end(
    entries: Entries, organization: str, server: Sequence[str], node: Sequence[EllipticCurvePublicKey]
) -> TrailEnd:
    """Read the part of a run's trail.jsonl about one organization.

    Args:
        entries: Of the file.
        organization: Its name.
        server: The server's keys, former ones included.
        node: The organization's keys, former ones included.
    """
    end = TrailEnd()
    for entry in entries:
        try:
            if entry.get("event") == "request":
                _add_request(end, entry, server, organization)
            elif entry.get("event") == "reply":
                reply = _add_reply(end, entry, node, organization)
                if reply is not None and "words" in entry and refusal_digest(str(entry["words"])) != reply.sha256:
                    end.wrong.append(f"the trail of the run: {_describe_reply(end, reply)} has other words than were signed")
        except RunError as error:
            end.wrong.append(f"the trail of the run: {error}")
    return end


def read_organization_end(entries: Entries, server: Sequence[str], node: Sequence[EllipticCurvePublicKey]) -> TrailEnd:
    """Read an organization's audit log.

    Args:
        entries: Of the log.
        server: The server's keys, former ones included.
        node: The organization's keys, former ones included.
    """
    end = TrailEnd()
    for entry in entries:
        try:
            if entry.get("what") == "request":
                _add_request(end, entry, server)
            elif entry.get("what") in _REPLY_ENTRIES and "statement" in entry:
                if "refused" in entry:  # a refused request has no separate line
                    _add_request(end, {"statement": entry["refused"], "signature": entry.get("refused_signature")}, server)
                reply = _add_reply(end, entry, node)
                if reply is not None and reply.sha256 != entry.get("sha256"):
                    end.wrong.append(f"the log: {_describe_reply(end, reply)} has another SHA-256 than was signed")
        except RunError as error:
            end.wrong.append(f"the log: {error}")
    return end


def compare_ends(coordinator: TrailEnd, organization: TrailEnd) -> TrailComparison:
    """Compare both sides for the same run and organization."""
    contradictions = [*coordinator.wrong, *organization.wrong]
    for digest in organization.requests.keys() - coordinator.requests.keys():
        contradictions.append(f"the trail lacks {_describe_request(organization.requests[digest])}, which the server has signed")
    for digest in coordinator.replies.keys() - organization.replies.keys():
        what = _describe_reply(coordinator, coordinator.replies[digest])
        contradictions.append(f"the log lacks {what}, which the organization has signed")
    one_sided = [
        f"{_describe_request(coordinator.requests[digest])} was not accepted by the organization, or did not arrive"
        for digest in coordinator.requests.keys() - organization.requests.keys()
    ]
    for digest in organization.replies.keys() - coordinator.replies.keys():
        one_sided.append(f"{_describe_reply(organization, organization.replies[digest])} did not arrive, or was not taken")
    both_requests = coordinator.requests.keys() & organization.requests.keys()
    both_replies = coordinator.replies.keys() & organization.replies.keys()
    return TrailComparison(len(both_requests), len(both_replies), tuple(sorted(contradictions)), tuple(sorted(one_sided)))


def _add_request(end: TrailEnd, entry: Mapping[str, Any], keys: Sequence[str], organization: str | None = None) -> None:
    request = RequestStatement.parse(str(entry.get("statement")))
    if organization not in (None, request.recipient):
        return
    if not any(is_signed_by_server(request, str(entry.get("signature")), key) for key in keys):
        end.wrong.append(f"{_describe_request(request)} has not the signature of the server's key")
        return
    end.requests[request.digest] = request


def _add_reply(
    end: TrailEnd, entry: Mapping[str, Any], keys: Sequence[EllipticCurvePublicKey], organization: str | None = None
) -> ReplyStatement | None:
    reply = ReplyStatement.parse(str(entry.get("statement")))
    if organization not in (None, reply.sender):
        return None
    if not any(is_signed_by_node(reply, str(entry.get("signature")), key) for key in keys):
        end.wrong.append(f"{_describe_reply(end, reply)} has not the signature of the organization's key")
        return None
    end.replies[reply.digest] = reply
    return reply


def _describe_request(request: RequestStatement) -> str:
    return f"the request ({request.kind}) of {request.at} for round {request.round} to {request.recipient}"


def _describe_reply(end: TrailEnd, reply: ReplyStatement) -> str:
    request = end.requests.get(reply.request)
    to = f"round {request.round}" if request else f"an unknown request {reply.request[:12]}"
    return f"the {reply.kind} of {reply.sender} for {to} (SHA-256 {reply.sha256[:16]}…)"

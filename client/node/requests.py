"""Verify signed requests before anything of them is loaded or charged, and sign the answers.

A request is refused if it is not signed, or by another key; if it is from another federation, for another organization, or of
another kind; if its plan, round or arrays are not the signed ones; and if it is older than one that was accepted (a replay). Only
the last request may be repeated, as its answer may have been lost. A request can carry statements of the server's new keys
(trust.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from cotune.client.audit_log import AuditLog
from cotune.client.node.trust import Trust, record_renewals, record_use
from cotune.client.site_folder import SitePaths
from cotune.client.site_setup import read_private_key
from cotune.errors import PolicyError, RunError
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.protocol.key_renewal import ServerRenewal
from cotune.protocol.messages import Request, received_digest
from cotune.protocol.refusals import dump_refusal, refusal_digest
from cotune.protocol.signatures import attach, detach
from cotune.protocol.statements import (
    FINISHED,
    REFUSAL,
    TRAIN,
    ReplyStatement,
    RequestStatement,
    is_signed_by_server,
    roster_digest,
    sign,
)

_MAX_LOGGED = 200  # fingerprints of a roster in a line of the log


@dataclass(frozen=True)
class SignedRequest:
    """A request whose signature was verified.

    Attributes:
        statement: What was signed.
        signature: Of the statement.
        key: The server's signing key, as hex.
        roster: Fingerprints of the nodes in the cohort.
        trusts: The newest signing key of the server that the site trusts, as hex.
    """

    statement: RequestStatement
    signature: str
    key: str
    roster: tuple[str, ...]
    trusts: str

    @property
    def is_notice(self) -> bool:
        """Whether it contains no model, but the notice that the organization was excluded from the run."""
        return self.statement.kind == FINISHED and self.statement.strikes > 0

    def entry(self) -> dict[str, Any]:
        """Return its fields for the audit log."""
        return {
            "statement": self.statement.text(),
            "signature": self.signature,
            "key": self.key,
            "roster": list(self.roster[:_MAX_LOGGED]),
        }


def verify_request(content: RecordDict, folder: Path, now: datetime | None = None) -> tuple[RecordDict, SignedRequest]:
    """Verify the signature of a request.

    Args:
        content: The message.
        folder: Of the site.
        now: The current time; None: read the clock.

    Returns:
        (the content without its signature, the signed request).

    Raises:
        RunError: If the signature is missing, malformed, or by a key that the site does not accept; if the request is from
            another federation; or if the server's new keys are not signed by its old one.
    """
    rest, signed = detach(content)
    if signed is None:
        raise RunError("the request is not signed: expected a server whose cotune signs its requests", code="run.unsigned")
    record_renewals(folder, ServerRenewal.parse_all(signed.about.pop("renewals", "")))
    trust = Trust.read(folder)
    statement = RequestStatement.parse(signed.text)
    keys = trust.signing_keys()
    key = next((key for key in keys if is_signed_by_server(statement, signed.signature, key)), None)
    if key is None:
        raise RunError(
            f"the signature of the request is not of the server of {trust.name}: expected its signing key",
            code="run.wrong_signature",
        )
    if statement.federation != trust.federation:
        raise RunError(
            f"the request is of federation {statement.federation[:12]}: expected {trust.federation[:12]}",
            code="run.wrong_federation",
        )
    roster = tuple(signed.about.get("roster", "").split())
    if len(set(roster)) != statement.cohort or roster_digest(roster) != statement.roster:
        raise RunError("the roster of the request is not the one that was signed", code="run.wrong_roster")
    if key != keys[0]:
        record_use(folder, key, now)
    return rest, SignedRequest(statement, signed.signature, key, roster, trust.newest.signing_key)


def check_request(requested: SignedRequest, kind: str, request: Request, plan: Plan, log: AuditLog) -> None:
    """Check that a request's header is the signed one, and not older than the last request that was accepted.

    Args:
        requested: The verified statement.
        kind: The expected kind of request.
        request: The decoded header.
        plan: The decoded plan.
        log: Contains the accepted requests.

    Raises:
        RunError: If the header differs from the statement, or the request is a replay.
    """
    statement = requested.statement
    found = {
        "kind": kind,
        "recipient": request.organization,
        "round": request.round,
        "admitted": request.admitted,
        "plan": plan.plan_id,
    }
    for name, value in found.items():
        if getattr(statement, name) != value:
            raise RunError(
                f"the request has {name} = {value!s:.80}: expected {getattr(statement, name)!s:.80}, as was signed",
                code="run.wrong_signature",
            )
    last = _last(log, statement.federation)
    if last is not None and statement != last and statement.serial <= last.serial:
        raise RunError(
            f"the request of {statement.at} for round {statement.round} is an old one: expected one signed after {last.at}",
            code="run.replayed",
        )


def check_arrays(requested: SignedRequest, request: Request) -> None:
    """Raise RunError unless the arrays of a request are those that were signed."""
    if received_digest(request.state, request.sent) != requested.statement.received:
        raise RunError(
            "the request holds other arrays than were signed: expected those of its server", code="run.wrong_signature"
        )


def check_limits(requested: SignedRequest, policy: Policy, log: AuditLog, now: datetime | None = None) -> None:
    """Check a request against the policy's limits on the cohort and on rounds per day (UTC).

    Args:
        requested: The verified request.
        policy: Of the organization.
        log: Contains the rounds that were started today.
        now: The current time; None: read the clock.

    Raises:
        PolicyError: If the cohort is too small, or too many rounds were started today.
    """
    rules = policy.training
    statement = requested.statement
    if statement.kind != TRAIN:
        return
    if statement.cohort < rules.min_cohort:
        problem = f"{statement.cohort} took part in the round before, expected at least {rules.min_cohort}"
        raise PolicyError("training.min_cohort", problem)
    if rules.max_rounds_per_day is None:
        return
    begun = _rounds_of_day(log, (now or datetime.now(UTC)).date().isoformat())
    if len(begun - {(statement.run, statement.round)}) >= rules.max_rounds_per_day:
        raise PolicyError(
            "training.max_rounds_per_day", f"{len(begun)} rounds were begun today, expected at most {rules.max_rounds_per_day}"
        )


def countersign(content: RecordDict, kind: str, digest: str, requested: SignedRequest, folder: Path) -> dict[str, str]:
    """Sign an answer with the key of the organization's node.

    Args:
        content: The answer, to which the signature is attached.
        kind: Such as "update".
        digest: Of the content.
        requested: The request that it answers.
        folder: Of the site.

    Returns:
        The fields of its log entry.

    Raises:
        RunError: If the key cannot be read.
    """
    statement, signature = _countersigned(kind, digest, requested, folder)
    attach(content, statement, signature)
    return {"statement": statement.text(), "signature": signature}


def countersign_refusal(words: str, requested: SignedRequest, folder: Path) -> tuple[str, dict[str, str]]:
    """Sign a refusal.

    Args:
        words: Its text.
        requested: The request that it answers.
        folder: Of the site.

    Returns:
        (the signed text, the fields of its log entry). The entry includes the request, which has no separate one.

    Raises:
        RunError: If the key cannot be read.
    """
    digest = refusal_digest(words)
    statement, signature = _countersigned(REFUSAL, digest, requested, folder)
    entry = {"sha256": digest, "statement": statement.text(), "signature": signature}
    entry |= {"refused": requested.statement.text(), "refused_signature": requested.signature}
    return dump_refusal(words, statement, signature), entry


def _countersigned(kind: str, digest: str, requested: SignedRequest, folder: Path) -> tuple[ReplyStatement, str]:
    request = requested.statement
    statement = ReplyStatement(request.digest, request.recipient, kind, digest, requested.trusts)
    return statement, sign(statement, read_private_key(SitePaths(folder).private_key))


def last_declarable_range(log: AuditLog, plan_id: str) -> tuple[int, int] | None:
    """Return the smallest and largest number of records that the last request of this plan allows; None if unknown."""
    for entry in log.newest_first():
        if entry.get("what") == "request":
            statement = RequestStatement.parse(str(entry.get("statement")))
            if (statement.kind, statement.plan) == (TRAIN, plan_id):
                return statement.declarable
    return None


def _last(log: AuditLog, federation: str) -> RequestStatement | None:
    """Return the federation's last request that was accepted."""
    for entry in log.newest_first():
        if entry.get("what") == "request":
            statement = RequestStatement.parse(str(entry.get("statement")))
            if statement.federation == federation:
                return statement
    return None


def _rounds_of_day(log: AuditLog, day: str) -> set[tuple[str, int]]:
    """Return (run, round) of the rounds that were started on a day, by this machine's clock."""
    found = set[tuple[str, int]]()
    for entry in log.newest_first():
        if str(entry.get("at", ""))[:10] < day:
            break
        if entry.get("what") == "request":
            statement = RequestStatement.parse(str(entry.get("statement")))
            found |= {(statement.run, statement.round)} if statement.kind == TRAIN else set()
    return found

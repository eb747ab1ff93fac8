"""The coordinator's side of the trail: the signed statements of all requests and replies of a run.

trail.jsonl    in the folder of a run: the statements and signatures, in the order of their creation

The other side is the log of what an organization has sent (`cotune client sent`); `cotune server verify-trail` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Message, RecordDict

from cotune.errors import RunError
from cotune.protocol.key_renewal import ServerRenewal
from cotune.protocol.messages import Recipient
from cotune.protocol.refusals import parse_refusal, refusal_digest
from cotune.protocol.signatures import Signed, attach, content_digest, detach
from cotune.protocol.statements import (
    FINISHED,
    RECEIPT,
    REFUSAL,
    TRAIN,
    UPDATE,
    ReplyStatement,
    RequestStatement,
    is_signed_by_node,
    roster_digest,
    sign,
)
from cotune.reporting.documents.trail_lines import ReplySigned, RequestSigned
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.keys.key_rotation import read_renewals
from cotune.server.deployment.keys.signing import next_serial, public_keys, read_signing_key
from cotune.server.runs.events import Events, read_events
from cotune.server.runs.exclusions import StrikeRecord
from cotune.server.runs.run_folder import RunFolder


class SignedTrail:
    """The trail of one run of a federation (see `rounds.run_environment.Trail`)."""

    def __init__(self, folder: RunFolder) -> None:
        self._run = folder.file.id
        self._plan_id = folder.plan.plan_id
        self._federation = FederationFolder(Path(folder.file.federation))
        self._log = Events(folder.path / "trail.jsonl", silent=True)
        self._requests: dict[tuple[str, int, str], str] = {}  # (kind of reply, round, organization) -> digest of the request

    def sign(
        self,
        kind: str,
        round: int,
        contents: Mapping[str, RecordDict],
        recipients: Iterable[Recipient],
        received: str,
        cohort: Iterable[str],
        fates: Mapping[str, StrikeRecord] | None = None,
    ) -> None:
        """See `rounds.run_environment.Trail.sign`: recorded in trail.jsonl."""
        folder = self._federation.certificates
        key = read_signing_key(folder)
        serial = next_serial(folder)
        renewed = ServerRenewal.join(read_renewals(folder))
        members = {member.name: member for member in self._federation.members.active()}
        keys = {name: member.fingerprint for name, member in members.items()}
        roster = sorted(keys[name] for name in set(cohort) & keys.keys())
        for who in recipients:
            fate = (fates or {}).get(who.organization, StrikeRecord())
            member = members.get(who.organization)
            least, most = (member.examples if member and kind == TRAIN else None) or (0, 0)
            statement = RequestStatement(
                federation=self._federation.config.id,
                run=self._run,
                kind=kind,
                plan=self._plan_id,
                round=round,
                recipient=who.organization,
                admitted=who.admitted,
                received=received,
                cohort=len(roster),
                roster=roster_digest(roster),
                serial=serial,
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                least=least,
                most=most,
                refused=fate.refused,
                strikes=fate.strikes,
            )
            signature = sign(statement, key)
            self._log.write(RequestSigned(statement=statement.text(), signature=signature, roster=roster))
            about = {"roster": "\n".join(roster), **({"renewals": renewed} if renewed else {})}
            attach(contents[who.organization], statement, signature, **about)
            self._requests[_get_reply_kind(kind), round, who.organization] = statement.digest

    def accept(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Remove the signature from a reply, verify it and record it.

        Args:
            reply: A reply with content, which is changed in place.
            kind: `UPDATE` or `RECEIPT`.
            round: The round of its request.
            organization: Who was asked.

        Returns:
            "" if the signature is that of the organization, else what is wrong.
        """
        try:
            reply.content, signed = detach(reply.content)
        except RunError as error:
            return str(error)
        if signed is None:
            return "it is not signed: expected an organization of the same cotune"
        request = self._requests.get((kind, round, organization))
        return self._record_reply(signed, (request, organization, kind, content_digest(reply.content)), round)

    def accept_refusal(self, reply: Message, kind: str, round: int, organization: str) -> str:
        """Return an organization's reason for its refusal, and record it if it is signed.

        An organization that cannot read a request signs nothing. Its reason is accepted nevertheless, as it has no consequences.

        Args:
            reply: A reply with an error.
            kind: The kind of reply that was expected.
            round: The round of its request.
            organization: Who was asked.
        """
        words, signed = parse_refusal(reply.error.reason or "")
        if signed is not None:
            request = self._requests.get((kind, round, organization))
            if wrong := self._record_reply(signed, (request, organization, REFUSAL, refusal_digest(words)), round, words=words):
                return f"it refused, under a signature that is none ({wrong})"
        return words or f"error {reply.error.code}"

    def _record_reply(self, signed: Signed, expected: tuple[str | None, str, str, str], round: int, **about: str) -> str:
        """Record a statement if it is as expected (request, organization, kind, digest); return "", else what is wrong."""
        try:
            statement = ReplyStatement.parse(signed.text)
        except RunError as error:
            return str(error)
        if (statement.request, statement.sender, statement.kind) != expected[:3]:
            return "its signature is for another request, organization or kind of answer"
        if statement.sha256 != expected[3]:
            return "it is not what its organization has signed"
        if not self._is_signed_by(statement.sender, statement, signed):
            return "its signature is not that of its organization's key"
        self._log.write(ReplySigned(round=round, **about, statement=signed.text, signature=signed.signature))
        return ""

    def _is_signed_by(self, organization: str, statement: ReplyStatement, signed: Signed) -> bool:
        keys = _read_node_keys(self._federation).get(organization, [])
        return any(is_signed_by_node(statement, signed.signature, key) for key in keys)


def read_verification_keys(folder: RunFolder) -> tuple[list[str], dict[str, list[EllipticCurvePublicKey]]]:
    """Return the keys that verify a run's signatures: the federation's and each organization's, including former ones.

    Raises:
        RunError: If the run is a simulation, which signs nothing.
    """
    if not folder.file.federation:
        raise RunError(
            f"{folder.path} is a simulation, which signs nothing: expected a run of a federation",
            code="run.simulation_without_trail",
        )
    federation = FederationFolder(Path(folder.file.federation))
    return public_keys(federation.certificates), _read_node_keys(federation)


def _read_node_keys(federation: FederationFolder) -> dict[str, list[EllipticCurvePublicKey]]:
    """Return organization -> keys of its nodes, including former ones."""
    nodes: dict[str, list[EllipticCurvePublicKey]] = {}
    for member in federation.members.all():
        key = load_pem_public_key(member.key)
        if isinstance(key, EllipticCurvePublicKey):
            nodes.setdefault(member.name, []).append(key)
    return nodes


def _get_reply_kind(kind: str) -> str:
    return {TRAIN: UPDATE, FINISHED: RECEIPT}[kind]


def read_trail(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a trail.

    Args:
        run: The folder of a run, or a copy of its trail.jsonl.

    Raises:
        RunError: If there is no trail.
    """
    try:
        return [entry.as_json() for entry in read_events(run / "trail.jsonl" if run.is_dir() else run)]
    except OSError as error:
        raise RunError(
            f"{run} has no trail ({error.strerror}): expected that of a run of a federation", code="run.no_trail"
        ) from None

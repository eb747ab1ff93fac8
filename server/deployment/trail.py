"""The coordinator's end of the trail: each request as it was signed, and each answer as its organization has signed it.

trail.jsonl    in the folder of a run: the statements and signatures of requests and answers, in the order in which they were made

The other end is the log of what an organization has sent (`cotune client sent`); `cotune server verify-trail` compares the two.
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
from cotune.protocol.signatures import (
    FINISHED,
    RECEIPT,
    REFUSAL,
    TRAIN,
    UPDATE,
    ReplyStatement,
    RequestStatement,
    Signed,
    attach,
    content_digest,
    detach,
    is_signed_by_node,
    parse_refusal,
    refusal_digest,
    roster_digest,
    sign,
)
from cotune.reporting.documents.trail import ReplySigned, RequestSigned
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.keys.key_rotation import read_renewals
from cotune.server.deployment.keys.signing import next_serial, public_keys, read_signing_key
from cotune.server.runs.events import Events, read_events
from cotune.server.runs.exclusions import StrikeRecord
from cotune.server.runs.run_folder import RunFolder


class SignedTrail:
    """The trail of one run of a federation (see `rounds.session.Trail`)."""

    def __init__(self, folder: RunFolder) -> None:
        self._run = folder.file.id
        self._plan_id = folder.plan.plan_id
        self._federation = FederationFolder(Path(folder.file.federation))
        self._log = Events(folder.path / "trail.jsonl", silent=True)
        self._requests: dict[tuple[str, int, str], str] = {}  # kind of the reply, round, organization -> digest of the request

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
        """Puts a signature into each request, and enters it. cohort: names of those that took part in the round before.
        fates: what became of earlier updates, of those that have to know.

        Raises RunError without a signing key, and where the trail cannot be written.
        """
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
        """Takes the signature out of an answer, and enters it; "" where it is that of its organization, else what is wrong.

        kind: `UPDATE` or `RECEIPT`.
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
        """What an organization says instead of an answer of this kind, entered where it has signed it.

        Anyone who cannot read a request, or answers in a simulation, signs nothing: it is believed, as nothing comes of it.
        """
        words, signed = parse_refusal(reply.error.reason or "")
        if signed is not None:
            request = self._requests.get((kind, round, organization))
            if wrong := self._record_reply(signed, (request, organization, REFUSAL, refusal_digest(words)), round, words=words):
                return f"it refused, under a signature that is none ({wrong})"
        return words or f"error {reply.error.code}"

    def _record_reply(self, signed: Signed, expected: tuple[str | None, str, str, str], round: int, **about: str) -> str:
        """ "" where the statement is as expected (request, organization, kind, digest), else what is wrong."""
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
    """The keys by which signatures of a run are checked: the federation's, and each organization's, former ones included.

    Raises RunError for a simulation, which signs nothing.
    """
    if not folder.file.federation:
        raise RunError(
            f"{folder.path} is a simulation, which signs nothing: expected a run of a federation",
            code="run.simulation_without_trail",
        )
    federation = FederationFolder(Path(folder.file.federation))
    return public_keys(federation.certificates), _read_node_keys(federation)


def _read_node_keys(federation: FederationFolder) -> dict[str, list[EllipticCurvePublicKey]]:
    """Organization -> the keys of its nodes, former ones included."""
    nodes: dict[str, list[EllipticCurvePublicKey]] = {}
    for member in federation.members.all():
        key = load_pem_public_key(member.key)
        if isinstance(key, EllipticCurvePublicKey):
            nodes.setdefault(member.name, []).append(key)
    return nodes


def _get_reply_kind(kind: str) -> str:
    return {TRAIN: UPDATE, FINISHED: RECEIPT}[kind]


def read_trail(run: Path) -> list[dict[str, Any]]:
    """The lines of a trail: of the folder of a run, or of a copy of its file. Raises RunError where there is none."""
    try:
        return [entry.as_json() for entry in read_events(run / "trail.jsonl" if run.is_dir() else run)]
    except OSError as error:
        raise RunError(
            f"{run} has no trail ({error.strerror}): expected that of a run of a federation", code="run.no_trail"
        ) from None

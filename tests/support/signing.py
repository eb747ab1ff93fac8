"""Signatures of made-up servers and organizations, in place of those that a federation would make."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import RecordDict

from cotune.client.node.trust import Trust, TrustedServer
from cotune.plan.load import parse_plan
from cotune.protocol.messages import decode_request, received_digest
from cotune.protocol.signatures import attach, content_digest, detach
from cotune.protocol.statements import TRAIN, UPDATE, ReplyStatement, RequestStatement, roster_digest, sign

FEDERATION = 32 * "f"
SERVER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NODE_KEY = ec.derive_private_key(7, ec.SECP384R1())
_serials = itertools.count(1)


def trusting(site: Path) -> None:
    """The site knows the server's key, and has one of its own."""
    public = SERVER_KEY.public_key().public_bytes_raw().hex()
    Trust(federation=FEDERATION, name="tests", generations=(TrustedServer(signing_key=public, certificates=""),)).write(site)
    (site / "node.key").write_bytes(NODE_KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (site / "node.key").chmod(0o600)


def sign_request(
    content: RecordDict,
    kind: str = TRAIN,
    *,
    roster: tuple[str, ...] = ("a", "b"),
    key: Ed25519PrivateKey = SERVER_KEY,
    **changes: Any,
) -> RequestStatement:
    """Signs a request as a server does, also one that is malformed. changes: of the statement."""
    said: dict[str, Any] = {
        "federation": FEDERATION,
        "run": 32 * "1",
        "kind": kind,
        "plan": 64 * "0",
        "round": 1,
        "recipient": "clinic",
        "admitted": 0,
        "received": "",
        "cohort": len(roster),
        "roster": roster_digest(roster),
        "serial": next(_serials),
        "at": "2026-01-01T00:00:00+00:00",
    }
    with suppress(Exception):
        request = decode_request(content)
        said |= {"round": request.round, "recipient": request.organization, "admitted": request.admitted}
        said |= {"received": received_digest(request.state, request.sent)}
        said |= {"plan": parse_plan(json.loads(request.plan)).plan_id}
    statement = RequestStatement(**{**said, **changes})
    attach(content, statement, sign(statement, key), roster="\n".join(roster))
    return statement


def countersign(
    content: RecordDict,
    asked_by: RecordDict,
    name: str,
    key: EllipticCurvePrivateKey,
    kind_of_reply: str = UPDATE,
    /,
    **changes: str,
) -> None:
    """Signs an answer to a request as an organization does; nothing where the request is not signed. changes: of the statement."""
    _, signed = detach(asked_by)
    if signed is None:
        return
    asked = RequestStatement.parse(signed.text)
    said = {"request": asked.digest, "sender": name, "kind": kind_of_reply, "sha256": content_digest(content), "trusts": 64 * "0"}
    statement = ReplyStatement(**{**said, **changes})
    attach(content, statement, sign(statement, key))

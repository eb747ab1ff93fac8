"""Signatures of made-up servers and organizations, in place of those that a federation would make."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import RecordDict

from cotune.plan.signatures import UPDATE, ReplyStatement, RequestStatement, attach, content_digest, detach, sign

__all__ = ["countersign"]


def countersign(
    content: RecordDict, request: RecordDict, name: str, key: EllipticCurvePrivateKey, kind: str = UPDATE, **changes: str
) -> None:
    """Signs an answer to a request as an organization does; nothing where the request is not signed. changes: of the statement."""
    _, signed = detach(request)
    if signed is None:
        return
    asked = RequestStatement.parse(signed.text)
    said = {"request": asked.digest, "sender": name, "kind": kind, "sha256": content_digest(content), "trusts": 64 * "0"}
    statement = ReplyStatement(**{**said, **changes})
    attach(content, statement, sign(statement, key))

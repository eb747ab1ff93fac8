"""Refusals: the reply of an organization that does not train, the few sentences that it may hold, and its signed text."""

from __future__ import annotations

import hashlib
import json
import re

from flwr.app import Error, Message

from cotune.errors import PolicyError, RunError
from cotune.protocol.signatures import Signed
from cotune.protocol.statements import Statement

REFUSED = 1001  # the error code of the reply
GENERIC_REFUSAL = "it did not train; the reason is in its own log"  # even the kind of failure may depend on a record
APPROVAL = "training.approval"  # the rule by which a person has to approve the plan first: asked again later
MIN_COHORT = "training.min_cohort"  # the rule by which an organization waits for others
WHOLE_STATE = "it does not hold the version that the request builds on: expected the whole state"  # asked again at once with it
_DECLINED = re.compile(re.escape(PolicyError("RULE", "").public).replace("RULE", r"([a-z_]+\.[a-z_]+)"))


class VersionLost(RunError):
    """A site does not hold the version that a request builds on, or it is damaged: it answers with `WHOLE_STATE`."""

    code = "run.version_lost"


def lacks_version(message: Message | None) -> bool:
    """Return whether a reply is no more than the wish for the whole state (see `VersionLost`)."""
    return message is not None and message.has_error() and parse_refusal(message.error.reason or "")[0] == WHOLE_STATE


def refusal(message: Message, reason: str) -> Message:
    """Return the reply that states, instead of an update, why the organization did not train."""
    return Message(Error(REFUSED, reason), reply_to=message)


def find_declining_rule(reason: str) -> str | None:
    """Return the rule that a reason names, as `table.name`; None for any other sentence than `PolicyError.public`."""
    found = _DECLINED.fullmatch(reason)
    return None if found is None else found[1]


def refusal_digest(words: str) -> str:
    """Return the SHA-256 of the text of a refusal."""
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def dump_refusal(words: str, statement: Statement, signature: str) -> str:
    """Return a refusal and its signature as one text, as Flower's errors contain only a text.

    Args:
        words: The reason of the refusal.
        statement: What was signed.
        signature: As hex.
    """
    return json.dumps({"words": words, "statement": statement.text(), "signature": signature})


def parse_refusal(text: str) -> tuple[str, Signed | None]:
    """Parse the text of a refusal.

    Returns:
        (the reason, the signature or None). A node that could not read its request does not sign.
    """
    try:
        found = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return text, None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("words", "statement", "signature")):
        return text, None
    return found["words"], Signed(found["statement"], found["signature"], {})

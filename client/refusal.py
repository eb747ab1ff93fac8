"""What an organisation answers instead of an update: an error reply whose words hold nothing of its data."""

from __future__ import annotations

from flwr.app import Error, Message

UNSAID = "it did not train; the reason is in its own log"  # even the kind of failure may depend on a record
_REFUSED = 1001  # error code of a reply in which an organisation says why it did not train


def refusal(message: Message, reason: str) -> Message:
    return Message(Error(_REFUSED, reason), reply_to=message)

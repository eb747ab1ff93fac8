"""Names, numbers and parsers of Flower's Fleet API, for the proxy, which imports none of Flower's modules."""

from __future__ import annotations

from flwr.common.constant import SUPERLINK_NODE_ID, SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.encode()
SIGNATURE_HEADER = FLEET_HTTP_SIGNATURE_HEADER.encode()
TIME_HEADER = TIMESTAMP_HEADER.encode()
MAX_AGE = float(TIMESTAMP_TOLERANCE)  # seconds for which a signature is valid
CLOCK_TOLERANCE = float(SYSTEM_TIME_TOLERANCE)  # seconds
SERVER_NODE: int = SUPERLINK_NODE_ID


def parse_push(content: bytes) -> PushMessagesRequest:
    """Parse the content of a `push-messages`; raises DecodeError if it is malformed."""
    request: PushMessagesRequest = PushMessagesRequest.FromString(content)
    return request


def parse_pull(content: bytes) -> PullMessagesResponse:
    """Parse an answer to a `pull-messages`; raises DecodeError if it is malformed."""
    response: PullMessagesResponse = PullMessagesResponse.FromString(content)
    return response

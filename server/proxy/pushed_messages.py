"""Check what a member announces: one reply, to a request of the server, from itself, with a plausible tree of objects.

Flower's SuperLink does not verify `push-messages`. It stores a message from node 1 (the server) as an instruction to any node
that the message names, and registers a tree of objects whose content it has not seen: an identifier registered with a made-up
child blocks the object that really has that identifier (docs/decisions/0013-object-store.md). A time that is NaN becomes NULL
in its database, and from then on every query for replies that reads that row fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError

from cotune.server.proxy.fleet_types import FleetFormat, Metadata, ObjectTree
from cotune.server.proxy.protobuf_fields import MalformedMessage, TooManyFields, get_field_length, iterate_fields

MAX_DEPTH = 5  # levels: message, content, record, array, chunk
_MAX_HEADER_BYTES = 16 * 2**10  # bytes of a message without its content: addresses, or the text of an error
_MAX_REMEMBERED = 200_000  # identifiers of objects that the server sent, 32 bytes each
_MIN_OBJECTS = 64  # objects that a reply may have, however small the requests are
_OBJECT_ID = re.compile(r"[0-9a-f]{64}")  # SHA-256, as Flower writes it
_MAX_SECONDS = 1e12  # the largest number of seconds in a message, since 1970 or as a duration
# fields of a PushMessagesRequest
_NODE = 1
_MESSAGE = 2
_TREE = 3
_RUNTIME = 4
_CHILDREN = 2  # of an ObjectTree


class SentObjects:
    """The objects that the server has sent to members, taken from the answers that passed: no reply contains one of them.

    The oldest are dropped beyond a limit, and all of them when the process ends. That is safe: knowing an object only adds a
    reason to refuse.

    Args:
        fleet: For the parser of answers.
    """

    def __init__(self, fleet: FleetFormat) -> None:
        self.fleet = fleet
        self._known: dict[bytes, None] = {}
        self._largest = 0

    def record_pull_response(self, content: bytes) -> int:
        """Record the objects of an answer to `pull-messages`.

        Args:
            content: Of the answer. A malformed one is ignored: it comes from the SuperLink, and the client will notice.

        Returns:
            The number of requests in it.
        """
        try:
            trees = self.fleet.parse_pull(content).message_object_trees
        except DecodeError:
            return 0
        for tree in trees:
            found = [bytes.fromhex(part.object_id) for part in _iterate_tree(tree) if _OBJECT_ID.fullmatch(part.object_id)]
            self._largest = max(self._largest, len(found))
            self._known.update(dict.fromkeys(found))
        for oldest in list(self._known)[: max(0, len(self._known) - _MAX_REMEMBERED)]:
            del self._known[oldest]
        return len(trees)

    def max_objects(self, limit: int) -> int:
        """Return the largest number of objects in a reply: two arrays for each array of the request, and a few records.

        Args:
            limit: Upper bound of the result.
        """
        return min(limit, max(_MIN_OBJECTS, 2 * self._largest + 32)) if self._largest else limit

    def contains_any(self, identifiers: Iterable[str]) -> bool:
        """Return whether the server has sent any of the objects."""
        return any(bytes.fromhex(identifier) in self._known for identifier in identifiers)


def find_push_problem(content: bytes, limit: int, sent: SentObjects) -> str | None:
    """Return why the content of a `push-messages` may not pass; None if it may.

    Args:
        content: Any bytes. Fields and objects are counted before the message is parsed.
        limit: The largest number of objects in a reply, whatever the request.
        sent: The objects that the server has sent so far.
    """
    most = sent.max_objects(limit)
    try:
        if reason := _find_outline_problem(content, most):
            return reason
        request = sent.fleet.parse_push(content)
    except (MalformedMessage, DecodeError):
        return "it is no announcement of a reply as Flower writes it"
    [message] = request.messages_list
    [tree] = request.message_object_trees
    return (
        _find_sender_problem(message.metadata, request.node.node_id, sent.fleet.server_node)
        or _find_time_problem(message.metadata, request.clientapp_runtime_list)
        or _find_tree_problem(tree, message.metadata.message_id, sent)
    )


def _find_outline_problem(content: bytes, most: int) -> str | None:
    """Check the number and the lengths of a message's fields without parsing it."""
    found = list(iterate_fields(content, 5))
    numbers = sorted(number for number, _ in found)
    if numbers not in ([_NODE, _MESSAGE, _TREE], [_NODE, _MESSAGE, _TREE, _RUNTIME]):
        return f"it has the fields {numbers}, expected a node, one message, its tree, and how long it took"
    if any(get_field_length(value) > _MAX_HEADER_BYTES for number, value in found if number != _TREE):
        return f"its message has more than {_MAX_HEADER_BYTES} bytes beside the tree: expected one without content"
    [tree] = [value for number, value in found if number == _TREE]
    count = _count_objects(tree if isinstance(tree, bytes) else b"", most)
    return f"its tree has more than {most} objects" if count > most else None


def _count_objects(tree: bytes, most: int) -> int:
    """Count the objects of a tree, up to one above the limit; raises MalformedMessage if it is deeper than MAX_DEPTH."""
    count = 0
    waiting = [(tree, 1)]
    while waiting:
        part, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise MalformedMessage
        try:
            inside = list(iterate_fields(part, most + 1))  # the identifier and the children
        except TooManyFields:
            return most + 1
        waiting += [(value, depth + 1) for number, value in inside if number == _CHILDREN and isinstance(value, bytes)]
        if count + len(waiting) > most:
            return most + 1
    return count


def _find_sender_problem(about: Metadata, node: int, server: int) -> str | None:
    """Check the addresses of a message.

    Args:
        about: Its header.
        node: The caller, which the SuperLink compares with the key.
        server: The SuperLink's own node number.
    """
    if not about.reply_to_message_id:
        return "it replies to nothing: only the server sends requests"
    if about.src_node_id != node or node == server:
        return "its source is another node than the one that sends it"
    if about.dst_node_id != server:
        return "its destination is another node: replies go to the server"
    return None


def _find_time_problem(about: Metadata, took: Iterable[float]) -> str | None:
    """Check the times of a message, and the seconds that the node states it worked."""
    stated = [("ttl", about.ttl), ("created_at", about.created_at), *(("clientapp_runtime", seconds) for seconds in took)]
    for name, value in stated:
        if not (math.isfinite(value) and 0 <= value <= _MAX_SECONDS):
            return f"its {name} is {value:g}: expected a number of seconds"
    return None


def _find_tree_problem(tree: ObjectTree, message: str, sent: SentObjects) -> str | None:
    found = [part.object_id for part in _iterate_tree(tree)]
    if not all(_OBJECT_ID.fullmatch(identifier) for identifier in found):
        return "an object of its tree has no identifier as Flower writes them"
    if tree.object_id != message:
        return "its tree is that of another message"
    if len(found) != len(set(found)):
        return "an object is in its tree twice"
    return "its tree holds an object that the server has sent" if sent.contains_any(found) else None


def _iterate_tree(tree: ObjectTree) -> Iterator[ObjectTree]:
    """Yield every object of a tree, without recursion."""
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += part.children

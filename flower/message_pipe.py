"""Messages through a pipe between two processes of one program: bytes, as Flower writes them, and no pickles.

The values of arrays are sent one array after the other: Flower cannot write a message of more than 2 GiB as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage


def send_message(pipe: Connection, message: Message) -> None:
    """Send a message, for `receive_message` at the other end.

    Raises:
        OSError: If nobody is there any more.
    """
    pipe.send_bytes(message_to_proto(_hollow(message)).SerializeToString())
    for array in _arrays(message):
        pipe.send_bytes(array.data)


def receive_message(pipe: Connection) -> Message:
    """Wait for a message that was sent by `send_message`, and return it.

    Raises:
        EOFError, OSError: If the other process ended before it had sent all of it.
    """
    message = message_from_proto(ProtoMessage.FromString(pipe.recv_bytes()))
    for array in _arrays(message):
        array.data = pipe.recv_bytes()
    return message


def _arrays(message: Message) -> Iterator[Array]:
    """Yield the arrays in their order in the message."""
    for record in message.content.values() if message.has_content() else ():
        if isinstance(record, ArrayRecord):
            yield from record.values()


def _hollow(message: Message) -> Message:
    """Return the message with arrays of no values."""
    if not message.has_content():
        return message
    content = RecordDict({name: _without_values(record) for name, record in message.content.items()})
    return make_message(metadata=message.metadata, content=content)


def _without_values(record: ArrayRecord | ConfigRecord | MetricRecord) -> ArrayRecord | ConfigRecord | MetricRecord:
    if not isinstance(record, ArrayRecord):
        return record
    return ArrayRecord({name: Array(array.dtype, array.shape, array.stype, b"") for name, array in record.items()})

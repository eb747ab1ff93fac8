"""Read the fields of a protobuf message without parsing it: a megabyte of empty messages would take a hundred in memory.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_FIXED_LENGTHS = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10


class MalformedMessage(Exception):
    """The bytes are not a protobuf message."""


class TooManyFields(MalformedMessage):
    """The message has more fields than allowed."""


def iterate_fields(content: bytes, most: int) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field: an integer for a varint, bytes for all other types.

    Args:
        content: Any bytes.
        most: The largest number of fields.

    Raises:
        MalformedMessage: If it is malformed, or uses groups.
        TooManyFields: If it has more fields.
    """
    position = 0
    count = 0
    while position < len(content):
        count += 1
        if count > most:
            raise TooManyFields
        tag, position = _read_varint(content, position)
        value: bytes | int
        if tag & 7 == _VARINT:
            value, position = _read_varint(content, position)
        else:
            value, position = _read_value(content, position, tag & 7)
        yield tag >> 3, value


def get_field_length(value: bytes | int) -> int:
    """Return the length of a field's value in bytes; 0 for an integer."""
    return len(value) if isinstance(value, bytes) else 0


def _read_value(content: bytes, position: int, kind: int) -> tuple[bytes, int]:
    if kind == _BYTES:
        length, position = _read_varint(content, position)
    elif kind in _FIXED_LENGTHS:
        length = _FIXED_LENGTHS[kind]
    else:
        raise MalformedMessage
    if length > len(content) - position:
        raise MalformedMessage
    return content[position : position + length], position + length


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(content[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise MalformedMessage

"""The fields of a protobuf message without building it: a megabyte of empty messages would become a hundred times as much.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


class MalformedMessage(Exception):
    """This is no message."""


class TooManyFields(MalformedMessage):
    """It has more fields than it may."""


def fields(content: bytes, most: int) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field: an integer for a varint, otherwise its bytes.

    Args:
        content: any bytes.
        most: the number of fields from which on it is not read any further.

    Raises:
        Damaged: what is malformed, or uses groups.
        TooMany: what has more fields.
    """
    position = 0
    count = 0
    while position < len(content):
        count += 1
        if count > most:
            raise TooManyFields
        tag, position = _varint(content, position)
        value: bytes | int
        if tag & 7 == _VARINT:
            value, position = _varint(content, position)
        else:
            value, position = _counted(content, position, tag & 7)
        yield tag >> 3, value


def get_field_length(value: bytes | int) -> int:
    """Bytes of a field's value; 0 for a number."""
    return len(value) if isinstance(value, bytes) else 0


def _counted(content: bytes, position: int, kind: int) -> tuple[bytes, int]:
    if kind == _BYTES:
        length, position = _varint(content, position)
    elif kind in _FIXED:
        length = _FIXED[kind]
    else:
        raise MalformedMessage
    if length > len(content) - position:
        raise MalformedMessage
    return content[position : position + length], position + length


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(content[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise MalformedMessage

"""Encode arrays of messages as float32 in NumPy's format or with a codec, salted so that no two messages share an object.

The codec is never the sender's choice: an array that names another one is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache, partial
from io import BytesIO

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.printable import printable
from cotune.protocol.codecs import pack, packed_bytes, unpack

SALTED = "cotune.salted"  # type of an array in NumPy's format, masked by a key
_SALT_BYTES = 32
ARRAY_HEAD = 1024  # bytes of an array beside its values that a request may need, with a margin
_MAX_ARRAY_HEADER_BYTES = 16_384  # bytes before the values of an array, in NumPy's format
_MAX_DIMENSIONS = 8  # of an array
_MAX_VALUES = 2**40  # product of an array's dimensions other than 0, which PyTorch limits, too
# The header of https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. NumPy's reader evaluates it as a Python
# literal, which fails occasionally if several threads do so at the same time (CPython 3.11).
_NPY_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)"
    rb"\{'descr': '(?P<type>[^']{1,20})', 'fortran_order': (?P<order>True|False),"
    rb" 'shape': \((?P<shape>[0-9, ]{0,400})\), ?\} *\n",
    re.DOTALL,
)
_NUMPY = Array(np.zeros(0, np.float32)).stype  # Flower's name of NumPy's format


def new_salt() -> bytes:
    """Draw the salt of a message."""
    return secrets.token_bytes(_SALT_BYTES)


def read_salt(record: ConfigRecord) -> bytes:
    """Return the salt in a message's header; raises RunError if it is missing or malformed."""
    salt = record.get("salt")
    if not isinstance(salt, bytes) or len(salt) != _SALT_BYTES:
        raise RunError(f"a message has salt = {salt!r:.60}: expected {_SALT_BYTES} bytes", code="run.malformed_message")
    return salt


def derive_key(salt: bytes, *names: str) -> bytes:
    """Derive the key of 32 bytes for one part of a message from its salt."""
    return hashlib.sha256(b"\0".join([salt, *(name.encode() for name in names)])).digest()


def _mask(data: bytes, key: bytes) -> bytes:
    """Mask every byte, as Flower splits long arrays into separate objects. Masking again restores the data."""
    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(data)


def encode_arrays(tensors: Mapping[str, Tensor], salt: bytes, record: str, codec: Codec = "float32") -> ArrayRecord:
    """Encode the tensors of a record.

    Args:
        tensors: Name -> float32 tensor; for a codec, rounded to its values.
        salt: Of the message.
        record: Name of the record; together with the tensor's name, it determines the key of the mask.
        codec: How values are written.

    Raises:
        RunError: If the codec cannot write a value.
    """
    return ArrayRecord({name: _encode_array(tensor, derive_key(salt, record, name), codec) for name, tensor in tensors.items()})


def _encode_array(tensor: Tensor, key: bytes, codec: Codec) -> Array:
    if codec == "float32":
        plain = Array(tensor.detach().cpu().contiguous().numpy())
        return Array(plain.dtype, plain.shape, SALTED, _mask(plain.data, key))
    return Array(codec, tuple(tensor.shape), SALTED, _mask(pack(codec, tensor), key))


class HeldArrays(ArrayRecord):
    """Tensors in the place of what would be written of them, in a message that stays in its process.

    No message from elsewhere holds them: what Flower reads is an `ArrayRecord`. As with one that was written, what its sender
    changes later is not in it, and everybody who reads it gets tensors of their own.

    Attributes:
        held: The tensors, in float32 on the CPU; nobody may change them.
        codec: How they would be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor], codec: Codec = "float32") -> None:
        super().__init__()
        self.held = {name: _copy(tensor) for name, tensor in tensors.items()}
        self.codec: Codec = codec

    def copies(self, codec: Codec) -> dict[str, Tensor]:
        """Return the tensors as `decode_tensors` reads them. Raises RunError for another codec than that of both sides."""
        if codec != self.codec:
            raise RunError(
                f"the arrays of a message are held as {self.codec}: expected {codec}, in which both sides agree that they travel",
                code="run.other_codec",
            )
        return {name: _copy(tensor) for name, tensor in self.held.items()}

    def count_payload(self) -> int:
        """Return how many bytes names and arrays would have."""
        return sum(len(name.encode()) + count_written(self.codec, tuple(tensor.shape)) for name, tensor in self.held.items())


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


@lru_cache(maxsize=1024)
def count_written(codec: Codec, shape: tuple[int, ...]) -> int:
    """Return how many bytes an array of float32 has when it is written."""
    count = math.prod(shape)
    if codec != "float32":
        return packed_bytes(codec, count)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return len(header.getvalue()) + 4 * count


def hold_arrays(tensors: Mapping[str, Tensor], codec: Codec = "float32") -> HeldArrays | None:
    """Return tensors as a message holds them that stays here; None where they are not in float32, and are to be refused."""
    return HeldArrays(tensors, codec) if all(tensor.dtype == torch.float32 for tensor in tensors.values()) else None


def decode_tensors(content: RecordDict, key: str, header: str, codec: Codec = "float32") -> dict[str, Tensor]:
    """Decode the arrays of a record.

    Args:
        content: The message.
        key: Name of the record of arrays.
        header: Name of the record with the message's salt.
        codec: The plan's codec; an array in another one is refused.

    Returns:
        Name -> float32 tensor.

    Raises:
        RunError: If the record is missing, or an array is malformed or in another codec.
    """
    record = content.get(key)
    if isinstance(record, HeldArrays):
        return record.copies(codec)
    if not isinstance(record, ArrayRecord):
        raise RunError(
            f"received a message without its arrays: expected an ArrayRecord named {key}", code="run.malformed_message"
        )
    about = content[header]
    assert isinstance(about, ConfigRecord), "its fields were read before"
    salt = read_salt(about)
    read = _decode_tensor if codec == "float32" else partial(_decode_packed, codec=codec)
    return {name: read(name, _unmask(array, derive_key(salt, key, name))) for name, array in record.items()}


def _unmask(array: Array, key: bytes) -> Array:
    """Remove the mask of an array. An array without a mask is accepted, as only its own message is at risk."""
    return Array(array.dtype, array.shape, _NUMPY, _mask(array.data, key)) if array.stype == SALTED else array


def _decode_packed(name: str, array: Array, codec: Codec) -> Tensor:
    """Decode an array of the plan's codec; the memory needed is bounded by its bytes, whatever shape it claims."""
    if array.dtype != codec or array.stype != _NUMPY:
        raise _other_codec(name, array, codec)
    shape = tuple(array.shape)
    possible = len(shape) <= _MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in shape)
    if not possible or math.prod(max(1, size) for size in shape) > _MAX_VALUES:
        raise RunError(
            f"the array {name[:80]} has the shape {str(shape[:_MAX_DIMENSIONS])[:80]}: expected at most {_MAX_DIMENSIONS}"
            " numbers, 0 or more, as a tensor has them",
            code="run.malformed_message",
        )
    return unpack(codec, array.data, shape)


def _decode_tensor(name: str, array: Array) -> Tensor:
    if array.dtype != "float32" or array.stype != _NUMPY:
        raise _other_codec(name, array, "float32")
    header = _NPY_HEADER.match(array.data)
    if header is None:
        raise _unreadable_array(name)
    shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    if header["type"] != b"<f4" or shape != tuple(array.shape) or (header["order"] == b"True" and len(shape) > 1):
        raise RunError(
            f"the array {name[:80]} is not what its header says: expected float32 of shape {tuple(array.shape)}",
            code="run.malformed_message",
        )
    if header.end() > _MAX_ARRAY_HEADER_BYTES:
        raise RunError(
            f"the array {name[:80]} has {header.end():,} bytes beside its values: expected a short header alone",
            code="run.malformed_message",
        )
    if len(array.data) - header.end() != 4 * math.prod(shape):
        raise _unreadable_array(name)
    values = np.frombuffer(array.data, dtype="<f4", offset=header.end()).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


def _other_codec(name: str, array: Array, codec: Codec) -> RunError:
    given = printable(f"{array.dtype[:40]}/{array.stype[:40]}")
    return RunError(
        f"the array {name[:80]} has the type {given}: expected {codec}, in which both sides agree that it travels",
        code="run.other_codec",
    )


def _unreadable_array(name: str) -> RunError:
    return RunError(f"the array {name[:80]} cannot be read: expected a NumPy array of float32", code="run.malformed_message")

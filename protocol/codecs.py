"""Codecs: how the values of an update are written, in 32, 16, about 8 or about 4 bits each.

An organization rounds its noised delta once to values that the codec can write (`round_to`), and stores, logs and sends the
rounded delta, for which `pack` and `unpack` are lossless. Rounding follows the noise, so it is post-processing and costs no
privacy. It is stochastic and unbiased, E[round_to(x)] = x (Alistarh et al., QSGD, NeurIPS 2017, eq. 1): the errors of many
organizations and rounds average out instead of adding up.

`int8` and `int4` are block floating point: each 64 values share one power of two, and each value is a small integer times it (the
integer formats of the OCP Microscaling specification v1.0, section 5, with longer blocks). As division by a power of two is
exact, a rounded delta can be written again without further loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import BLOCK, Codec, largest_integer

_EXPONENTS = (-126, 127)  # the smallest and the largest of the shared powers of two
_CHUNK = 1 << 16  # values per step, a multiple of BLOCK; it bounds the memory beside the tensor itself

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]


def packed_bytes(codec: Codec, count: int) -> int:
    """Return the size in bytes of `count` packed values."""
    return _FORMATS[codec].size(count)


def rounding_generator(seed: int, organization: str, round: int, name: str) -> np.random.Generator:
    """Return the random generator for rounding one parameter of one update; a repeated round gets the same numbers.

    They need not be secret: a rounded value reveals nothing that the noised value does not.

    Args:
        seed: Of the plan.
        organization: Whose update it is.
        round: Of the update.
        name: Of the parameter.
    """
    text = "\0".join(["cotune rounding", str(seed), organization, str(round), name])
    words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def round_to(codec: Codec, values: Tensor, generator: np.random.Generator) -> Tensor:
    """Round values stochastically to those that a codec can write.

    Args:
        codec: The codec.
        values: (…) float32, on the CPU, finite.
        generator: Draws one uniform number for each value.

    Returns:
        (…) float32, equal to `values` in expectation; for a codec that writes every float32, `values` itself.

    Raises:
        RunError: If a value is not finite, or so large that its rounded value would not be.
    """
    if codec == "float32":
        return values
    source = _flat(values)
    rounded = np.empty_like(source)
    for part in _parts(len(source)):
        rounded[part] = _FORMATS[codec].round(source[part], generator)
    if not np.isfinite(rounded).all():
        raise RunError(f"an update holds a value that {codec} cannot write: expected finite ones", code="run.not_encodable")
    return torch.from_numpy(rounded).reshape(values.shape)


def pack(codec: Codec, values: Tensor) -> bytes:
    """Write values that `round_to` has rounded; `unpack` restores them exactly.

    Raises:
        RunError: If the codec cannot write a value without loss.
    """
    source = _flat(values)
    packed = _FORMATS[codec].pack(source)
    if not np.array_equal(_FORMATS[codec].unpack(np.frombuffer(packed, dtype=np.uint8), len(source)), source):
        raise RunError(f"an update holds a value that was not rounded to {codec}: nothing was sent", code="run.not_encodable")
    return packed


def unpack(codec: Codec, data: bytes, shape: tuple[int, ...]) -> Tensor:
    """Read what `pack` has written.

    Args:
        codec: The codec of the plan, never one that the sender names.
        data: The packed values; they are untrusted and may be any bytes.
        shape: The expected shape, from the plan.

    Returns:
        (shape) float32, finite.

    Raises:
        RunError: If there are too few or too many bytes, or a value is not finite.
    """
    count = math.prod(shape)
    if len(data) != (expected := packed_bytes(codec, count)):
        raise RunError(
            f"received an array of {len(data):,} bytes, expected {expected:,} for {count:,} values as {codec}",
            code="run.malformed_update",
        )
    values = _FORMATS[codec].unpack(np.frombuffer(data, dtype=np.uint8), count)
    if not np.isfinite(values).all():
        raise RunError(f"an array in {codec} holds values that are not finite: expected finite ones", code="run.malformed_update")
    return torch.from_numpy(values).reshape(shape)


def _flat(values: Tensor) -> Floats:
    if values.dtype != torch.float32:
        raise RunError(f"an update holds values of {values.dtype}: expected torch.float32", code="run.not_encodable")
    flat: Floats = values.detach().contiguous().view(-1).numpy()
    return flat


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


class _Format(Protocol):
    """How the values of a codec are rounded and written."""

    def size(self, count: int) -> int:
        """Return the bytes that `count` values take."""

    def round(self, values: Floats, generator: np.random.Generator) -> Floats:
        """Round (n,) -> (n,); a value that cannot be written becomes one that is not finite."""

    def pack(self, values: Floats) -> bytes:
        """Write (n,) rounded values; others are written as a value nearby."""

    def unpack(self, data: Bytes, count: int) -> Floats:
        """Read `size(count)` bytes -> (count,), which may contain values that are not finite."""


class _Float32:
    def size(self, count: int) -> int:
        return 4 * count

    def round(self, values: Floats, generator: np.random.Generator) -> Floats:
        return values

    def pack(self, values: Floats) -> bytes:
        return values.astype("<f4").tobytes()

    def unpack(self, data: Bytes, count: int) -> Floats:
        return data.view("<f4").astype(np.float32)


class _BFloat16:
    """The upper half of a float32."""

    def size(self, count: int) -> int:
        return 2 * count

    def round(self, values: Floats, generator: np.random.Generator) -> Floats:
        """Add 16 random bits and truncate, which rounds away from zero with a probability equal to the truncated fraction."""
        drawn = generator.integers(0, 1 << 16, size=len(values), dtype=np.uint32)
        bits = (values.view(np.uint32) + drawn) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(values), bits.view(np.float32), np.float32(np.nan))

    def pack(self, values: Floats) -> bytes:
        return (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()

    def unpack(self, data: Bytes, count: int) -> Floats:
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass(frozen=True)
class _BlockIntegers:
    """A signed integer of 8 or 4 bits for each value, after one exponent for each block: value = integer · 2^exponent."""

    bits: Literal[8, 4]

    @property
    def _limit(self) -> int:
        """The largest integer; the smallest is its negative."""
        return largest_integer(self.bits)

    def size(self, count: int) -> int:
        return _block_count(count) + -(-count * self.bits // 8)

    def round(self, values: Floats, generator: np.random.Generator) -> Floats:
        if not np.isfinite(values).all():
            return np.full_like(values, np.nan)
        quotients, exponents = self._scaled(values)
        integers = np.floor(quotients + _blocks(generator.random(len(values))))
        return _product(np.clip(integers, -self._limit, self._limit), exponents, len(values))

    def pack(self, values: Floats) -> bytes:
        parts = [self._pack_part(values[part]) for part in _parts(len(values))]
        return b"".join([*(exponents for exponents, _ in parts), *(integers for _, integers in parts)])

    def unpack(self, data: Bytes, count: int) -> Floats:
        exponents = data[: _block_count(count)].view(np.int8)
        rest = data[_block_count(count) :]
        values = np.empty(count, dtype=np.float32)
        for part in _parts(count):
            size = part.stop - part.start
            integers = self._integers(rest[part.start * self.bits // 8 : -(-part.stop * self.bits // 8)], size)
            own = exponents[part.start // BLOCK : _block_count(part.stop)].astype(np.int64)
            values[part] = _product(_blocks(integers.astype(np.float64)), own, size)
        return values

    def _pack_part(self, values: Floats) -> tuple[bytes, bytes]:
        """Return the packed exponents and integers of whole blocks, and of the array's end."""
        quotients, exponents = self._scaled(np.nan_to_num(values))
        integers = np.rint(quotients).astype(np.int8).reshape(-1)[: len(values)]
        return exponents.astype(np.int8).tobytes(), integers.tobytes() if self.bits == 8 else _nibbles(integers)

    def _integers(self, data: Bytes, count: int) -> NDArray[np.int8]:
        return data.view(np.int8) if self.bits == 8 else _from_nibbles(data, count)

    def _scaled(self, values: Floats) -> tuple[Doubles, NDArray[np.int64]]:
        """Divide each block by 2^e, with the smallest e that leaves no |value| above the limit: (blocks, BLOCK), (blocks,)."""
        blocks = _blocks(values.astype(np.float64))
        fraction, power = np.frexp(np.abs(blocks).max(axis=1) / self._limit)  # fraction · 2^power, fraction in [1/2, 1)
        exponents = np.clip(power - (fraction == 0.5), *_EXPONENTS).astype(np.int64)
        return np.ldexp(blocks, -exponents[:, None]), exponents


def _block_count(count: int) -> int:
    return -(-count // BLOCK)


def _blocks(values: Doubles) -> Doubles:
    """Reshape (n,) -> (blocks, BLOCK), padded with zeros."""
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


def _product(integers: Doubles, exponents: NDArray[np.int64], count: int) -> Floats:
    """Return integers (blocks, BLOCK) · 2^exponents (blocks,) as (count,); infinite for too large exponents, never -0."""
    with np.errstate(over="ignore"):
        values: Floats = np.ldexp(integers + 0.0, exponents[:, None]).astype(np.float32)
    return values.reshape(-1)[:count]


def _nibbles(integers: NDArray[np.int8]) -> bytes:
    """Pack two integers in [-8, 7] into each byte, the first in its lower half."""
    even = np.pad(integers, (0, len(integers) % 2)).view(np.uint8) & np.uint8(0xF)
    return (even[::2] | (even[1::2] << np.uint8(4))).tobytes()


def _from_nibbles(data: Bytes, count: int) -> NDArray[np.int8]:
    nibbles = np.stack([data & np.uint8(0xF), data >> np.uint8(4)], axis=1).reshape(-1)[:count]
    return (nibbles ^ np.uint8(8)).view(np.int8) - np.int8(8)  # two's complement


_FORMATS: dict[Codec, _Format] = {
    "float32": _Float32(),
    "bfloat16": _BFloat16(),
    "int8": _BlockIntegers(8),
    "int4": _BlockIntegers(4),
}

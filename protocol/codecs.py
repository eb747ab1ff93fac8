"""Codecs: how the values of an update are written, in 32, 16, about 8 or about 4 bits each.

An organization rounds its noised delta once, onto the values that the codec can write (`round_to`); from then on that delta is
what it stores, logs and sends, and `pack` and `unpack` lose nothing. Rounding follows the noise, so that it is post-processing
and costs no privacy. It is stochastic and unbiased, E[round_to(x)] = x (Alistarh et al., QSGD, NeurIPS 2017, eq. 1): the errors
of many organizations and rounds average out instead of adding up.

`int8` and `int4` are block floating point: each 64 values share one power of two, and each value is a small integer times it (the
integer formats of the OCP Microscaling specification v1.0, section 5, with longer blocks). As a power of two divides exactly, a
rounded delta is written again without any further loss.
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
_CHUNK = 1 << 16  # values that are worked on at once, a multiple of BLOCK: bounds the memory beside the tensor itself

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]


def packed_bytes(codec: Codec, count: int) -> int:
    """Return how many bytes `pack` needs for so many values."""
    return _FORMATS[codec].size(count)


def rounding_generator(seed: int, organization: str, round: int, name: str) -> np.random.Generator:
    """Return the random numbers with which one parameter of one update is rounded: the same whenever the round is repeated.

    They need not be secret: a rounded value says nothing that the noised value does not say already.

    Args:
        seed: The plan's.
        organization: Whose update it is.
        round: Of which round.
        name: Of the parameter.
    """
    text = "\0".join(["cotune rounding", str(seed), organization, str(round), name])
    words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def round_to(codec: Codec, values: Tensor, generator: np.random.Generator) -> Tensor:
    """Round values stochastically onto those that a codec can write.

    Args:
        codec: The codec.
        values: (…) float32, on the CPU, finite.
        generator: Draws one uniform number for each value.

    Returns:
        (…) float32, equal to `values` in expectation; for a codec that writes every float32, `values` itself.

    Raises:
        RunError: A value is not finite, or so large that its rounded value would not be.
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
    """Write values that `round_to` has rounded; `unpack` gives exactly these back.

    Raises:
        RunError: A value is none that the codec can write, so that something would be lost.
    """
    source = _flat(values)
    packed = _FORMATS[codec].pack(source)
    if not np.array_equal(_FORMATS[codec].unpack(np.frombuffer(packed, dtype=np.uint8), len(source)), source):
        raise RunError(f"an update holds a value that was not rounded to {codec}: nothing was sent", code="run.not_encodable")
    return packed


def unpack(codec: Codec, data: bytes, shape: tuple[int, ...]) -> Tensor:
    """Read what `pack` has written: any bytes are values, or one clear error.

    Args:
        codec: The codec of the plan, never one that the sender names.
        data: The packed values, from a stranger.
        shape: What is expected, from the plan.

    Returns:
        (shape) float32, finite.

    Raises:
        RunError: The bytes are too few or too many, or stand for values that are not finite.
    """
    count = math.prod(shape)
    if len(data) != (expected := packed_bytes(codec, count)):
        raise RunError(
            f"an array of {len(data):,} bytes came, expected {expected:,} for {count:,} values as {codec}",
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
        """Bytes for so many values."""

    def round(self, values: Floats, generator: np.random.Generator) -> Floats:
        """(n,) -> (n,); what cannot be written becomes a value that is not finite."""

    def pack(self, values: Floats) -> bytes:
        """(n,) rounded values -> bytes; of others, those of near ones."""

    def unpack(self, data: Bytes, count: int) -> Floats:
        """`size(count)` bytes -> (count,), finite or not."""


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
        """Add 16 random bits below the last one that stays, and cut: away from zero with the probability of the rest."""
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
        """The exponents and the integers of whole blocks, and the array's end."""
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
    """(n,) -> (blocks, BLOCK), filled up with zeros."""
    return np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)


def _product(integers: Doubles, exponents: NDArray[np.int64], count: int) -> Floats:
    """(blocks, BLOCK) integers · 2^(blocks,) -> (count,); infinite where a stranger's exponent is too large. There is no -0."""
    with np.errstate(over="ignore"):
        values: Floats = np.ldexp(integers + 0.0, exponents[:, None]).astype(np.float32)
    return values.reshape(-1)[:count]


def _nibbles(integers: NDArray[np.int8]) -> bytes:
    """Two integers in [-8, 7] a byte, the first in its lower half."""
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

"""Codecs of updates: unbiased rounding onto what can be written, writing without loss, and bytes from strangers."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cotune.errors import RunError
from cotune.plan.wire import BLOCK, Codec
from cotune.protocol.codecs import pack, packed_bytes, round_to, rounding_generator, unpack

CODECS: list[Codec] = ["float32", "bfloat16", "int8", "int4"]
LOSSY: list[Codec] = ["bfloat16", "int8", "int4"]
LARGEST = 2.0**100
FINITE = st.floats(-LARGEST, LARGEST, width=32)
VALUES = arrays(np.float32, st.integers(0, 3 * BLOCK + 1), elements=FINITE)


def generator(seed: int = 0) -> np.random.Generator:
    return rounding_generator(seed, "org-1", 1, "head.weight")


@pytest.mark.parametrize("codec", CODECS)
@given(values=VALUES, seed=st.integers(0, 5))
def test_packing_loses_nothing_of_rounded_values(codec: Codec, values: np.ndarray, seed: int) -> None:
    rounded = round_to(codec, torch.from_numpy(values), generator(seed))
    packed = pack(codec, rounded)
    assert len(packed) == packed_bytes(codec, len(values))
    read = unpack(codec, packed, tuple(rounded.shape))
    assert read.numpy().tobytes() == rounded.numpy().tobytes()  # the same bits, so that both sides find the same digest


@pytest.mark.parametrize("codec", CODECS)
@given(values=VALUES, seed=st.integers(0, 5))
def test_rounding_rounded_values_changes_nothing(codec: Codec, values: np.ndarray, seed: int) -> None:
    rounded = round_to(codec, torch.from_numpy(values), generator(seed))
    assert torch.equal(round_to(codec, rounded, generator(seed + 1)), rounded)


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
@given(values=arrays(np.float32, BLOCK, elements=FINITE))
def test_rounding_moves_a_value_by_less_than_a_step_of_its_block(codec: Codec, levels: int, values: np.ndarray) -> None:
    """The step is at most twice the largest value over the number of levels, as it is a power of two."""
    rounded = round_to(codec, torch.from_numpy(values), generator()).double().numpy()
    step = max(2 * float(np.abs(values).max()) / levels, 2.0**-126)
    assert (np.abs(rounded - values.astype(np.float64)) < step).all()


@given(value=FINITE)
def test_rounding_to_bfloat16_gives_one_of_the_two_neighbors(value: float) -> None:
    rounded = float(round_to("bfloat16", torch.tensor([value]), generator())[0])
    assert abs(rounded - value) <= max(abs(value) * 2**-7, 2.0**-133)


@pytest.mark.parametrize("codec", LOSSY)
def test_rounding_is_unbiased(codec: Codec) -> None:
    """The mean over draws is near each value, by Hoeffding's inequality: two neighbors are drawn, a step apart.

    It would fail for an unbiased codec with a probability below 1e-9; a bias of a twentieth of a step fails it.
    """
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(1))
    count = 8000
    draws = round_to(codec, values.repeat(count), generator()).reshape(count, BLOCK).double()
    steps = draws.amax(dim=0) - draws.amin(dim=0)
    allowed = steps * math.sqrt(math.log(2 * BLOCK / 1e-9) / (2 * count))
    assert ((draws.mean(dim=0) - values.double()).abs() <= allowed).all()
    assert (steps > 0).sum() > BLOCK / 2, "hardly anything was rounded: the test shows nothing"
    assert (allowed < steps / 20 + 1e-12).all()


def test_rounding_is_repeatable_and_differs_between_updates() -> None:
    values = torch.randn(1000)
    again = [round_to("int8", values, rounding_generator(7, *of)) for of in [("a", 1, "x"), ("a", 1, "x")]]
    other = [round_to("int8", values, rounding_generator(7, *of)) for of in [("b", 1, "x"), ("a", 2, "x"), ("a", 1, "y")]]
    assert torch.equal(*again)
    assert all(not torch.equal(again[0], rounded) for rounded in other)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_rounded(codec: Codec, value: float) -> None:
    with pytest.raises(RunError) as caught:
        round_to(codec, torch.tensor([1.0, value]), generator())
    assert caught.value.code == "run.not_encodable"


@pytest.mark.parametrize("codec", LOSSY)
def test_largest_float_is_rounded_to_finite_or_refused(codec: Codec) -> None:
    largest = torch.full((200,), torch.finfo(torch.float32).max)
    with contextlib.suppress(RunError):
        assert round_to(codec, largest, generator()).isfinite().all()


@pytest.mark.parametrize("codec", LOSSY)
def test_values_that_were_not_rounded_are_not_packed(codec: Codec) -> None:
    with pytest.raises(RunError) as caught:
        pack(codec, torch.tensor([1.0, 1.0 / 3.0]))
    assert caught.value.code == "run.not_encodable"


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=300)
@given(data=st.binary(max_size=4 * BLOCK), count=st.integers(0, 2 * BLOCK))
def test_any_bytes_are_finite_values_or_one_error(codec: Codec, data: bytes, count: int) -> None:
    if len(data) != packed_bytes(codec, count):
        with pytest.raises(RunError) as caught:
            unpack(codec, data, (count,))
        assert caught.value.code == "run.malformed_update"
        return
    with contextlib.suppress(RunError):
        values = unpack(codec, data, (count,))
        assert values.shape == (count,)
        assert values.isfinite().all()


@pytest.mark.parametrize("codec", CODECS)
def test_random_bytes_decode_to_values_or_one_error(codec: Codec) -> None:
    seen = set()
    for seed in range(200):
        data = np.random.default_rng(seed).bytes(packed_bytes(codec, 3))
        try:
            assert unpack(codec, data, (3,)).isfinite().all()
            seen.add("values")
        except RunError:
            seen.add("error")
    assert "values" in seen


@pytest.mark.parametrize(("codec", "most"), [("bfloat16", 0.501), ("int8", 0.26), ("int4", 0.142)])
def test_bytes_beside_float32(codec: Codec, most: float) -> None:
    count = 49_152
    assert packed_bytes(codec, count) / packed_bytes("float32", count) <= most


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("count", [1 << 16, (1 << 16) + 1, (1 << 17) + BLOCK - 1])
def test_arrays_longer_than_a_block_are_packed_whole(codec: Codec, count: int) -> None:
    """All exponents first, then all integers."""
    rounded = round_to(codec, torch.randn(count), generator())
    packed = pack(codec, rounded)
    assert torch.equal(unpack(codec, packed, (count,)), rounded)
    first, rest = pack(codec, rounded[:BLOCK]), pack(codec, rounded[BLOCK:])
    blocks = -(-count // BLOCK)
    assert packed == first[:1] + rest[: blocks - 1] + first[1:] + rest[blocks - 1 :]


def test_long_arrays_are_rounded_as_their_parts_are() -> None:
    """Longer than what is rounded at once, in more than one dimension, and not contiguous."""
    values = torch.randn(700, 401).T
    rounded = round_to("int8", values, generator())
    assert rounded.shape == values.shape
    assert torch.equal(unpack("int8", pack("int8", rounded), tuple(rounded.shape)), rounded)
    assert (rounded - values).abs().max() < 2 * values.abs().max() / 127

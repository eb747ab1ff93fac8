"""By how much rounding can lengthen an update: never by more than is allowed for, and by as much for the worst one."""

from __future__ import annotations

from typing import cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from cotune.plan.wire import BLOCK, Codec, compute_growth
from cotune.protocol.codecs import round_to

CODECS: tuple[Codec, ...] = get_args(Codec)
BLOCKS = arrays(np.float32, st.integers(1, 2 * BLOCK), elements=st.floats(-1e3, 1e3, width=32))


class AlwaysAway:
    """Draws with which every value that is not exact is rounded up, the worst case for positive ones."""

    def random(self, count: int) -> np.ndarray:
        return np.full(count, 1 - 2.0**-53)

    def integers(self, low: int, high: int, *, size: int, dtype: type) -> np.ndarray:
        return np.full(size, high - 1, dtype=dtype)


def round_away(codec: Codec, values: Tensor) -> Tensor:
    return round_to(codec, values, cast(np.random.Generator, AlwaysAway()))


def length(values: Tensor) -> float:
    return float(values.double().norm())


@pytest.mark.parametrize("codec", CODECS)
@given(values=BLOCKS)
def test_no_draw_lengthens_an_update_by_more(codec: Codec, values: np.ndarray) -> None:
    tensor = torch.from_numpy(np.abs(values))
    assert length(round_away(codec, tensor)) <= compute_growth(codec) * length(tensor) * (1 + 1e-12) + 1e-30


@pytest.mark.parametrize("codec", ["int8", "int4"])
@given(data=st.data())
def test_blocks_just_above_the_steps_are_lengthened_by_no_more(codec: Codec, data: st.DataObject) -> None:
    """Where the bound is tight: each value a little above a multiple of the step."""
    steps = data.draw(arrays(np.int64, BLOCK, elements=st.integers(0, 127 if codec == "int8" else 7)))
    tensor = torch.from_numpy((steps + 1e-4).astype(np.float32))
    assert length(round_away(codec, tensor)) <= compute_growth(codec) * length(tensor)


def just_above(largest: float, others: float) -> Tensor:
    values = torch.full((BLOCK,), others + 1e-6)
    values[0] = largest + 1e-5
    return values


@pytest.mark.parametrize(("codec", "worst"), [("int8", just_above(64, 7)), ("int4", just_above(3.5, 0))])
def test_the_worst_block_is_lengthened_by_as_much(codec: Codec, worst: Tensor) -> None:
    assert length(round_away(codec, worst)) == pytest.approx(compute_growth(codec) * length(worst), rel=1e-4)


def test_growth_of_each_codec_by_hand() -> None:
    assert compute_growth("float32") == 1
    assert compute_growth("bfloat16") == 1 + 2**-7
    assert compute_growth("int4") == pytest.approx(((16 + 63) / 3.5**2) ** 0.5)
    assert compute_growth("int8") == pytest.approx(((65**2 + 63 * 8**2) / (64**2 + 63 * 7**2)) ** 0.5)

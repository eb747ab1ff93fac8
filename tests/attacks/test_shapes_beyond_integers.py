"""An update that claims a shape whose numbers no tensor has: one clear error, as of any other malformed one."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.protocol.messages import decode_update, encode_update
from cotune.strategies.types import Update


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", [(2**70, 0), (2**63, 0), (0, 2**41), (-1, -1), (0, *[2**31 - 1] * 7)])
def test_a_shape_that_no_tensor_has_is_malformed(codec: Codec, shape: tuple[int, ...]) -> None:
    content = encode_update(Update("a", 1, {"w": torch.zeros(64)}, 5, 1, received="x"), "plan", codec=codec)
    content["delta"] = ArrayRecord({"w": Array(codec, shape, "numpy.ndarray", b"")})
    with pytest.raises(RunError) as caught:
        decode_update(content, "plan", codec=codec)
    assert caught.value.code in ("run.malformed_message", "run.malformed_update")

"""Attack: a member whose update is not written as the plan's codec says, or stands for values that nobody agreed on.

Each is refused by the coordinator, kept in quarantine and counts as a strike; the others' round goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from cotune.plan.wire import Codec
from cotune.protocol import arrays as arrays_of_messages
from cotune.protocol.arrays import SALTED
from cotune.protocol.codecs import packed_bytes
from cotune.protocol.messages import Request, encode_update, get_salt
from cotune.server.app import train_rounds
from cotune.server.runs.exclusions import count_strikes
from tests.support.organizations import Answer, adding, federation, model_of, update
from tests.support.rounds import assert_moved, initial
from tests.support.run_folders import NewRun

Change = Callable[[Array, bytes], Array]  # an array, and its bytes without the mask -> what is sent in its place


def changing(plan_id: str, codec: Codec, change: Change) -> Answer:
    """An organization that changes the first array of an honest update."""

    def answer(request: Request) -> RecordDict:
        honest = update(request, {name: torch.ones_like(tensor) for name, tensor in request.state.items()})
        content = encode_update(honest, plan_id, codec=codec)
        arrays = dict(content["delta"])
        name = sorted(arrays)[0]
        key = arrays_of_messages.derive_key(get_salt(content), "delta", name)
        changed = change(arrays[name], arrays_of_messages._mask(arrays[name].data, key))
        arrays[name] = Array(changed.dtype, tuple(changed.shape), SALTED, arrays_of_messages._mask(changed.data, key))
        content["delta"] = ArrayRecord(arrays)
        return content

    return answer


def with_data(array: Array, data: bytes) -> Array:
    return Array(array.dtype, tuple(array.shape), array.stype, data)


def a_scale_beyond_float32(array: Array, data: bytes) -> Array:
    return with_data(array, bytes([0x7F]) + b"\x77" * (len(data) - 1))


def the_largest_scale(array: Array, data: bytes) -> Array:
    """Finite, and far above the norm that any update of the plan can have."""
    return with_data(array, bytes([100]) + data[1:])


def a_block_more(array: Array, data: bytes) -> Array:
    return with_data(array, data + data)


def a_byte_less(array: Array, data: bytes) -> Array:
    return with_data(array, data[:-1])


def nothing(array: Array, data: bytes) -> Array:
    return with_data(array, b"")


def another_shape(array: Array, data: bytes) -> Array:
    return Array(array.dtype, (*array.shape, 1), array.stype, data)


def a_gigantic_shape(array: Array, data: bytes) -> Array:
    """A few bytes that claim to stand for 2^62 values: no memory is taken for them."""
    return Array(array.dtype, (2**31, 2**31), array.stype, data)


def a_negative_shape(array: Array, data: bytes) -> Array:
    return Array(array.dtype, (-1, -1), array.stype, data)


def the_name_of_another_codec(array: Array, data: bytes) -> Array:
    return Array("int8", tuple(array.shape), array.stype, data)


def float32_in_place_of_it(array: Array, data: bytes) -> Array:
    return Array(torch.ones(tuple(array.shape)).numpy())


@pytest.mark.parametrize(
    "change",
    [
        a_scale_beyond_float32,
        the_largest_scale,
        a_block_more,
        a_byte_less,
        nothing,
        another_shape,
        a_gigantic_shape,
        a_negative_shape,
        the_name_of_another_codec,
        float32_in_place_of_it,
    ],
)
def test_it_is_refused_and_struck(new_run: NewRun, change: Change) -> None:
    folder = new_run("org-1", "org-2", rounds=1, wire="int4", server={"max_update_norm": 1e6})
    start = initial(folder)
    answers = {"org-1": adding(1.0), "org-2": changing(folder.plan.plan_id, "int4", change)}
    progress = train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None)
    [entry] = progress.history
    assert entry["participants"] == ["org-1"]
    assert entry["quarantined"] == ["org-2"]
    assert count_strikes(folder, progress.history) == {"org-2": 1}
    [reason] = [each["reason"] for each in entry["dropped"]]
    assert "expected" in reason
    assert "cannot be read" not in reason, "it was refused by chance, not by a check"
    assert_moved(progress.state, start, by=1.0)


@pytest.mark.parametrize("agreed", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("sent", ["float32", "bfloat16", "int8", "int4"])
def test_only_the_codec_of_the_plan_is_taken(new_run: NewRun, sent: Codec, agreed: Codec) -> None:
    folder = new_run("org-1", "org-2", rounds=1, wire=agreed)

    def honest(request: Request) -> Any:
        delta = {name: torch.ones_like(tensor) for name, tensor in request.state.items()}
        return encode_update(update(request, delta), folder.plan.plan_id, codec=sent)

    answers = {"org-1": adding(1.0), "org-2": honest}
    [entry] = train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None).history
    assert entry["quarantined"] == ([] if sent == agreed else ["org-2"])


def test_a_reply_as_large_as_float32_is_refused_by_its_size(new_run: NewRun) -> None:
    """Whatever it holds: the limit follows from the codec."""
    folder = new_run("org-1", "org-2", rounds=1, wire="int4")
    largest = 2**20 + packed_bytes("float32", 10**6)

    def padded(array: Array, data: bytes) -> Array:
        return with_data(array, bytes(largest))

    answers = {"org-1": adding(1.0), "org-2": changing(folder.plan.plan_id, "int4", padded)}
    [entry] = train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None).history
    [reason] = [each["reason"] for each in entry["dropped"]]
    assert "bytes, expected at most" in reason

"""Requests that hold changes of the state in place of the whole: what comes back, what is refused, and that bits are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast, get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from cotune.errors import RunError
from cotune.plan.wire import Codec
from cotune.protocol.changes import MAX_CHANGES, RoundChange, add_change, count_cost, join_versions, split_versions
from cotune.protocol.codecs import round_to, rounding_generator
from cotune.protocol.messages import (
    Recipient,
    RequestEncoder,
    decode_header,
    decode_request,
    payload_bytes,
    state_digest,
)
from tests.support.failures import fails_with

NARROW = tuple(codec for codec in get_args(Codec) if codec != "float32")
DIGEST = 64 * "a"
VERSIONS = st.text("0af \ng", max_size=70) | st.lists(st.sampled_from([DIGEST, 64 * "0", "a"]), max_size=20).map(" ".join)
VALUES = arrays(np.float32, st.integers(1, 70), elements=st.floats(-1e4, 1e4, width=32))


def attempt(act: Callable[[], object]) -> object:
    """What it returns, or the code of its error."""
    try:
        return act()
    except RunError as error:
        return error.code


def rounded(codec: Codec, values: Tensor, round: int) -> Tensor:
    return round_to(codec, values, rounding_generator(7, "the server", round, "w"))


def history(codec: Codec, start: Tensor, moves: Sequence[Tensor]) -> tuple[list[RoundChange], dict[str, Tensor]]:
    """The changes of rounds 1, 2, …, and the state after the last."""
    state = {"w": start, "still": torch.ones(2)}
    changes = []
    for number, move in enumerate(moves, 1):
        change = {"w": rounded(codec, move, number)}
        changes.append(RoundChange(number, state_digest(state), frozenset(state), change))
        state = add_change(state, change)
    return changes, state


@given(codec=st.sampled_from(NARROW), start=VALUES, seed=st.integers(0, 99), count=st.integers(1, 4), data=st.data())
def test_any_earlier_version_gives_the_same_bits(
    codec: Codec, start: np.ndarray, seed: int, count: int, data: st.DataObject
) -> None:
    drawn = np.random.default_rng(seed)
    moves = [torch.from_numpy(drawn.normal(size=len(start)).astype(np.float32)) for _ in range(count)]
    changes, state = history(codec, torch.from_numpy(start), moves)
    held = data.draw(st.integers(1, count))
    content = RequestEncoder("{}", count + 1, state, changes=changes, codec=codec).encode_since(Recipient("a"), held)
    request = decode_request(content, codec)
    assert request.versions == (*(change.start for change in changes[held - 1 :]), state_digest(state))
    built = {"w": torch.from_numpy(start), "still": torch.ones(2)}
    for change in changes[: held - 1]:
        built = add_change(built, change.values)
    for change in request.changes:
        built = add_change(built, change)
    assert state_digest(built) == request.versions[-1]


def test_added_parameters_come_whole_and_their_changes_do_not_count() -> None:
    before = {"w": torch.zeros(3)}
    grown = {"w": torch.zeros(3), "b": torch.ones(2)}
    first = RoundChange(1, state_digest(before), frozenset(before), {})
    second = RoundChange(2, state_digest(grown), frozenset(grown), {"b": torch.full((2,), 2.0)})
    state = add_change(grown, second.values)
    encoder = RequestEncoder("{}", 3, state, changes=[first, second], codec="int8")
    request = decode_request(encoder.encode_since(Recipient("a"), 1), "int8")
    assert request.state.keys() == {"b"}
    assert request.changes[0] == {}
    built = {**add_change(before, request.changes[1], whole=request.state), **request.state}
    assert state_digest(built) == request.versions[-1]
    with pytest.raises(ValueError, match="no b of shape"):
        add_change(before, request.changes[1])
    assert decode_request(encoder.encode_since(Recipient("a"), 2), "int8").state == {}


def test_a_change_of_zeros_leaves_every_bit() -> None:
    """As of a round that was not applied: −0 + 0 is another number in its bits, and so has another digest."""
    state = {"w": torch.tensor([-0.0, 0.0, 1.0])}
    assert state_digest(add_change(state, {"w": torch.zeros(3)})) == state_digest(state)


def test_a_changed_shape_is_not_broadcast() -> None:
    with pytest.raises(ValueError, match="no w of shape"):
        add_change({"w": torch.zeros(3)}, {"w": torch.ones(1)})


@pytest.mark.parametrize("codec", NARROW)
def test_requests_of_a_round_share_their_changes(codec: Codec) -> None:
    changes, state = history(codec, torch.zeros(200), [torch.ones(200), torch.ones(200)])
    encoder = RequestEncoder("{}", 3, state, changes=changes, codec=codec)
    one = encoder.encode_since(Recipient("a"), 1)
    two = encoder.encode_since(Recipient("b"), 2)
    whole = encoder.encode(Recipient("c"))
    assert one["change-2"] is two["change-2"]
    assert sorted(two) == ["change-2", "request"]
    assert payload_bytes(two) < payload_bytes(one)
    assert decode_request(whole, codec).versions == ()
    assert torch.equal(decode_request(whole, codec).state["w"], state["w"])


@pytest.mark.parametrize("codec", NARROW)
def test_a_request_that_stays_is_read_as_a_written_one(codec: Codec) -> None:
    changes, state = history(codec, torch.zeros(70), [torch.ones(70)])
    stays, written = (
        RequestEncoder("{}", 2, state, {"w": state["w"]}, stays=stays, changes=changes, codec=codec).encode_since(
            Recipient("a"), 1
        )
        for stays in (True, False)
    )
    assert payload_bytes(stays) == payload_bytes(written)
    read, expected = decode_request(stays, codec), decode_request(written, codec)
    assert torch.equal(read.changes[0]["w"], expected.changes[0]["w"])
    assert replace(read, changes=(), sent={}, stays=False) == replace(expected, changes=(), sent={})


def delta_request(codec: Codec = "int4", count: int = 70) -> RecordDict:
    changes, state = history(codec, torch.zeros(count), [torch.ones(count)])
    return RequestEncoder("{}", 2, state, changes=changes, codec=codec).encode_since(Recipient("a"), 1)


@given(codec=st.sampled_from(NARROW), data=st.binary(max_size=300), shape=st.lists(st.integers(-2, 2**40), max_size=9))
def test_any_bytes_are_a_change_or_one_error(codec: Codec, data: bytes, shape: list[int]) -> None:
    content = delta_request(codec)
    for made in (Array(codec, tuple(shape), "numpy.ndarray", data), Array(codec, (len(data),), "numpy.ndarray", data)):
        content["change-1"] = ArrayRecord({"w": made})
        found = attempt(lambda content=content: decode_request(content, codec).changes[0]["w"])
        assert found in ("run.malformed_message", "run.malformed_update") or torch.isfinite(cast(Tensor, found)).all()


@given(VERSIONS, st.integers(-3, 40))
def test_any_versions_are_digests_or_one_error(text: str, round: int) -> None:
    found = attempt(lambda: split_versions(text, round))
    assert found == "run.malformed_message" or join_versions(cast("tuple[str, ...]", found)) == text


def test_there_are_no_more_changes_than_earlier_rounds_nor_than_the_limit() -> None:
    assert len(split_versions(join_versions([DIGEST] * 3), 3)) == 3
    assert len(split_versions(join_versions([DIGEST] * (MAX_CHANGES + 1)), 99)) == MAX_CHANGES + 1
    for count, round in ((4, 3), (MAX_CHANGES + 2, 99), (1, 0)):
        with fails_with("run.malformed_message"):
            split_versions(join_versions([DIGEST] * count), round)


def with_versions(content: RecordDict, versions: object) -> RecordDict:
    header = dict(content["request"])  # type: ignore[arg-type]
    return RecordDict({**content, "request": ConfigRecord({**header, "versions": cast(str, versions)})})


def test_a_plan_without_changes_refuses_them() -> None:
    with fails_with("run.malformed_message"):
        decode_request(delta_request("int4"))


def test_a_change_in_another_codec_is_refused() -> None:
    with fails_with("run.other_codec"):
        decode_request(delta_request("int8"), "int4")


def test_records_that_no_version_names_are_refused() -> None:
    for versions in ("", DIGEST):
        with fails_with("run.malformed_message"):
            decode_request(with_versions(delta_request(), versions), "int4")
    for versions in (3, ["a"], DIGEST.upper(), f"{DIGEST}  {DIGEST}", f"{DIGEST}\n"):
        with fails_with("run.malformed_message"):
            decode_header(with_versions(delta_request(), versions))


def test_a_whole_request_needs_its_state() -> None:
    content = delta_request()
    del content["change-1"]
    with fails_with("run.malformed_message"):
        decode_request(with_versions(content, ""), "int4")


def test_costs_by_hand() -> None:
    """A name of one letter, 1 KiB for what an array has beside its values, and 4 bytes or half a byte for a value."""
    assert count_cost({"w": torch.zeros(640)}, "int4") == 1 + 1024 + 640 // 2 + 10
    assert 1 + 1024 + 4 * 640 <= count_cost({"w": torch.zeros(640)}, "float32") <= 1 + 1024 + 4 * 640 + 128

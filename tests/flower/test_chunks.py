"""A message in pieces: whole or not at all, whatever is late, missing or too much."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.task_identity import TaskIdentity

from cotune.flower.chunks import Aborted, Malformed, Pending, PullLimits, TooLarge, download

MOST = 2**20
SILENCE = 5.0


@pytest.fixture
def message() -> Message:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    arrays = ArrayRecord({f"layer {i}": Array(np.full(100, i, np.float32)) for i in range(20)})
    return Message(RecordDict({"state": arrays}), 5, MessageType.TRAIN, ttl=60.0)


def parts(message: Message) -> dict[str, bytes]:
    return {number: part.deflate() for number, part in get_all_nested_objects(message).items()}


def late(there: dict[str, bytes], times: int, error: Callable[[str], Exception] = Pending) -> Callable[[str], bytes]:
    """Each piece comes when it was asked for so many times before."""
    asked = Counter[str]()
    lock = threading.Lock()

    def pull(number: str) -> bytes:
        with lock:
            asked[number] += 1
        if asked[number] <= times:
            raise error(number)
        return there[number]

    return pull


@pytest.mark.parametrize("times", [0, 1, 3])
def test_message_is_whole_however_often_chunks_are_requested(message: Message, times: int) -> None:
    found = download(get_object_tree(message), late(parts(message), times), MOST, SILENCE)
    assert found.content == message.content
    assert found.metadata.message_id == get_object_tree(message).object_id


def test_missing_rest_of_a_message_times_out(message: Message) -> None:
    there = parts(message)
    lacking = list(there)[-1]

    def pull(number: str) -> bytes:
        if number == lacking:
            raise Pending(number)
        return there[number]

    with pytest.raises(Aborted, match=r"no part of it has come for 0\.2 seconds"):
        download(get_object_tree(message), pull, MOST, 0.2)


def test_a_message_that_comes_slowly_is_waited_for(message: Message) -> None:
    """Longer in all than the silence that ends it."""
    often = PullLimits(max_retry_backoff=0.02)
    there = parts(message)
    began = time.monotonic()
    lock = threading.Lock()
    due = {number: 0.05 * i for i, number in enumerate(there)}

    def pull(number: str) -> bytes:
        with lock:
            if time.monotonic() - began < due[number]:
                raise Pending(number)
        return there[number]

    assert download(get_object_tree(message), pull, MOST, 1.0, often).content == message.content
    assert time.monotonic() - began > 1.0


def test_a_piece_that_is_under_way_on_a_slow_line_is_waited_for(message: Message) -> None:
    """However long: another one, which is late, shows only that nothing else has come meanwhile."""
    soon = PullLimits(slow_call=0.05)
    there = parts(message)
    came = threading.Event()
    first, second, *_ = there

    def pull(number: str) -> bytes:
        if number == first:
            time.sleep(0.6)
            came.set()
        if number == second and not came.is_set():
            raise Pending(number)
        return there[number]

    assert download(get_object_tree(message), pull, MOST, 0.2, soon).content == message.content


def test_pieces_that_make_no_message(message: Message) -> None:
    there = parts(message)
    tree = get_object_tree(message)
    (content,) = tree.children
    with pytest.raises(Malformed, match="a part of it is of the kind RecordDict, expected Message"):
        download(content, there.__getitem__, MOST, SILENCE)
    there[content.object_id] = b"RecordDict of nothing that was announced"
    with pytest.raises(Malformed, match="cannot be put together from its parts"):
        download(tree, there.__getitem__, MOST, SILENCE)


def test_a_piece_that_is_gone_ends_it(message: Message) -> None:
    pull = late(parts(message), 1, lambda number: ObjectPullError(number, "the object could not be found."))
    with pytest.raises(Aborted, match="a part of it is gone"):
        download(get_object_tree(message), pull, MOST, SILENCE)


def test_a_message_of_endless_parts_is_not_begun() -> None:
    tree = ObjectTree(object_id="root", children=[ObjectTree(object_id=str(i)) for i in range(100_001)])
    asked = list[str]()
    with pytest.raises(TooLarge, match="more than 100,000 parts"):
        download(tree, lambda number: bytes(len(asked)), MOST, SILENCE)
    assert asked == []


def test_a_message_of_endless_bytes_is_left_at_the_limit() -> None:
    tree = ObjectTree(object_id="root", children=[ObjectTree(object_id=str(i)) for i in range(1000)])
    asked = list[str]()

    def pull(number: str) -> bytes:
        asked.append(number)
        return bytes(60)

    with pytest.raises(TooLarge, match="more than 600 bytes"):
        download(tree, pull, 600, SILENCE)
    assert len(asked) < 100  # several are under way at a time

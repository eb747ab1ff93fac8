"""Which announcements of replies pass: honest ones of every size, and nothing else, whatever the bytes."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from hypothesis import given
from hypothesis import strategies as st

from cotune.protocol.messages import Recipient, encode_requests, encode_update
from cotune.server.proxy.protobuf_fields import MalformedMessage, iterate_fields
from cotune.server.proxy.pushed_messages import SentObjects, find_push_problem
from cotune.server.proxy_process import FLEET_FORMAT
from cotune.strategies import Update
from tests.support.calls import NODE, announcement, identifier, tree

LIMIT = 4096


def reason(request: PushMessagesRequest, sent: SentObjects | None = None, limit: int = LIMIT) -> str | None:
    return find_push_problem(request.SerializeToString(), limit, sent or SentObjects(FLEET_FORMAT))


def pulled(*trees: ObjectTree) -> SentObjects:
    sent = SentObjects(FLEET_FORMAT)
    sent.record_pull_response(PullMessagesResponse(message_object_trees=trees).SerializeToString())
    return sent


def forest(content: RecordDict) -> ObjectTree:
    """The tree of a message with this content."""
    return ObjectTree(object_id=identifier(1), children=[get_object_tree(content)])


@pytest.mark.parametrize("parameters", [1, 2, 200])
def test_honest_reply_of_many_parameters_passes(parameters: int) -> None:
    """With all that an update can hold, and zeros everywhere, which Flower itself would take for one object."""
    values = {f"layer.{i}": torch.zeros(4) for i in range(parameters)}
    [request] = encode_requests("{}", 1, values, [Recipient("a")])
    update = Update(
        "a", 1, values, 1, 1, 1.0, {"loss": 1.0}, dict.fromkeys(values, 1.0), {f"fisher/{n}": v for n, v in values.items()}
    )
    asked = forest(request)
    asked.object_id = identifier(2)
    assert reason(announcement(forest(encode_update(update, "plan"))), pulled(asked)) is None
    assert reason(announcement(forest(encode_update(update, "plan")))) is None


def test_an_error_passes() -> None:
    objects = ObjectTree(object_id=identifier(1))
    assert reason(announcement(objects)) is None


@pytest.mark.parametrize(
    "about",
    [
        {"reply_to_message_id": ""},
        {"reply_to_message_id": "", "src_node_id": 1, "dst_node_id": 17},
        {"src_node_id": 1},
        {"src_node_id": NODE + 1},
        {"dst_node_id": 17},
        {"dst_node_id": NODE},
        {"message_id": identifier(77)},
    ],
)
def test_what_is_no_reply_of_its_sender_to_the_server_is_refused(about: dict[str, Any]) -> None:
    assert reason(announcement(**about)) is not None


def test_node_1_is_nobodys() -> None:
    assert reason(announcement(node=1)) is not None


def twice() -> ObjectTree:
    objects = tree(2)
    objects.children[0].children[0].children[1].children[0].object_id = (
        objects.children[0].children[0].children[0].children[0].object_id
    )
    return objects


def deep() -> ObjectTree:
    objects = tree(1)
    objects.children[0].children[0].children[0].children[0].children.add(object_id=identifier(99))
    return objects


def chain() -> ObjectTree:
    """Beyond what protobuf itself reads."""
    objects = ObjectTree(object_id=identifier(0))
    for i in range(1, 90):
        objects = ObjectTree(object_id=identifier(i), children=[objects])
    return objects


@pytest.mark.parametrize(
    "objects",
    [twice(), deep(), chain(), ObjectTree(), ObjectTree(object_id="../../etc"), ObjectTree(object_id="F" * 64), tree(LIMIT)],
    ids=["twice", "deep", "chain", "none", "path", "capitals", "wide"],
)
def test_a_tree_that_no_honest_reply_has_is_refused(objects: ObjectTree) -> None:
    assert reason(announcement(objects)) is not None


def test_a_reply_is_not_much_larger_than_the_request() -> None:
    small = pulled(tree(3, first=10_000))
    assert reason(announcement(tree(40)), small) is not None
    assert reason(announcement(tree(40))) is None
    assert reason(announcement(tree(40)), pulled(tree(30, first=10_000))) is None


def test_an_object_of_any_request_is_refused_with_any_children() -> None:
    sent = pulled(tree(3, first=10_000), tree(3, first=20_000))
    for known in (10_001, 10_010, 20_011):
        objects = tree(2)
        objects.children[0].children[0].children.add(object_id=identifier(known))
        assert reason(announcement(objects), sent) is not None


def test_several_messages_or_none_are_refused() -> None:
    one = announcement()
    for changed in ("messages_list", "message_object_trees"):
        more = announcement()
        none = announcement()
        getattr(more, changed).extend(getattr(one, changed))
        del getattr(none, changed)[:]
        assert reason(more) is not None
        assert reason(none) is not None


def test_a_message_with_content_beside_the_tree_is_refused() -> None:
    request = announcement()
    request.messages_list[0].content.SetInParent()
    assert reason(request) is None  # an empty one is what Flower sends
    for _ in range(10_000):
        request.messages_list[0].content.items.add(key="k")
    assert reason(request) is not None


@pytest.mark.parametrize("tag", [b"\x1a\x00", b"\x12\x00", b"\x22\x00", b"\x2a\x00", b"\x08\x01", b"\x0b"])
def test_megabyte_of_nothing_is_refused_before_parsing(tag: bytes) -> None:
    """Half a million empty messages: a hundred times their size, once they are built."""
    content = tag * (2**20 // len(tag))
    tracemalloc.start()
    try:
        assert find_push_problem(content, LIMIT, SentObjects(FLEET_FORMAT)) is not None
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content)
    finally:
        tracemalloc.stop()


def test_megabyte_of_empty_objects_is_refused_before_parsing() -> None:
    objects = b"\x12\x00" * 2**18
    head = announcement(ObjectTree(object_id=identifier(1)))
    del head.message_object_trees[:]
    content = head.SerializeToString() + b"\x1a" + _varint(len(objects)) + objects
    assert find_push_problem(content, LIMIT, SentObjects(FLEET_FORMAT)) is not None


def _varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


# --- any bytes


@given(st.binary(max_size=400))
def test_any_bytes_pass_or_are_refused(content: bytes) -> None:
    found = find_push_problem(content, LIMIT, SentObjects(FLEET_FORMAT))
    assert found is None or found


@given(st.data())
def test_altered_announcement_passes_only_as_a_reply(data: st.DataObject) -> None:
    content = bytearray(announcement().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    if find_push_problem(bytes(content[:cut]), LIMIT, SentObjects(FLEET_FORMAT)) is None:
        [message] = PushMessagesRequest.FromString(bytes(content[:cut])).messages_list
        assert message.metadata.reply_to_message_id
        assert message.metadata.dst_node_id == 1


@given(st.binary(max_size=200))
def test_remembering_any_bytes_does_no_harm(content: bytes) -> None:
    sent = SentObjects(FLEET_FORMAT)
    sent.record_pull_response(content)
    assert reason(announcement(), sent) is None


@given(st.lists(st.tuples(st.sampled_from(["node", "message", "tree", "runtime"]), st.integers(0, 50)), max_size=6))
def test_fields_are_those_that_protobuf_writes(parts: list[tuple[str, int]]) -> None:
    request = PushMessagesRequest()
    for kind, number in parts:
        if kind == "node":
            request.node.CopyFrom(Node(node_id=number))
        elif kind == "tree":
            request.message_object_trees.append(tree(number % 5))
        elif kind == "message":
            request.messages_list.add()
        else:
            request.clientapp_runtime_list.append(float(number))
    found = list(iterate_fields(request.SerializeToString(), 10))
    assert sum(number == 3 for number, _ in found) == len(request.message_object_trees)
    assert sum(number == 2 for number, _ in found) == len(request.messages_list)
    trees = [value for number, value in found if number == 3]
    assert trees == [each.SerializeToString() for each in request.message_object_trees]


@given(st.binary(max_size=200), st.integers(1, 20))
def test_fields_of_any_bytes_are_few_or_damaged(content: bytes, most: int) -> None:
    with suppress(MalformedMessage):
        assert len(list(iterate_fields(content, most))) <= most

"""Calls to a SuperLink that is made up: what they raise, and what they never take. The real one is tests/deployment's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from cotune.flower.chunks import TooLarge
from cotune.flower.runtime_client import RuntimeClient, open_runtime_client

Answer = Callable[[str, bytes], httpx.Response]


def line(answer: Answer) -> RuntimeClient:
    """To a SuperLink that answers a call so. answer: by the last word of its path, and its content."""
    grid = HttpGrid("127.0.0.1:9", insecure=True, token="a token")
    grid.set_run(Run.create_empty(7))
    made = open_runtime_client(grid)
    calls = made._client  # type: ignore[attr-defined]
    calls._client = httpx.Client(
        transport=httpx.MockTransport(lambda request: answer(request.url.path.rsplit("/", 1)[1], request.content))
    )
    return made


def message() -> Message:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 7
    TaskIdentity.node_id = 1
    arrays = ArrayRecord({"weight": Array(np.arange(50, dtype=np.float32))})
    return Message(RecordDict({"state": arrays}), 5, MessageType.TRAIN, ttl=60.0)


class SuperLink:
    """Takes requests, and has one reply. troubles: what the next calls of a name get in place of an answer."""

    def __init__(self, reply: Message | None = None, **troubles: list[httpx.Response | Exception]) -> None:
        self.called = list[str]()
        self.taken = dict[str, bytes]()
        self._reply = reply
        self._troubles = troubles

    def __call__(self, call: str, content: bytes) -> httpx.Response:
        self.called.append(call)
        if trouble := self._troubles.get(call.replace("-", "_")):
            found = trouble.pop(0)
            if isinstance(found, Exception):
                raise found
            return found
        made: Any = getattr(self, call.replace("-", "_"))(content)
        return httpx.Response(200, content=made.SerializeToString())

    def push_messages(self, content: bytes) -> PushAppMessagesResponse:
        request = PushAppMessagesRequest.FromString(content)
        (tree,) = request.message_object_trees
        others = {part.object_id for part in iterate_object_tree(tree)} - {tree.object_id}
        return PushAppMessagesResponse(message_ids=[tree.object_id], objects_to_push=others, session_id="s")

    def push_object(self, content: bytes) -> PushObjectResponse:
        request = PushObjectRequest.FromString(content)
        self.taken[request.object_id] = request.object_content
        return PushObjectResponse(stored=True)

    def pull_messages(self, content: bytes) -> PullAppMessagesResponse:
        wanted = PullAppMessagesRequest.FromString(content).message_ids
        assert self._reply is not None
        answers = PullAppMessagesResponse(
            messages_list=[message_to_proto(self._reply)], message_object_trees=[get_object_tree(self._reply)]
        )
        return answers if self._reply.metadata.reply_to_message_id in wanted else PullAppMessagesResponse()

    def pull_object(self, content: bytes) -> PullObjectResponse:
        assert self._reply is not None
        part = get_all_nested_objects(self._reply)[PullObjectRequest.FromString(content).object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=part.deflate())

    def confirm_message_received(self, content: bytes) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()

    def get_nodes(self, content: bytes) -> Any:
        return GetNodesRequest()


def replied() -> tuple[str, Message]:
    request = message()
    request.metadata.__dict__["_message_id"] = number = request.object_id
    reply = Message(RecordDict({"delta": ArrayRecord({"weight": Array(np.ones(50, np.float32))})}), reply_to=request)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    return number, reply


def test_of_a_request_what_is_not_there_yet_is_sent() -> None:
    superlink = SuperLink()
    request = message()
    number = line(superlink).push(request)
    parts = get_all_nested_objects(request)
    assert number == request.object_id
    assert superlink.taken == {part: parts[part].deflate() for part in parts if part != number}


def test_an_answer_is_fetched_and_confirmed() -> None:
    number, reply = replied()
    superlink = SuperLink(reply)
    made = line(superlink)
    assert made.list_replies(["another"]) == {}
    came = list[None]()
    found = made.fetch(made.list_replies([number, "another"])[number], 10_000, lambda: came.append(None))
    assert found is not None
    assert found.content == reply.content
    assert len(came) == len(get_all_nested_objects(reply))
    assert superlink.called[-1] == "confirm-message-received"


@pytest.mark.parametrize("trouble", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(500)])
def test_chunk_is_retried_while_the_superlink_is_unavailable(trouble: Any) -> None:
    number, reply = replied()
    made = line(SuperLink(reply, pull_object=[trouble]))
    found = made.fetch(made.list_replies([number])[number], 10_000, lambda: None)
    assert found is not None
    assert found.content == reply.content


def test_an_answer_counts_though_its_receipt_does_not_get_there() -> None:
    number, reply = replied()
    made = line(SuperLink(reply, confirm_message_received=[httpx.ConnectError("refused")]))
    assert made.fetch(made.list_replies([number])[number], 10_000, lambda: None) is not None


def test_an_answer_that_is_larger_than_agreed_is_not_taken() -> None:
    number, reply = replied()
    superlink = SuperLink(reply)
    made = line(superlink)
    with pytest.raises(TooLarge, match="more than 100 bytes"):
        made.fetch(made.list_replies([number])[number], 100, lambda: None)
    assert "confirm-message-received" not in superlink.called


@pytest.mark.parametrize("call", ["push_messages", "push_object", "pull_messages", "get_nodes"])
@pytest.mark.parametrize("trouble", [httpx.ConnectError("refused"), httpx.Response(500)])
def test_a_call_that_fails_is_not_repeated_in_silence(call: str, trouble: Any) -> None:
    number, reply = replied()
    made = line(SuperLink(reply, **{call: [trouble]}))
    calls: dict[str, Callable[[], Any]] = {"pull_messages": lambda: made.list_replies([number]), "get_nodes": made.get_nodes}
    with pytest.raises(httpx.HTTPError):
        calls.get(call, lambda: made.push(message()))()


@pytest.mark.parametrize("call", ["push_messages", "push_object", "pull_messages", "get_nodes"])
def test_a_run_that_was_stopped(call: str) -> None:
    number, reply = replied()
    made = line(SuperLink(reply, **{call: [httpx.Response(403)]}))
    calls: dict[str, Callable[[], Any]] = {"pull_messages": lambda: made.list_replies([number]), "get_nodes": made.get_nodes}
    with pytest.raises(RunNotRunningException):
        calls.get(call, lambda: made.push(message()))()


def test_restarted_superlink_ends_the_process_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = list[tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
    made = line(SuperLink(get_nodes=[httpx.Response(401), httpx.Response(401)]))
    for _ in range(2):  # as several threads find it; a second signal would cut the ending short
        with pytest.raises(httpx.HTTPStatusError):
            made.get_nodes()
    assert sent == [(os.getpid(), signal.SIGINT)]

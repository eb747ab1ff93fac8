"""Calls to a server that is made up: what they say when it refuses, and what they never take."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.proto.fleet_pb2 import DeactivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from cotune.flower import fleet_client as fleet_module
from cotune.flower import http_limits
from cotune.flower.chunks import TooLarge
from cotune.flower.fleet_client import AnnouncedRequest, FleetClient
from cotune.flower.fleet_errors import FleetError, NodeRejected, RequestExpired
from cotune.flower.http_limits import harden_http_client

NODE = 5


class FakeClient:
    """Flower's client of the Fleet API; refuses with `response` if there is one."""

    def __init__(self, response: httpx.Response | None = None) -> None:
        self.called = list[str]()
        self._response = response

    def DeactivateNode(self, _: Any) -> DeactivateNodeResponse:
        self.called.append("leave")
        return DeactivateNodeResponse()

    def SendNodeHeartbeat(self, _: Any) -> SendNodeHeartbeatResponse:
        self.called.append("beat")
        return SendNodeHeartbeatResponse(success=True)

    def PullObject(self, _: Any) -> PullObjectResponse:
        self.called.append("pull")
        return PullObjectResponse(object_found=True, object_available=True, object_content=bytes(60))

    def PullMessages(self, _: Any) -> Any:
        assert self._response is not None
        raise httpx.HTTPStatusError("refused", request=httpx.Request("POST", "https://fed:9092"), response=self._response)


def fleet(client: FakeClient) -> FleetClient:
    return FleetClient(client, NODE)  # type: ignore[arg-type]


def test_no_heartbeat_comes_after_the_node_has_left() -> None:
    """It would be online for another minute, and the next one with its key would be refused."""
    client = FakeClient()
    left = fleet(client)
    assert left.heartbeat()
    left.leave()
    assert left.heartbeat()
    assert client.called == ["beat", "leave"]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, NodeRejected, "expected one that the coordinator has registered"),
        (412, NodeRejected, "its key is not registered .*, or a node with the same key is online already"),
        (403, RequestExpired, "the run is over, or not for this node"),
        (404, FleetError, "expected the public port of a federation"),
        (500, FleetError, "status 500"),
    ],
)
def test_what_a_status_means(status: int, kind: type[FleetError], words: str) -> None:
    with pytest.raises(kind, match=words):
        fleet(FakeClient(httpx.Response(status))).receive()


@pytest.mark.parametrize(("seconds", "said"), [(3600, "60 minutes behind"), (-600, "10 minutes ahead of"), (20, "")])
def test_clocks_that_are_apart_are_named(seconds: int, said: str) -> None:
    answer = httpx.Response(401, headers={"date": formatdate(time.time() + seconds, usegmt=True)})
    with pytest.raises(NodeRejected) as raised:
        fleet(FakeClient(answer)).receive()
    assert ("; this machine's is" in str(raised.value)) == bool(said)
    assert said in str(raised.value)


def request(*, age: float = 0.0, tree: ObjectTree | None = None) -> AnnouncedRequest:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    header = Message(RecordDict(), NODE, MessageType.TRAIN, ttl=60.0)
    header.metadata.created_at = time.time() - age
    return AnnouncedRequest(header, tree or ObjectTree(object_id="root"))


@pytest.mark.parametrize(("age", "seconds"), [(0.0, 60.0), (50.0, 10.0), (7200.0, 60.0), (-7200.0, 60.0)])
def test_what_is_announced_has_time_left_whatever_the_clock_says(age: float, seconds: float) -> None:
    assert request(age=age).seconds == pytest.approx(seconds, abs=1.0)


def test_a_message_of_endless_bytes_is_left_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()
    monkeypatch.setattr(fleet_module, "_MAX_REQUEST_BYTES", 600)
    tree = ObjectTree(object_id="root", children=[ObjectTree(object_id=str(i)) for i in range(1000)])
    with pytest.raises(TooLarge, match="more than 600 bytes"):
        fleet(client).open(request(tree=tree))
    assert len(client.called) < 100  # several are under way at a time


# --- a server that does with the node's calls what it likes


class Endless(httpx.SyncByteStream):
    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.given += 1
            yield bytes(2**20)


def served(answer: httpx.Response) -> tuple[FleetClient, list[httpx.URL]]:
    """A node at a server that answers every call so, and the places that were asked."""
    asked = list[httpx.URL]()

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return answer if request.url.host == "fed" else httpx.Response(200)

    client = FleetHttpClient("https://fed:9092")
    client._client = httpx.Client(transport=httpx.MockTransport(handle), follow_redirects=True)
    harden_http_client(client._client)
    return FleetClient(client, NODE), asked


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_server_cannot_send_a_node_to_another_place(status: int) -> None:
    """It would reach what only the organization's own network does."""
    node, asked = served(httpx.Response(status, headers={"location": "http://intranet/delete-everything"}))
    with pytest.raises(FleetError, match=f"the server answered with status {status}"):
        node.receive()
    assert [url.host for url in asked] == ["fed"]


def test_an_endless_answer_is_left_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "_MAX_RESPONSE_BYTES", 3 * 2**20)
    content = Endless()
    node, _ = served(httpx.Response(200, stream=content))
    with pytest.raises(FleetError, match="its answer has more than 3,145,728 bytes"):
        node.receive()
    assert content.given == 4


def test_a_compressed_answer_is_not_unpacked() -> None:
    packed = gzip.compress(bytes(2**20))
    node, _ = served(httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(packed)))
    with pytest.raises(FleetError, match="its answer is compressed"):
        node.receive()


def test_an_answer_of_the_usual_kind_is_taken() -> None:
    node, _ = served(httpx.Response(200, stream=httpx.ByteStream(b"")))
    assert node.receive() is None

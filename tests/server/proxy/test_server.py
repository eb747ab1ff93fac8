"""The front between real sockets: clients as raw TLS connections, and a small server in the SuperLink's place."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import PullMessagesResponse

from cotune.errors import RunError
from cotune.server.deployment.front_refusals import RefusalWatch, read_refusals
from cotune.server.deployment.keys.certificates import create_authority
from cotune.server.deployment.members import Members
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.server import TlsProxy
from cotune.server.proxy_process import FrontConfig, MemberKeys, read_config, setup
from cotune.server.runs.events import Events, read_events
from tests.support.calls import announcement, identifier, new_key, public, signed, tree
from tests.support.failures import fails_with
from tests.support.proxies import (
    CALL,
    NORTH,
    SOUTH,
    STRANGER,
    Running,
    Upstream,
    everything,
    folder,
    post,
    running,
    served,
    upstream,
)

__all__ = ["folder", "upstream"]  # fixtures


@pytest.fixture
def front(folder: Path, upstream: Upstream) -> Iterator[Running]:
    with running(folder, upstream.port, timeout=5, push_object=1024 * 1024) as front:
        yield front


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def detail(answer: bytes) -> str:
    content = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert content["code"] == status(answer)
    return str(content["detail"])


def test_fleet_call_is_forwarded_with_needed_headers_only(front: Running, upstream: Upstream) -> None:
    extra = "Content-Type: application/protobuf\r\nX-Forwarded-For: 9.9.9.9\r\nConnection: close\r\nCookie: c\r\n"
    head, _, content = front.ask(post(extra=extra)).partition(b"\r\n\r\n")
    assert (status(head), content) == (200, b"hello")
    assert b"flwr-package-version: 1.41.0" in head.lower()
    assert b"cookie" not in head.lower()
    path, headers, received = upstream.seen[0]
    assert (path, received) == (CALL, b"hello")
    assert headers["host"] == f"127.0.0.1:{upstream.port}"
    assert headers.keys() - signed(NORTH).keys() == {"host", "content-length", "content-type", "x-forwarded-for"}
    assert signed(NORTH).keys() <= headers.keys()
    assert headers["x-forwarded-for"] == "127.0.0.1"


@pytest.mark.parametrize(
    "target",
    ["/", "/v1/control/list-runs", "/v1/runtime/get-nodes", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs",
     "/v1/fleet%2fget-run", "/v1/fleet//get-run", "/v1/fleet/get-run?x", "/V1/FLEET/get-run", "https://x/v1/fleet/get-run", "*"],
)  # fmt: skip
def test_everything_else_is_not_found(front: Running, upstream: Upstream, target: str) -> None:
    answer = front.ask(post(target=target))
    assert status(answer) == 404
    assert "Fleet API" in detail(answer)
    assert upstream.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "CONNECT"])
def test_other_methods_are_not_found(front: Running, upstream: Upstream, method: str) -> None:
    assert status(front.ask(f"{method} {CALL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())) == 404
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (post(extra="Transfer-Encoding: chunked\r\n"), 400),
        (post(extra="Transfer-Encoding: gzip, chunked\r\n"), 501),
        (post(extra="Transfer-Encoding : chunked\r\n"), 400),
        (post(extra="Content-Length: 6\r\n"), 400),
        (post(extra="Content-Length: +5\r\n"), 400),
        (post(extra="Upgrade: websocket\r\nConnection: Upgrade\r\n"), 400),
        (post(extra="Expect: 100-continue\r\n"), 400),
        (post(extra="Host: y\r\n"), 400),
        (f"POST {CALL} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 411),
        (f"POST {CALL} HTTP/2.0\r\nHost: x\r\n\r\n".encode(), 505),
        (post(length=1024 * 1024 + 1), 413),
        (post(extra=f"flwr-long: {'x' * 20_000}\r\n"), 431),
        (b"\x00\x01\x02\r\n\r\n", 400),
    ],
    ids=[
        "chunked",
        "gzip",
        "space",
        "lengths",
        "sign",
        "upgrade",
        "expect",
        "hosts",
        "no-length",
        "http2",
        "large",
        "head",
        "noise",
    ],
)
def test_what_is_ambiguous_or_too_large_ends_the_connection(
    front: Running, upstream: Upstream, raw: bytes, expected: int
) -> None:
    answer = front.ask(raw + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status(answer) == expected
    assert answer.count(b"HTTP/1.1 ") == 1
    assert upstream.seen == []


def test_requests_follow_each_other_and_each_is_looked_at(front: Running, upstream: Upstream) -> None:
    answer = front.ask(post(b"one") + post(b"two") + post(target="/v1/control/list-runs") + post(b"three"))
    assert [int(part.split(b" ", 1)[0]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404]
    assert [content for _, _, content in upstream.seen] == [b"one", b"two"]


def test_content_streams_through_before_it_is_complete(front: Running, upstream: Upstream) -> None:
    with front.connect() as connection:
        connection.sendall(post(b"0123", length=8, extra="Connection: close\r\n"))
        assert upstream.read.wait(600)
        connection.sendall(b"4567")
        assert everything(connection).endswith(b"01234567")


def test_a_megabyte_comes_back_whole(front: Running) -> None:
    content = bytes(range(256)) * 4096
    assert front.ask(post(content, extra="Connection: close\r\n")).partition(b"\r\n\r\n")[2] == content


def test_a_client_that_vanishes_in_the_middle_is_no_request(front: Running, upstream: Upstream) -> None:
    with front.connect() as connection:
        connection.sendall(post(b"0123", length=8))
        assert upstream.read.wait(600)
    assert status(front.ask(post(extra="Connection: close\r\n"))) == 200
    assert [content for _, _, content in upstream.seen] == [b"hello"]


@pytest.mark.parametrize("sent", ["nothing", "head", "content"])
def test_slow_clients_are_cut(folder: Path, upstream: Upstream, sent: str) -> None:
    beginnings = {
        "nothing": b"",
        "head": b"POST /v1/fl",
        "content": post(b"0123", length=8),
    }  # signed now: it is good for minutes
    with running(folder, upstream.port, timeout=1, bytes_per_second=1000) as front:
        assert front.ask(beginnings[sent]) == b""
    assert upstream.seen == []


def test_a_handshake_that_never_comes_is_cut(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, timeout=1, first_byte=0.3) as front:
        for sent in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"):
            with socket.create_connection(("127.0.0.1", front.port), 10) as connection:
                connection.sendall(sent)
                assert everything(connection) == b""


def test_plain_http_is_told_that_this_is_tls(front: Running, upstream: Upstream) -> None:
    with socket.create_connection(("127.0.0.1", front.port), 10) as connection:
        connection.sendall(post())
        connection.shutdown(socket.SHUT_WR)
        answer = everything(connection)
    assert status(answer) == 400
    assert "speaks TLS" in detail(answer)
    assert upstream.seen == []


def is_cut(connection: socket.socket) -> bool:
    try:
        return everything(connection) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_connections_of_one_address_are_limited_and_freed(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, connections_per_address=2) as front, ExitStack() as held:
        first, _ = (served(held.enter_context(front.connect())) for _ in range(2))
        with pytest.raises(OSError, match=r"."):
            front.connect()
        first.close()
        assert status(eventually(lambda: front.ask(post(extra="Connection: close\r\n")))) == 200


def test_flood_of_strangers_drops_oldest_stranger_only(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, strangers=3) as front, ExitStack() as held:
        member = served(held.enter_context(front.connect()))
        flood = [held.enter_context(socket.create_connection(("127.0.0.1", front.port), 10)) for _ in range(8)]
        assert all(is_cut(connection) for connection in flood[:5])
        assert status(front.ask(post(key=SOUTH, extra="Connection: close\r\n"))) == 200
        served(member)


def test_strangers_of_a_members_address_make_room_too(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, connections_per_address=3) as front, ExitStack() as held:
        member = served(held.enter_context(front.connect()))
        flood = [held.enter_context(socket.create_connection(("127.0.0.1", front.port), 10)) for _ in range(4)]
        assert all(is_cut(connection) for connection in flood[:2])
        served(member)


def test_a_connection_that_says_nothing_is_cut_soon(folder: Path, upstream: Upstream) -> None:
    """timeout is long: what cuts it is the limit of the first byte."""
    with (
        running(folder, upstream.port, first_byte=0.2, timeout=600) as front,
        socket.create_connection(("127.0.0.1", front.port), 60) as connection,
    ):
        assert is_cut(connection)


def test_one_member_cannot_hold_all_connections(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, connections_per_member=2) as front, ExitStack() as held:
        for _ in range(2):
            served(held.enter_context(front.connect()))
        answer = front.ask(post())
        assert (status(answer), "north" in detail(answer)) == (503, True)
        assert status(front.ask(post(key=SOUTH, extra="Connection: close\r\n"))) == 200


# --- members only


@pytest.mark.parametrize(
    "headers",
    [
        {},
        signed(STRANGER),
        signed(NORTH, ago=400),
        signed(NORTH, ago=-3000),
        signed(NORTH, over="something else"),
        {**signed(NORTH), "flwr-signature": signed(SOUTH)["flwr-signature"]},
        {**signed(NORTH), "flwr-public-key": "no base64 at all"},
        {**signed(NORTH), "flwr-timestamp": "yesterday"},
        {**signed(NORTH), "flwr-timestamp": "2026-01-01T00:00:00"},
    ],
    ids=["none", "stranger", "old", "future", "another-time", "anothers", "key", "time", "no-zone"],
)
def test_of_anyone_who_is_no_member_not_a_byte_is_read(folder: Path, upstream: Upstream, headers: dict[str, str]) -> None:
    """The answer comes while the five megabytes that were announced have not even been sent."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with running(folder, upstream.port) as front, front.connect() as connection:
        connection.sendall(post(b"", length=5 * 2**20, extra=extra, key=None))
        assert status(connection.recv(65536)) == 401
    assert upstream.seen == []


def test_unregistered_node_gets_the_superlinks_refusal(front: Running, upstream: Upstream) -> None:
    answer = front.ask(post(target="/v1/fleet/activate-node", key=STRANGER))
    assert status(answer) == 412
    content = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert content["code"] == 2004
    assert upstream.seen == []


def test_anyone_who_is_revoked_is_a_stranger_from_then_on(tmp_path: Path, folder: Path, upstream: Upstream) -> None:
    members = Members(tmp_path / "members.json")
    key = new_key()
    shutil.copytree(folder, tmp_path / "certificates")
    members.invite("west", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    with running(tmp_path / "certificates", upstream.port) as front, front.connect() as connection:
        served(connection, key)
        members.revoke("west")
        connection.sendall(post(key=key))
        assert status(connection.recv(65536)) == 401


def test_damaged_member_list_keeps_known_members(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.json")
    keys = MemberKeys(tmp_path / "members.json")
    assert keys(public(NORTH)) is None
    members.invite("north", NORTH.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    assert keys(public(NORTH)) == "north"
    (tmp_path / "members.json").write_text("{")
    assert keys(public(NORTH)) == "north"


@pytest.mark.parametrize(("call", "most"), [("pull-messages", 4096), ("push-messages", 2**20), ("push-object", 6 * 2**20)])
def test_every_call_has_its_own_limit(folder: Path, upstream: Upstream, call: str, most: int) -> None:
    with running(folder, upstream.port) as front:
        assert status(front.ask(post(b"", f"/v1/fleet/{call}", length=most + 1))) == 413
    assert upstream.seen == []


def test_member_with_too_many_calls_waits_then_retries(folder: Path, upstream: Upstream) -> None:
    upstream.answer.clear()
    with running(folder, upstream.port, in_flight_per_member=100, queue=0.1) as front, front.connect() as busy:
        busy.sendall(post(b"x" * 80))
        assert upstream.read.wait(600)
        assert status(front.ask(post(b"x" * 80))) == 503
        with front.connect() as other:
            other.sendall(post(b"x" * 80, key=SOUTH, extra="Connection: close\r\n"))
            upstream.answer.set()
            assert status(everything(other)) == 200


# --- what is announced

PUSH = "/v1/fleet/push-messages"


def test_an_honest_announcement_passes_as_it_is(front: Running, upstream: Upstream) -> None:
    content = announcement().SerializeToString()
    assert status(front.ask(post(content, PUSH, extra="Connection: close\r\n"))) == 200
    assert upstream.seen[-1][2] == content


def test_forged_announcement_is_refused_and_its_member_named(front: Running, upstream: Upstream) -> None:
    before = read_refusals(front.refused).get("south")
    for forged in (announcement(reply_to_message_id="", src_node_id=1, dst_node_id=17), announcement(tree(100), src_node_id=1)):
        answer = front.ask(post(forged.SerializeToString(), PUSH, key=SOUTH))
        assert status(answer) == 400
    assert upstream.seen == []
    until = time.monotonic() + 600  # what is not the first is written a second later
    while (after := read_refusals(front.refused).get("south")) == before:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert after is not None
    assert after.count > (before.count if before else 0)


def test_an_object_that_the_server_has_sent_cannot_be_announced(front: Running, upstream: Upstream) -> None:
    """The small server answers with what it was sent."""
    sent = PullMessagesResponse(message_object_trees=[tree(3, first=500)]).SerializeToString()
    assert status(front.ask(post(sent, "/v1/fleet/pull-messages", extra="Connection: close\r\n"))) == 200
    theirs = tree(3, first=900)
    theirs.children[0].children[0].children.add(object_id=identifier(510)).children.add(object_id=identifier(1))
    assert status(front.ask(post(announcement(theirs).SerializeToString(), PUSH))) == 400
    honest = announcement(tree(3, first=900)).SerializeToString()
    assert status(front.ask(post(honest, PUSH, extra="Connection: close\r\n"))) == 200


# --- quotas


def test_member_beyond_quota_is_refused_and_named_alone(folder: Path, upstream: Upstream, tmp_path: Path) -> None:
    """Replies that nobody asked for, until there may be no more; then again for each request that is handed over."""
    events = Events(tmp_path / "events.jsonl")
    last = "Connection: close\r\n"
    with running(folder, upstream.port, Quotas(messages=2)) as front:
        watch = RefusalWatch(front.refused, events)

        def announce(first: int, key: EllipticCurvePrivateKey) -> int:
            content = announcement(tree(3, first=first)).SerializeToString()
            return status(front.ask(post(content, PUSH, extra=last, key=key)))

        assert [announce(first, SOUTH) for first in (100, 200, 300)] == [200, 200, 429]
        assert announce(400, NORTH) == 200
        sent = PullMessagesResponse(message_object_trees=[tree(3, first=5000)]).SerializeToString()
        assert status(front.ask(post(sent, "/v1/fleet/pull-messages", extra=last, key=SOUTH))) == 200
        assert [announce(first, SOUTH) for first in (500, 600)] == [200, 429]
    until = time.monotonic() + 600  # what is refused in a burst is written a second later
    while not events.path.exists() or not any("quota of messages" in event["reason"] for event in read_events(events.path)):
        assert time.monotonic() < until
        watch("round_finished", {})
        time.sleep(0.05)
    assert {event["organization"] for event in read_events(events.path)} == {"south"}


def test_byte_quota_counts_both_directions_before_reading(folder: Path, upstream: Upstream) -> None:
    """The small server answers with what it was sent, so that every 5 MiB count twice: after six of them 4 MiB are left."""
    with running(folder, upstream.port, Quotas(reply=64 * 2**20, bytes=64 * 2**20)) as front:
        content = bytes(5 * 2**20)
        with front.connect() as connection:
            for _ in range(6):
                connection.sendall(post(content))
                received = 0
                while received < len(content):
                    received += len(connection.recv(2**20))
        seen = len(upstream.seen)
        with front.connect() as connection:
            connection.sendall(post(b"", length=5 * 2**20))
            assert status(connection.recv(65536)) == 429
        assert len(upstream.seen) == seen
        assert status(front.ask(post(key=SOUTH, extra="Connection: close\r\n"))) == 200


def test_a_quota_of_disk_has_a_status_of_its_own(folder: Path, upstream: Upstream) -> None:
    with running(folder, upstream.port, Quotas(disk=64 * 2**20)) as front, front.connect() as connection:
        content = bytes(5 * 2**20)
        for _ in range(12):
            connection.sendall(post(content))
            received = 0
            while received < len(content):
                received += len(connection.recv(2**20))
        with front.connect() as other:
            other.sendall(post(b"", length=5 * 2**20))
            assert status(other.recv(65536)) == 507
        assert status(front.ask(post(key=SOUTH, extra="Connection: close\r\n"))) == 200


def eventually(act: Callable[[], bytes]) -> bytes:
    """As the front learns of a closed connection a moment later."""
    until = time.monotonic() + 600
    while True:
        try:
            return act()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def test_a_superlink_that_is_away_or_slow_is_one_to_try_again(folder: Path, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserve:
        nobody = reserve.getsockname()[1]
    with running(folder, nobody) as front:
        assert status(front.ask(post())) == 502
    upstream.answer.clear()
    with running(folder, upstream.port, answer=0.2) as front:
        assert status(front.ask(post())) == 504
    upstream.answer.set()


def test_a_superlink_of_another_authority_is_not_believed(folder: Path, upstream: Upstream, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", [])
    shutil.copy(folder.parent / "members.json", tmp_path)
    with running(tmp_path / "other", upstream.port) as front:
        assert status(front.ask(post())) == 502
    assert upstream.seen == []


def test_stopping_lets_a_request_finish_and_cuts_who_only_waits(folder: Path, upstream: Upstream) -> None:
    upstream.answer.clear()
    with running(folder, upstream.port) as front, front.connect() as idle, front.connect() as busy:
        busy.sendall(post())
        assert upstream.read.wait(600)
        front.stop()
        assert everything(idle) == b""
        with pytest.raises(OSError, match=r"."):
            front.connect()
        upstream.answer.set()
        assert everything(busy).endswith(b"hello")


def test_stopping_does_not_wait_for_ever(folder: Path, upstream: Upstream) -> None:
    upstream.answer.clear()
    with running(folder, upstream.port, grace=0.1) as front, front.connect() as busy:
        busy.sendall(post())
        assert upstream.read.wait(600)
        front.stop()
        assert everything(busy) == b""
        upstream.answer.set()


def enter(config: FrontConfig) -> None:
    async def play() -> None:
        async with TlsProxy(setup(config)):
            pass

    asyncio.run(play())


def test_a_port_that_is_taken_is_one_sentence(folder: Path, front: Running) -> None:
    config = FrontConfig(
        certificates=folder, members=folder.parent / "members.json", superlink_port=1, host="127.0.0.1", port=front.port
    )
    with fails_with("run.port_in_use", str(front.port)):
        enter(config)


def test_an_address_of_another_machine_is_one_sentence(folder: Path) -> None:
    with fails_with("run.invalid_listen_address"):
        enter(
            FrontConfig(certificates=folder, members=folder.parent / "members.json", superlink_port=1, host="192.0.2.1", port=0)
        )


def test_it_does_not_start_with_an_expired_certificate(tmp_path: Path) -> None:
    create_authority(tmp_path, [], now=datetime.now(UTC) - timedelta(days=400))
    with fails_with("run.certificate_expired"):
        enter(FrontConfig(certificates=tmp_path, members=tmp_path, superlink_port=1, port=0))


def test_its_file_is_read_relative_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "front.toml"
    file.write_text('certificates = "certificates"\nmembers = "members.json"\nsuperlink_port = 8000\n[limits]\nbody = 2048\n')
    config = read_config(file)
    assert (config.certificates, config.port, config.limits.body) == (tmp_path / "certificates", 9092, 2048)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("superlink_port = 1", 'lacks "certificates"'),
        ('certificates = "c"\nsuperlink_port = 1', 'lacks "members"'),
        ('certificates = "c"\nmembers = "m"\nsuperlink_port = 1\nhots = "x"', "did you mean 'host'"),
        ('certificates = "c"\nmembers = "m"\nsuperlink_port = 70000', "superlink_port = 70000"),
        ("= 1", "front.toml: "),
    ],
)
def test_what_is_wrong_in_its_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "front.toml"
    file.write_text(text)
    with pytest.raises(RunError, match=sentence):
        read_config(file)
    with fails_with("run.unreadable_config"):
        read_config(tmp_path / "nowhere.toml")

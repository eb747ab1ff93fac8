"""What passes the gate, by the rules and by Flower's own list of calls."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote, urlsplit

import h11
import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from hypothesis import given
from hypothesis import strategies as st

from cotune.server.proxy.allowed_calls import Refusal, content_length, forwarded_headers, get_call, reason_to_refuse
from cotune.server.proxy.authentication import authenticate
from cotune.server.proxy.limits import Limits
from cotune.server.proxy_process import FLEET_FORMAT

LIMITS = Limits(body=1024)


def request(target: str, method: str = "POST", **headers: str) -> h11.Request:
    named = {"host": "fed.example.org", "content_length": "5", **headers}
    return h11.Request(method=method, target=target, headers=[(k.replace("_", "-"), v) for k, v in named.items()])


@pytest.mark.parametrize(("method", "path"), PROTOBUF_REQUEST_TYPES)
def test_of_all_calls_that_flower_knows_those_of_the_fleet_pass(method: str, path: str) -> None:
    refusal = reason_to_refuse(request(path, method), LIMITS)
    assert refusal is None if path.startswith("/v1/fleet/") else refusal is not None and refusal.status == 404


PARTS = [
    "/v1/fleet/",
    "/v1/control/",
    "v1",
    "fleet",
    "get-run",
    "/",
    "//",
    ".",
    "..",
    "%2f",
    "%2e%2e",
    "%00",
    "\\",
    "?",
    "#",
    ";",
    "@",
    ":",
    "http:",
]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join))
def test_a_path_that_passes_has_one_reading_only(target: str) -> None:
    if reason_to_refuse(request(target), LIMITS) is None:
        assert posixpath.normpath(unquote(urlsplit(target).path)) == target
        assert target.startswith("/v1/fleet/")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "CONNECT", "TRACE", "post"])
def test_flower_posts_and_nothing_else_passes(method: str) -> None:
    refusal = reason_to_refuse(request("/v1/fleet/get-run", method), LIMITS)
    assert refusal is not None
    assert refusal.status == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"transfer_encoding": "chunked"}, 400),
        ({"upgrade": "websocket"}, 400),
        ({"expect": "100-continue"}, 400),
        ({"content_length": "1025"}, 413),
        ({"content_length": "999999999999999999"}, 413),
    ],
)
def test_content_comes_with_its_length_and_within_the_limit(headers: dict[str, str], status: int) -> None:
    refusal = reason_to_refuse(request("/v1/fleet/get-run", **headers), LIMITS)
    assert refusal is not None
    assert refusal.status == status
    assert reason_to_refuse(request("/v1/fleet/get-run", content_length="1024"), LIMITS) is None


def test_without_a_length_nothing_passes() -> None:
    bare = h11.Request(method="POST", target="/v1/fleet/get-run", headers=[("host", "fed.example.org")])
    refusal = reason_to_refuse(bare, LIMITS)
    assert refusal is not None
    assert refusal.status == 411


def test_refusals_cause_no_flower_retry_or_run_end() -> None:
    for asked in (request("/"), request("/v1/fleet/a", expect="x"), request("/v1/fleet/a", content_length="99999")):
        refusal = reason_to_refuse(asked, LIMITS)
        assert refusal is not None
        assert refusal.status not in {401, 403, 429, 502, 503, 504}


def test_headers_claiming_client_identity_are_dropped() -> None:
    given = [
        (b"Content-Type", b"a"),
        (b"flwr-signature", b"b"),
        (b"X-Forwarded-For", b"c"),
        (b"Forwarded", b"d"),
        (b"Connection", b"e"),
        (b"Cookie", b"f"),
    ]
    assert forwarded_headers(given) == [(b"content-type", b"a"), (b"flwr-signature", b"b")]


def test_time_grows_with_the_size() -> None:
    assert Limits(timeout=30, bytes_per_second=1024).get_transfer_seconds(10 * 1024) == 40


@given(st.binary(max_size=300))
def test_any_head_is_refused_cleanly_or_is_one_that_passes(content: bytes) -> None:
    read_head(content)


@given(st.data())
def test_a_changed_head_is_refused_cleanly_or_is_one_that_passes(data: st.DataObject) -> None:
    head = bytearray(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nflwr-public-key: QQ==\r\n\r\n")
    for _ in range(data.draw(st.integers(1, 5))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    read_head(bytes(head))


def read_head(content: bytes) -> None:
    """As a connection reads it: h11, then the rules, then the signature."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=LIMITS.head)
    http.receive_data(content)
    try:
        event = http.next_event()
    except h11.RemoteProtocolError:
        return
    if isinstance(event, h11.Request) and reason_to_refuse(event, LIMITS) is None:
        assert get_call(event)
        assert 0 <= content_length(event) <= LIMITS.get_content_limit(get_call(event))[1]
        assert isinstance(authenticate(event.headers, get_call(event), lambda key: None, FLEET_FORMAT), Refusal)

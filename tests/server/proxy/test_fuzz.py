"""The proxy reads whatever it is sent without failing, passes nothing that no member has signed, and stands alone."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from functools import cache
from pathlib import Path

import h11
import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.server import proxy
from cotune.server.proxy.allowed_calls import Refusal
from cotune.server.proxy.authentication import authenticate
from cotune.server.proxy.connection import ClientConnection
from cotune.server.proxy.connection_slots import Slot
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.request_guard import RequestGuard
from cotune.server.proxy_process import FLEET_FORMAT
from tests.support.calls import announcement, new_key, public, signed

NORTH = new_key()
STRANGER = new_key()
FRAGMENTS = [
    b"POST /v1/fleet/push-messages HTTP/1.1\r\n",
    b"POST /v1/fleet/push-object HTTP/1.1\r\n",
    b"POST /v1/control/list-runs HTTP/1.1\r\n",
    b"GET / HTTP/1.0\r\n",
    b"Host: x\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"\r\n",
    b"hello",
    b"\x00\xff\x16\x03\x01",
    *(f"{name}: {value}\r\n".encode() for name, value in signed(STRANGER).items()),
    b"flwr-signature: AAAA\r\n",
    b"flwr-timestamp: 2026-99-99\r\n",
]


class Writer:
    """What goes back, in place of a connection."""

    def __init__(self) -> None:
        self.sent = b""
        self.transport = self

    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    async def wait_closed(self) -> None: ...


class Upstream:
    """In the SuperLink's place: notes what has passed."""

    def __init__(self) -> None:
        self.passed = list[tuple[bytes, bytes]]()
        self.url = httpx.URL("https://127.0.0.1:1")

    async def ask(self, request: h11.Request, content: AsyncIterator[bytes] | bytes, client: str) -> httpx.Response:
        whole = content if isinstance(content, bytes) else b"".join([piece async for piece in content])
        self.passed.append((request.target, whole))
        return httpx.Response(200, stream=httpx.ByteStream(b"ok"))


def converse(pieces: Iterable[bytes]) -> tuple[bytes, Upstream]:
    """What comes back for what a client writes before it goes away, and what has passed."""
    writer = Writer()
    upstream = Upstream()

    async def play() -> None:
        guard = RequestGuard.of(
            Limits(linger=0.01, timeout=5.0), Quotas(), {public(NORTH): "north"}.get, FLEET_FORMAT, lambda member, reason: None
        )
        reader = asyncio.StreamReader()
        slot = Slot("10.0.0.1", lambda: None)
        guard.slots._held[slot] = None
        for piece in pieces:
            reader.feed_data(piece)
        reader.feed_eof()
        await ClientConnection(reader, writer, "10.0.0.1", guard, slot).run(upstream)  # type: ignore[arg-type]

    asyncio.run(play())
    return writer.sent, upstream


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=30), max_size=14))
def test_strangers_bytes_are_refused_and_not_forwarded(pieces: list[bytes]) -> None:
    answer, upstream = converse(pieces)
    assert upstream.passed == []
    assert answer == b"" or 400 <= int(answer.split(b" ", 2)[1]) < 600
    assert answer.count(b"HTTP/1.1 ") <= 1


@cache
def honest() -> tuple[bytes, bytes]:
    """Head and content of a request, signed when the first test asks for it."""
    content = announcement().SerializeToString()
    names = "".join(f"{name}: {value}\r\n" for name, value in signed(NORTH).items())
    return f"POST /v1/fleet/push-messages HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n{names}\r\n".encode(), content


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_altered_request_is_forwarded_whole_or_refused(data: st.DataObject) -> None:
    """What passes is the content that its length declares, to a call of the fleet."""
    head, content = honest()
    raw = bytearray(head + content)
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    answer, upstream = converse([bytes(raw[:cut])])
    for target, passed in upstream.passed:
        assert target.startswith(b"/v1/fleet/")
        assert passed in raw
    if bytes(raw[:cut]) == head + content:
        assert [passed for _, passed in upstream.passed] == [content]
        assert answer.startswith(b"HTTP/1.1 200")


NAMES = [b"flwr-public-key", b"flwr-signature", b"flwr-timestamp", b"host"]


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=200)), max_size=8),
    st.sampled_from(["pull-messages", "activate-node"]),
)
def test_any_headers_are_a_members_or_a_refusal(headers: list[tuple[bytes, bytes]], call: str) -> None:
    assert isinstance(
        authenticate(headers, call, lambda key: "north", FLEET_FORMAT), Refusal
    )  # also where every key were a member's


FOLDER = Path(str(proxy.__file__)).parent
OF_THE_REST = {"cotune.errors"}  # one class of exception, which the command line shows as a sentence
LIBRARIES = {"cryptography", "google", "h11", "httpx", "pydantic"}


def test_it_imports_nothing_of_the_rest_but_the_errors() -> None:
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("cotune.server.proxy.") or name in OF_THE_REST
                known = name.partition(".")[0] in LIBRARIES | sys.stdlib_module_names
                assert own or known, f"{file.name} imports {name}"


def test_neither_does_what_it_imports() -> None:
    """In a process of its own: what it loads of cotune is itself and the errors; no torch, no transformers."""
    program = "import sys, cotune.server.proxy.server; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    packages = {"cotune", "cotune.lazy_names", "cotune.server", "cotune.server.proxy"}  # by which Python gets there
    theirs = {name for name in loaded if name.partition(".")[0] == "cotune" and not name.startswith("cotune.server.proxy.")}
    assert theirs <= packages | OF_THE_REST
    assert not {"flwr", "torch", "transformers", "opacus"} & set(loaded)


def test_it_stays_small() -> None:
    """So that somebody can read all of it before they open a port."""
    files = [file.read_text(encoding="utf-8") for file in FOLDER.glob("*.py")]
    assert max(len(text.splitlines()) for text in files) <= 300
    assert sum(count_code_lines(text) for text in files) <= 1050


def count_code_lines(text: str) -> int:
    """Without empty lines and docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    described = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    docstrings = {i for node in described for i in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    return sum(1 for i, line in enumerate(text.splitlines(), 1) if line.strip() and i not in docstrings)

"""A real run without a network: a federation's folder, members with keys, and a grid on which things can go wrong."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from cotune.flower.inprocess_grid import InProcessGrid
from cotune.server.deployment.federation import FederationFolder, ServerConfig, write_config
from cotune.server.deployment.keys.signing import create_signing_key
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder
from tests.support.organizations import Answer, federation

PRIVATE = [ec.generate_private_key(ec.SECP384R1()) for _ in range(5)]
KEYS = [key.public_key() for key in PRIVATE]
LINES = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for key in KEYS]
PEMS = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in KEYS]


def real(simulated: RunFolder, examples: Mapping[str, tuple[int, int]] | None = None) -> RunFolder:
    """A run with the same plan and organizations, as a federation has it."""
    fed = simulated.path.parent / f"fed-{simulated.path.name}"
    names = [p.name for p in simulated.file.participants]
    write_config(fed, ServerConfig(name="fed", id=32 * "f", hosts=("localhost",)))
    create_signing_key(fed / "certificates")
    members = FederationFolder(fed).members
    for name, line in zip(names, LINES, strict=False):
        members.invite(name, line, (examples or {}).get(name))
    people = tuple(Participant(name=name) for name in names)
    file = RunFile(
        run="real",
        created="2026-01-01T00:00:00+00:00",
        engine="superlink",
        device="cpu",
        participants=people,
        federation=str(fed),
    )
    return RunFolder.create(fed / "runs" / "1", simulated.plan, file)


class WildGrid(InProcessGrid):
    """The i-th organization's node is the i-th from the end; all is well unless a test says otherwise."""

    def __init__(self, client_app: ClientApp, nodes: int = 1) -> None:
        super().__init__(client_app, nodes)
        self.node_of: dict[str, int] = {}
        self.names: list[str] = []
        self.offline: set[str] = set()
        self.left: set[str] = set()  # by itself: offline before its time
        self.since: dict[str, str] = {}
        self.swallowed: Counter[str] = Counter()  # requests that never reach it
        self.pushed: Counter[str] = Counter()
        self.pushes_fail: Counter[str] = Counter()  # organization -> how often yet
        self.not_taken: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()  # answered with Flower's error 5
        self.pulls_fail: Counter[str] = Counter()
        self.handovers_fail: Counter[str] = Counter()  # the answer is gone then
        self.delay: dict[str, float] = {}  # seconds before an answer is there
        self.unfit: dict[str, Exception] = {}  # whose answers cannot be taken
        self.hangs: dict[str, threading.Event] = {}  # a pull hangs until it is set
        self.hangs_at: set[str] = set()  # of these the first request's alone
        self.on_push: Callable[[str, Message], None] = lambda name, message: None
        self.ttls: dict[str, list[float]] = defaultdict(list)
        self.groups: dict[str, list[str]] = defaultdict(list)
        self._ready: dict[str, float] = {}
        self._first: dict[str, str] = {}  # organization -> its first request

    def get_nodes(self) -> list[NodeInfo]:
        found = [
            NodeInfo(
                node_id=self.node_of[name],
                public_key=PEMS[i],
                status="offline" if name in self.left else "online",
                online_until=10.0 if name in self.left else 60.0,
                last_activated_at=self.since.get(name, ""),
            )
            for i, name in enumerate(self.names)
            if name not in self.offline
        ]
        return [*found, NodeInfo(node_id=999, public_key=b"a stranger's", status="online")]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        name = self._name(message)
        self.pushed[name] += 1
        self.ttls[name].append(message.metadata.ttl)
        self.groups[name].append(message.metadata.group_id)
        self.on_push(name, message)
        if self._uses_up(self.pushes_fail, name):
            raise OSError("database is locked")
        if self._uses_up(self.not_taken, name):
            return [""]
        if self._uses_up(self.swallowed, name):
            return ["nobody's"]
        (number,) = super().push_messages([message])
        self._ready[number] = time.monotonic() + self.delay.get(name, 0.0)
        self._first.setdefault(name, number)
        return [number]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (number,) = message_ids
        message = self._pending.get(number)
        if message is None or time.monotonic() < self._ready[number]:
            return []
        name = self._name(message)
        if name in self.hangs and (name not in self.hangs_at or number == self._first[name]):
            self.hangs[name].wait()
        if name in self.unfit:
            raise self.unfit[name]
        if self._uses_up(self.pulls_fail, name):
            raise _error_500("pull-messages")
        if self._uses_up(self.handovers_fail, name):
            del self._pending[number]
            raise _error_500("pull-object")
        if self._uses_up(self.lost, name):
            del self._pending[number]
            return [Message(Error(5, "node unavailable"), reply_to=message)]
        return super().pull_messages([number])

    def ready_now(self) -> None:
        """Whatever was delayed for ever is there."""
        self._ready = {number: 0.0 if at > 1e8 else at for number, at in self._ready.items()}

    def _name(self, message: Message) -> str:
        return next(name for name, node in self.node_of.items() if node == message.metadata.dst_node_id)

    def _uses_up(self, counter: Counter[str], name: str) -> bool:
        counter[name] -= 1
        return counter[name] >= 0


def _error_500(call: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", f"https://127.0.0.1:9093/v1/runtime/{call}")
    return httpx.HTTPStatusError("HTTP 500", request=request, response=httpx.Response(500, request=request))


def wild(folder: RunFolder, answers: Mapping[str, Answer]) -> WildGrid:
    key_of = dict(zip((p.name for p in folder.file.participants), PRIVATE, strict=False))
    grid = federation(folder.plan, answers, WildGrid, key_of)
    assert isinstance(grid, WildGrid)
    grid.names = [p.name for p in folder.file.participants]
    grid.node_of = dict(zip(grid.names, sorted(grid.get_node_ids(), reverse=True), strict=True))
    return grid


def told(folder: RunFolder, *events: str) -> list[dict[str, Any]]:
    """The events of these names, without their times."""
    found = [event for event in read_events(folder.path / "events.jsonl") if event["event"] in events]
    return [{key: value for key, value in event.items() if key != "at"} for event in found]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes; of a write that would, the first part is there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

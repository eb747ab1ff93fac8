"""The resident node with a connection and a worker that are made up: order, what is kept, what is dropped, and coming back."""

from __future__ import annotations

import fcntl
import io
import itertools
import logging
import os
import platform
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.audit_log import AuditLog
from cotune.client.local_events import observe_client
from cotune.client.node.node import Node
from cotune.client.node.serve import run_node
from cotune.client.node.worker import TrainerDied
from cotune.flower.chunks import Aborted
from cotune.flower.fleet_client import AnnouncedRequest, FleetClient, _restore_ttl
from cotune.flower.fleet_errors import FleetError, NodeRejected, RequestExpired
from cotune.protocol.refusals import GENERIC_REFUSAL
from tests.support.failures import fails_with

NODE = 5
RUN = 77


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "")
    return content.getvalue()


BUNDLE = zipped("pyproject.toml")


def request(
    round: int = 1, *, run: int = RUN, age: float = 0.0, node: int = NODE, ttl: float = 60.0, kind: str = MessageType.TRAIN
) -> AnnouncedRequest:
    """Sent `age` seconds ago by this machine's clock, to live for `ttl`."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run
    TaskIdentity.node_id = 1
    header = Message(RecordDict(), node, kind, ttl=ttl, group_id=str(round))
    header.metadata.created_at = time.time() - age
    header.metadata.__dict__["_message_id"] = f"message-{round}"
    return AnnouncedRequest(header, ObjectTree(object_id=f"message-{round}"))


class FakeFleet(FleetClient):
    """A server that has these requests, and these failures in place of the next calls of a name. Stops when all is answered."""

    def __init__(
        self, stop: threading.Event, *requests: AnnouncedRequest, archive: bytes = BUNDLE, **failures: list[Any]
    ) -> None:
        self.node_id = NODE
        self.calls = list[str]()
        self.sent = list[Message]()
        self._end = stop
        self._requests = list(requests)
        self._bundle = archive
        self._failures = failures

    def _called(self, name: str, about: AnnouncedRequest | None = None) -> None:
        self.calls.append(name if about is None else f"{name} {about.round}")
        if self._failures.get(name):
            failure = self._failures[name].pop(0)
            if failure is not None:
                raise failure

    def check_known(self) -> None:
        """It is, unless a test says otherwise."""

    def receive(self) -> AnnouncedRequest | None:
        if not self._requests:
            self._end.set()
            return None
        self._called("receive")
        return self._requests.pop(0)

    def open(self, request: AnnouncedRequest) -> Message:
        self._called("open", request)
        return Message(RecordDict({"asked": ConfigRecord({"round": request.round})}), reply_to=request.header)

    def bundle(self, run: int) -> bytes:
        self._called("bundle")
        return self._bundle

    def send(self, reply: Message, seconds: float) -> None:
        self._called("send")
        self.sent.append(reply)

    def confirm(self, request: AnnouncedRequest) -> None:
        self._called("confirm", request)

    def leave(self) -> None:
        self._called("leave")


class FakeWorker:
    """Answers at the second time of asking, or dies at the rounds that are named, so many times."""

    def __init__(self, dies: tuple[str, ...] = (), times: int = 1000) -> None:
        self.given = list[str]()
        self._dies = dies
        self._times = times
        self._asked = 0
        self._message: Message | None = None

    def submit(self, message: Message) -> None:
        self._message = message
        self._asked = 0
        self.given.append(str(message.content["asked"]["round"]))

    def poll(self, seconds: float) -> Message | None:
        assert self._message is not None
        if self.given[-1] in self._dies and self._times:
            self._times -= 1
            raise TrainerDied("the training process ended with -9")
        self._asked += 1
        return self._message if self._asked == 2 else None


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


def serve(folder: Path, stop: threading.Event, fleet: FakeFleet, worker: FakeWorker) -> None:
    Node(folder, worker, stop).serve(fleet)


def reasons(fleet: FakeFleet) -> list[str | None]:
    return [reply.error.reason for reply in fleet.sent]


def test_requests_are_answered_in_turn_and_bundles_checked_once(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(1), request(2))
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert fleet.calls == ["receive", "bundle", "open 1", "send", "confirm 1", "receive", "open 2", "send", "confirm 2"]
    assert worker.given == ["1", "2"]
    assert not (tmp_path / "request.pb").exists()


def test_a_bundle_with_code_is_refused_and_nothing_is_trained(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(1), request(2), archive=zipped("pyproject.toml", "evil.py"))
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == []
    assert fleet.calls == ["receive", "bundle", "send"] * 2  # not confirmed: it may not be complete at the server yet
    assert [reply.error.code for reply in fleet.sent] == [1001, 1001]
    assert reasons(fleet)[0] == (
        "the run's bundle holds 'evil.py': expected configuration only, as this organization runs the cotune that is installed there"
    )


@pytest.mark.parametrize("asked", [[request(1, ttl=1e-9)], [request(3), request(2)]])
def test_outdated_request_is_dropped_and_logged(
    tmp_path: Path, stop: threading.Event, asked: list[AnnouncedRequest], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = FakeFleet(stop, *asked)
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert fleet.calls[-1] == "receive"  # not confirmed: it may not be complete at the server yet
    assert asked[-1].round not in worker.given
    assert f"round {asked[-1].round} of run {RUN} is dropped" in caplog.text


@pytest.mark.parametrize("age", [-7200.0, 7200.0])
def test_a_clock_that_has_jumped_drops_nothing(tmp_path: Path, stop: threading.Event, age: float) -> None:
    fleet = FakeFleet(stop, request(age=age))
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["1"]
    [reply] = fleet.sent
    assert reply.has_content()
    end = reply.metadata.created_at + reply.metadata.ttl
    _restore_ttl(reply)
    assert reply.metadata.ttl > 0
    assert reply.metadata.created_at + reply.metadata.ttl == pytest.approx(end)


def test_expired_request_is_dropped(tmp_path: Path, stop: threading.Event) -> None:
    (tmp_path / "request.pb").write_bytes(request().to_bytes())
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "request.pb", (an_hour_ago, an_hour_ago))
    fleet = FakeFleet(stop)
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert (worker.given, fleet.sent) == ([], [])


def test_training_that_is_long_overdue_makes_way(tmp_path: Path, stop: threading.Event) -> None:
    class Slow(FakeWorker):
        """Never done with round 1."""

        def poll(self, seconds: float) -> Message | None:
            return None if self.given[-1] == "1" else super().poll(seconds)

    fleet = FakeFleet(stop, request(1, ttl=0.2), request(2))
    worker = Slow()
    Node(tmp_path, worker, stop, overdue=0.0).serve(fleet)
    assert worker.given == ["1", "2"]
    assert fleet.calls[-4:] == ["confirm 1", "open 2", "send", "confirm 2"]


def test_a_site_that_cannot_be_written_is_refused_and_said(tmp_path: Path, stop: threading.Event) -> None:
    """A file where the folder was: that stops root too, whom permissions do not."""
    log = AuditLog(tmp_path)
    fleet = FakeFleet(stop, request(1), request(2))
    worker = FakeWorker()
    node = Node(tmp_path / "node", worker, stop, log)
    (tmp_path / "node").write_text("")
    node.serve(fleet)
    assert reasons(fleet) == [GENERIC_REFUSAL, GENERIC_REFUSAL]
    assert worker.given == []
    assert "the site cannot be written" in log.last()["reason"]


def test_what_the_node_refuses_is_in_the_log_of_what_was_sent(tmp_path: Path, stop: threading.Event) -> None:
    log = AuditLog(tmp_path)
    fleet = FakeFleet(stop, request(1), archive=zipped("evil.py"))
    Node(tmp_path, FakeWorker(), stop, log).serve(fleet)
    [entry] = log.entries()
    assert (entry["what"], entry["round"]) == ("refusal", "1")
    assert entry["said"] == entry["reason"] == reasons(fleet)[0]


def test_an_observer_is_told_what_people_want_to_know(tmp_path: Path, stop: threading.Event) -> None:
    seen: list[str] = []
    broken = FakeFleet(stop, request(1), request(2), receive=[None, FleetError("broken")])
    with observe_client(lambda what, about: seen.append(f"{what} {about.get('round') or about.get('reason', '')}".strip())):
        stay(Node(tmp_path, FakeWorker(), stop), broken, FakeFleet(stop, request(2), archive=zipped("evil.py")))
    assert seen == ["connected", "begun 1", "answered 1", "disconnected broken", "connected", "begun 2", "answered 2"]


def test_the_finished_model_may_be_that_of_an_earlier_round(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(3), request(2, kind=MessageType.EVALUATE))
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["3", "2"]


def test_another_run_may_begin_at_round_one(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(3), request(1, run=RUN + 1))
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["3", "1"]


def test_a_worker_that_is_killed_does_its_work_again(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(1))
    worker = FakeWorker(dies=("1",), times=1)
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["1", "1"]
    assert [call for call in fleet.calls if call.startswith(("open", "confirm"))] == ["open 1", "open 1", "confirm 1"]
    assert fleet.sent[0].has_content()


def test_worker_killed_at_submission_is_given_its_work_again(tmp_path: Path, stop: threading.Event) -> None:
    class Killed(FakeWorker):
        def submit(self, message: Message) -> None:
            super().submit(message)
            if len(self.given) == 1:
                raise TrainerDied("the training process ended with -9")

    fleet = FakeFleet(stop, request(1))
    worker = Killed()
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["1", "1"]
    assert fleet.sent[0].has_content()


def test_a_worker_that_dies_of_its_work_costs_that_answer_only(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(1), request(2))
    worker = FakeWorker(dies=("1",))
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["1", "1", "2"]
    assert fleet.sent[0].error.reason == GENERIC_REFUSAL
    assert fleet.sent[1].has_content()


def test_unreadable_message_is_refused_in_generic_words(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(), open=[TypeError("secret")])
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert reasons(fleet) == [GENERIC_REFUSAL]
    assert worker.given == []


def test_a_run_that_is_over_costs_its_request_only(tmp_path: Path, stop: threading.Event) -> None:
    fleet = FakeFleet(stop, request(1), request(2), open=[RequestExpired("over")])
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert worker.given == ["2"]


@pytest.mark.parametrize("call", ["bundle", "open", "send"])
def test_a_connection_that_breaks_off_loses_nothing(tmp_path: Path, stop: threading.Event, call: str) -> None:
    broken = FakeFleet(stop, request(), **{call: [FleetError("broken")]})
    worker = FakeWorker()
    node = Node(tmp_path, worker, stop)
    with pytest.raises(FleetError, match="broken"):
        node.serve(broken)
    assert (tmp_path / "request.pb").exists()
    again = FakeFleet(stop)
    node.serve(again)
    assert worker.given == ["1"]  # trained once, whatever broke
    assert len(again.sent) == 1


def test_a_killed_node_goes_on_with_what_it_was_at(tmp_path: Path, stop: threading.Event) -> None:
    with pytest.raises(FleetError):
        serve(tmp_path, stop, FakeFleet(stop, request(), send=[FleetError("killed here")]), FakeWorker())
    fleet = FakeFleet(stop)
    worker = FakeWorker()
    serve(tmp_path, stop, fleet, worker)
    assert fleet.calls == ["bundle", "open 1", "send", "confirm 1"]
    assert worker.given == ["1"]


def test_a_kept_request_that_is_damaged_is_left_out(
    tmp_path: Path, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "request.pb").write_bytes(b"\xff damaged")
    serve(tmp_path, stop, FakeFleet(stop), FakeWorker())
    assert "request.pb is damaged" in caplog.text


class Impatient(threading.Event):
    """Notes how long it should wait, and does not; set after so many waits."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.waited = list[float]()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout or 0.0)
        if len(self.waited) > self._waits:
            self.set()
        return self.is_set()


def test_it_waits_longer_after_each_failure_up_to_ten_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = Impatient(12)

    @contextmanager
    def refused(known: int | None, reconnect: bool) -> Iterator[FleetClient]:
        raise NodeRejected("the server does not let this node in")
        yield

    Node(tmp_path, FakeWorker(), stop).run(refused)
    first, *others = stop.waited
    assert first == 0.0
    assert 0.4 <= others[0] <= 0.5
    assert all(0.8 * min(10.0, 2 * a) <= b <= min(10.0, 2 * a) for a, b in itertools.pairwise(others))
    assert max(others) >= 8.0
    assert caplog.text.count("the server does not let this node in; the next attempt is in") == 12


def stay(node: Node, *fleets: FakeFleet) -> list[tuple[int | None, bool]]:
    """Which node ids the node came with, and whether it left first."""
    came = list[tuple[int | None, bool]]()
    waiting = list(fleets)

    @contextmanager
    def connect(known: int | None, reconnect: bool) -> Iterator[FleetClient]:
        came.append((known, reconnect))
        yield waiting.pop(0)

    node.run(connect)
    return came


def test_it_comes_back_by_its_number_and_leaves_when_stopped(tmp_path: Path, stop: threading.Event) -> None:
    broken = FakeFleet(stop, request(), send=[FleetError("broken")])
    after = FakeFleet(stop, request())
    assert stay(Node(tmp_path, FakeWorker(), stop), broken, after) == [(None, True), (NODE, False)]
    assert after.calls[-2:] == ["confirm 1", "leave"]
    assert list(tmp_path.iterdir()) == []


def test_request_that_may_be_lost_is_asked_for_again(tmp_path: Path, stop: threading.Event) -> None:
    """The server hands it over once: anyone who comes back after that call leaves first, so that the server sees it."""
    broken = FakeFleet(stop, request(), receive=[FleetError("broken")])
    after = FakeFleet(stop, request())
    assert stay(Node(tmp_path, FakeWorker(), stop), broken, after) == [(None, True), (NODE, True)]


def test_a_request_that_did_not_come_whole_is_asked_for_again(tmp_path: Path, stop: threading.Event) -> None:
    """The server was killed as it sent it: the rest never comes, and what is not confirmed is not waited for."""
    half = FakeFleet(stop, request(), open=[Aborted("no part of it has come")])
    worker = FakeWorker()
    whole = FakeFleet(stop, request())
    assert stay(Node(tmp_path, worker, stop), half, whole) == [(None, True), (NODE, True)]
    assert "confirm 1" not in half.calls
    assert worker.given == ["1"]
    assert len(whole.sent) == 1


def test_it_outlives_what_nobody_thought_of(tmp_path: Path, stop: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    odd = FakeFleet(stop, request(), receive=[KeyError("odd")])
    worker = FakeWorker()
    stay(Node(tmp_path, worker, stop), odd, FakeFleet(stop, request()))
    assert worker.given == ["1"]
    assert "KeyError" in caplog.text


@pytest.mark.parametrize(("place", "known"), [(".", 9), ("copy", None)])
def test_killed_node_keeps_its_number_and_a_copy_does_not(
    tmp_path: Path, stop: threading.Event, place: str, known: int | None
) -> None:
    (tmp_path / "id").write_text(f"9 {platform.node()} {(tmp_path / place).resolve()}", encoding="utf-8")
    assert stay(Node(tmp_path, FakeWorker(), stop), FakeFleet(stop)) == [(known, True)]


def test_new_server_gets_no_answer_for_the_old_one(tmp_path: Path, stop: threading.Event) -> None:
    (tmp_path / "request.pb").write_bytes(request(node=NODE + 1).to_bytes())
    fleet = FakeFleet(stop)
    worker = FakeWorker()
    stay(Node(tmp_path, worker, stop), fleet)
    assert fleet.sent == []
    assert worker.given == []


def test_a_request_survives_its_file() -> None:
    kept = AnnouncedRequest.from_bytes(request(4).to_bytes())
    given = request(4)
    assert (kept.run, kept.round, kept.tree) == (given.run, given.round, given.tree)
    assert kept.header.metadata.message_id == "message-4"
    with pytest.raises(ValueError, match="not a request"):
        AnnouncedRequest.from_bytes(b"")


def test_two_nodes_for_one_site(tmp_path: Path, key: Path) -> None:
    (tmp_path / "site.json").write_text("{}", encoding="utf-8")
    (tmp_path / "node").mkdir()
    with (tmp_path / "node" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with fails_with("run.locked"):
            run_node(tmp_path, "127.0.0.1:1", key=key)


def test_a_site_that_cannot_be_written(tmp_path: Path, key: Path) -> None:
    (tmp_path / "site.json").write_text("{}", encoding="utf-8")
    (tmp_path / "node").write_text("a file in the way")
    with fails_with("run.not_writable", "node"):
        run_node(tmp_path, "127.0.0.1:1", key=key)


@pytest.mark.parametrize("address", ["example.org", "https://example.org:443", ":443", "example.org:https"])
def test_an_address_that_is_none(tmp_path: Path, key: Path, address: str) -> None:
    (tmp_path / "site.json").write_text("{}", encoding="utf-8")
    with fails_with("run.wrong_address"):
        run_node(tmp_path, address, key=key)


def test_a_folder_that_is_no_site(tmp_path: Path, key: Path) -> None:
    with fails_with("data.not_a_site", "site.json"):
        run_node(tmp_path, "127.0.0.1:1", key=key)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    private = ec.generate_private_key(ec.SECP384R1())
    file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    file.chmod(0o600)
    return file


def test_the_log_says_nothing_of_the_key(tmp_path: Path, key: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Against a port where nobody listens."""
    (tmp_path / "site.json").write_text("{}", encoding="utf-8")
    stop = threading.Event()
    with observe_client(lambda event, fields: stop.set()), caplog.at_level(logging.DEBUG, "cotune"):
        run_node(tmp_path, "127.0.0.1:1", key=key, stop=stop)
    assert "nothing listens at 127.0.0.1:1" in caplog.text
    assert all(line not in caplog.text for line in key.read_text().splitlines()[1:-1])


def asked_again(request: AnnouncedRequest, node: int, content: str = "content") -> AnnouncedRequest:
    """With content, for a node of this number."""
    header = Message(RecordDict(), node, MessageType.TRAIN, ttl=60.0, group_id=request.round)
    header.metadata.created_at = time.time()
    header.metadata.__dict__["_message_id"] = f"message-{request.round}-{node}"
    return AnnouncedRequest(header, ObjectTree(object_id=f"{node}", children=[ObjectTree(object_id=content)]))


class Unhurried(FakeWorker):
    """Is done with what it was given only when `done`."""

    done = False

    def poll(self, seconds: float) -> Message | None:
        return self._message if self.done else None


@pytest.mark.parametrize(("content", "given"), [("content", ["1", "1"]), ("another", ["1", "1"])])
def test_renumbered_node_goes_on_with_its_request(tmp_path: Path, stop: threading.Event, content: str, given: list[str]) -> None:
    """As after a renewed key: training goes on, and its update, which is kept, answers; other content is given at once."""
    worker = Unhurried()
    waited = list[int]()
    node = Node(tmp_path, worker, stop)

    class Refusing(FakeFleet):
        """Its heartbeats are refused once the worker is at the request."""

        def check_known(self) -> None:
            if worker.given:
                raise NodeRejected("the key is another now")

    with pytest.raises(NodeRejected):
        node.serve(Refusing(stop, asked_again(request(), NODE)))
    assert worker.given == ["1"]
    answer = worker.poll

    def later(seconds: float) -> Message | None:
        waited.append(len(worker.given))
        worker.done = len(waited) >= 3
        return answer(seconds)

    worker.poll = later  # type: ignore[method-assign]
    second = FakeFleet(stop, asked_again(request(), NODE + 1, content))
    second.node_id = NODE + 1
    node._enter(second)
    node.serve(second)
    assert worker.given == given
    assert [reply.metadata.src_node_id for reply in second.sent] == [NODE + 1]
    assert waited.count(1) == (3 if content == "content" else 0)  # waited for before the same was given once more

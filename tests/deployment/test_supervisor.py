"""`cotune server start` with Flower's real programs: what it keeps running, for whom, and what is left of it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cotune.errors import RunError
from cotune.flower.control_client import open_control
from cotune.plan.load import parse_plan
from cotune.server.deployment.federation import FederationFolder, ServerConfig, create_federation, write_config
from cotune.server.deployment.supervisor import supervise
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder

pytestmark = pytest.mark.long

PROGRAMS = {"SuperLink": "flower-superlink", "front": "cotune.server.front", "executor": "flower-superexec"}


def until(condition: Callable[[], bool], log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def public_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Served:
    folder: FederationFolder
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def descendants(self) -> set[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return {process for process in found if runs(process)}

    def program(self, name: str) -> psutil.Process | None:
        """The SuperLink, the front or the executor, if it runs."""
        for process in psutil.Process(self.process.pid).children():
            if runs(process) and any(PROGRAMS[name] in word for word in process.cmdline()):
                return process
        return None

    def kill(self, name: str) -> None:
        """Returns when it runs again."""
        killed = self.program(name)
        assert killed is not None
        killed.kill()
        until(lambda: self.program(name) not in (None, killed), self.log)
        assert re.search(rf"the {name} was ended by signal 9 \(.*\); it is started again in 0.5 s", self.said())

    def keys(self) -> set[bytes]:
        """That the SuperLink lets in."""
        try:
            with open_control(self.folder.superlink_address, self.folder.certificates) as calls:
                return {node.key for node in calls.nodes()}
        except RunError:
            return set()

    def members(self) -> set[bytes]:
        return {member.key for member in self.folder.members.active()}

    def begin_a_run(self, run: RunFolder) -> psutil.Process:
        """Hands it to the executor; returns the process that plays it."""
        with open_control(self.folder.superlink_address, self.folder.certificates) as calls:
            calls.start(run.path)
        found: list[psutil.Process] = []

        def begun() -> bool:
            found[:] = [each for each in self.descendants() if any("flwr-serverapp" in word for word in each.cmdline())]
            return bool(found)

        until(begun, self.folder.superlink / "executor.log")
        return found[0]

    def stop(self) -> None:
        """As Ctrl-C does. Everything must end."""
        everybody = self.descendants()
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(600) == 0, self.said()
        assert [process for process in everybody if runs(process)] == []
        assert self.said().rstrip().endswith("stopping")


@contextmanager
def serving(folder: FederationFolder) -> Iterator[Served]:
    """`cotune server start`, ready. Whatever has become of it, nothing is left of it afterwards."""
    log = folder.path.parent / "start.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "cotune.cli.main", "server", "start", str(folder.path)], stdout=stream, stderr=stream
        )
    served = Served(folder, process, log)
    everybody: set[psutil.Process] = set()
    try:
        until(lambda: "ready: " in served.said() or process.poll() is not None, log)
        assert process.poll() is None, served.said()
        socket.create_connection(("127.0.0.1", folder.config.port)).close()  # anyone who is told that it is ready can join
        yield served
    finally:
        if process.poll() is None:
            everybody = served.descendants()
            process.terminate()
            process.wait(600)
        for left in everybody:
            if runs(left):
                left.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_model: Callable[[str], Path]) -> FederationFolder:
    plan = parse_plan(
        {"model": {"base": str(base_model("bert"))}, "data": {"source": "x.csv"}, "labels": ["a", "b"], "privacy": "none"}
    )
    config = ServerConfig(
        name="toy", hosts=("127.0.0.1",), listen="127.0.0.1", port=free_port(), superlink_port=free_port(), device="cpu"
    )
    return create_federation(tmp_path_factory.mktemp("federation") / "fed", plan, config)


@pytest.fixture
def waiting_run(folder: FederationFolder, tmp_path: Path) -> RunFolder:
    """A run of an organization that never comes."""
    people = (Participant(name="hospital-a"),)
    file = RunFile(run="waiting", created="2026-01-01T00:00:00+00:00", engine="superlink", device="cpu", participants=people)
    path = folder.path / "runs" / f"waiting-{tmp_path.name}"
    path.mkdir(mode=0o700, parents=True)
    return RunFolder.create(path, folder.plan, file)


def test_members_come_and_go_killed_processes_come_back_and_a_killed_start_is_cleaned_up(
    folder: FederationFolder, waiting_run: RunFolder
) -> None:
    with serving(folder) as served:
        for name in ("hospital-a", "hospital-b"):
            folder.members.invite(name, public_key())
        until(lambda: len(served.keys()) == 2, served.log)
        folder.members.revoke("hospital-b")
        until(lambda: served.keys() == served.members(), served.log)
        with pytest.raises(RunError, match="another process is working on"):
            supervise(folder, print)
        for name in PROGRAMS:
            before = {other: served.program(other) for other in PROGRAMS}
            served.kill(name)
            assert all(served.program(other) == before[other] for other in PROGRAMS if other != name)
        until(lambda: served.keys() == served.members(), served.log)
        app = served.begin_a_run(waiting_run)
        token = app.cmdline()[app.cmdline().index("--token") + 1]
        until(lambda: str(app.pid) in (folder.superlink / "processes.json").read_text(), served.log)
        left = {app, *filter(None, map(served.program, PROGRAMS))}
        assert len(left) == 4
        served.process.kill()
        served.process.wait()
        assert all(runs(process) for process in left)
        with serving(folder) as again:
            assert re.search(r"ended \d+ processes that a killed `cotune server start` had left", again.said())
            assert not any(runs(process) for process in left)
            assert again.keys() == again.members()
            again.stop()
    check_that_logs_hold_no_secrets(folder, token)


def check_that_logs_hold_no_secrets(folder: FederationFolder, token: str) -> None:
    """Neither the token of the run's process nor a private key; and nobody else reads what the processes keep."""
    written = "".join(log.read_text(errors="replace") for log in folder.superlink.glob("*.log*"))
    secrets = [token, *(key.read_text().splitlines()[1] for key in folder.certificates.glob("*.key"))]
    assert len(written) > 1000
    assert len(secrets) == 4  # the keys of authority, server and signatures
    assert not [secret for secret in secrets if secret in written]
    kept = [folder.path, *(file for file in folder.path.rglob("*") if file.name != ".lock")]
    assert {file.stat().st_mode & 0o077 for file in kept} == {0}


def test_a_superlink_that_keeps_all_in_memory_is_told_again_and_a_run_ends_with_its_server(
    folder: FederationFolder, waiting_run: RunFolder
) -> None:
    write_config(folder.path, folder.config.model_copy(update={"database": False}))
    folder.members.invite("hospital-c", public_key())
    with serving(FederationFolder(folder.path)) as served:
        assert served.keys() == served.members() != set()
        served.kill("SuperLink")
        until(lambda: served.keys() == served.members(), served.log)
        served.begin_a_run(waiting_run)
        served.stop()

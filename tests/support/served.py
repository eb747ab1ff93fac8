"""`cotune server start` with Flower's real programs."""

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
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cotune.errors import RunError
from cotune.flower.control_client import open_control
from cotune.server.deployment.federation import FederationFolder
from cotune.server.runs.run_folder import RunFolder

PROGRAMS = {"SuperLink": "flower-superlink", "front": "cotune.server.proxy_process", "executor": "flower-superexec"}


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
            with open_control(self.folder.superlink_address, self.folder.files.certificates.authority) as calls:
                return {node.key for node in calls.nodes()}
        except RunError:
            return set()

    def members(self) -> set[bytes]:
        return {member.key for member in self.folder.members.active()}

    def begin_a_run(self, run: RunFolder) -> psutil.Process:
        """Hands it to the executor; returns the process that plays it."""
        with open_control(self.folder.superlink_address, self.folder.files.certificates.authority) as calls:
            calls.start(run.path)
        found: list[psutil.Process] = []

        def begun() -> bool:
            found[:] = [each for each in self.descendants() if any("flwr-serverapp" in word for word in each.cmdline())]
            return bool(found)

        until(begun, self.folder.files.superlink.get_log("executor"))
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

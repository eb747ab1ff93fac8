"""What a supervisor refuses to begin with; tests/deployment has the rest, with real processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from cotune.errors import RunError
from cotune.plan.load import parse_plan
from cotune.server.deployment.creation import create_federation
from cotune.server.deployment.execution import supervisor
from cotune.server.deployment.execution.supervised_process import SupervisedProcess, running
from cotune.server.deployment.execution.supervisor import supervise
from cotune.server.deployment.federation import FederationFolder, ServerConfig
from cotune.server.deployment.keys import certificates
from tests.support.failures import fails_with


@pytest.fixture
def folder(tmp_path: Path, base_model: Callable[[str], Path]) -> FederationFolder:
    plan = parse_plan({"model": {"base": str(base_model("bert"))}, "data": {"source": "x.csv"}, "labels": ["a", "b"]})
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        port = one.getsockname()[1]
        superlink_port = other.getsockname()[1]
    config = ServerConfig(
        name="toy", hosts=("fed.example.org",), listen="127.0.0.1", port=port, superlink_port=superlink_port, device="cpu"
    )
    return create_federation(tmp_path / "fed", plan, config)


@pytest.mark.parametrize("which", ["port", "superlink_port"])
def test_port_in_use_is_named_before_starting(folder: FederationFolder, which: str) -> None:
    port = getattr(folder.config, which)
    said = list[str]()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(RunError) as error:
        supervise(folder, said.append)
    assert str(error.value) == f"port {port} of 127.0.0.1 is taken: end the program that listens there, or choose another port"
    assert list(folder.superlink.glob("*.log")) == []


def show_certificate(folder: FederationFolder, made: datetime) -> None:
    for file in folder.certificates.iterdir():
        file.unlink()
    certificates.create_authority(folder.certificates, folder.config.hosts, now=made)


def test_an_expired_certificate_is_one_sentence(folder: FederationFolder) -> None:
    show_certificate(folder, datetime.now(UTC) - timedelta(days=400))
    with fails_with("run.certificate_expired"):
        supervise(folder, print)
    assert RunError.exit_code == 1


@pytest.mark.parametrize(("days", "warned"), [(365 - 29, True), (365 - 32, False)])
def test_a_certificate_that_ends_soon_is_a_warning(folder: FederationFolder, days: int, warned: bool) -> None:
    show_certificate(folder, datetime.now(UTC) - timedelta(days=days))
    said: list[str] = []
    with socket.create_server(("127.0.0.1", folder.config.port)), fails_with("run.port_in_use"):
        supervise(folder, said.append)
    assert said[0].startswith("the certificate is valid until ")
    assert any("WARNING" in line and "`cotune server renew`" in line for line in said) == warned


def test_a_damaged_list_of_members_is_one_sentence(folder: FederationFolder) -> None:
    (folder.path / "members.json").write_text("{")
    with fails_with("run.damaged_document", "members.json"):
        supervise(folder, print)


def test_a_folder_that_cannot_be_used_is_one_sentence(folder: FederationFolder) -> None:
    folder.superlink.rmdir()
    folder.superlink.write_text("")
    with fails_with("run.not_writable", "superlink"):
        supervise(folder, print)


def test_signals_are_noted_and_their_handlers_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with supervisor._stop_signals() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_programs_are_those_of_this_python_and_say_nothing_home(folder: FederationFolder) -> None:
    environment = supervisor._build_environment(folder)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == str(folder.superlink / "flwr")
    assert (
        Path(supervisor._find_program("flower-superlink", environment)).parent
        == Path(supervisor._find_program("python", environment)).parent
    )
    with fails_with("run.program_not_installed"):
        supervisor._find_program("flower-nothing", environment)


def test_closed_terminal_does_not_prevent_shutdown(
    folder: FederationFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(line: str) -> None:
        raise BrokenPipeError

    sleeper = SupervisedProcess(
        "sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "a.log", os.environ, closed
    )
    broken = SupervisedProcess("broken", ["/nowhere"], tmp_path / "b.log", os.environ, closed)
    monkeypatch.setattr(supervisor, "_build_processes", lambda folder, say: [sleeper, broken])
    ended: list[int] = []
    real = supervisor.stop

    def stop(children: Sequence[SupervisedProcess], grace: float) -> None:
        ended.extend(process.pid for process in running(children))
        real(children, grace)

    monkeypatch.setattr(supervisor, "stop", stop)
    with fails_with("run.process_not_started", "broken"):
        supervise(folder, closed)
    (number,) = ended
    assert not psutil.pid_exists(number)

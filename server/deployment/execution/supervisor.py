"""`cotune server start`: keep Flower's SuperLink, the front and an executor for runs running until a signal stops it.

Their files are in superlink/ in the federation's folder (`layout.SuperLinkFiles`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import tomli_w

from cotune.errors import RunError
from cotune.flower.control_client import FEDERATION_VARIABLE, open_control
from cotune.server.deployment.execution.process_record import ProcessRecord, terminate_all
from cotune.server.deployment.execution.supervised_process import SupervisedProcess, running, stop
from cotune.server.deployment.federation import FederationFolder, ServerConfig, get_public_address
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.node_registration import NodeRegistration
from cotune.server.proxy.server import open_listener
from cotune.server.runs.run_folder import lock_folder
from cotune.storage.files import atomic_write

EXPIRY_WARNING_DAYS = 30  # before the certificate expires, from which on there is a warning
_POLL_SECONDS = 0.3
_GRACE_SECONDS = 10.0
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

Report = Callable[[str], None]


def supervise(folder: FederationFolder, say: Report) -> None:
    """Run the federation's processes until SIGINT, SIGTERM or SIGHUP, then end all of them.

    Args:
        folder: The federation.
        say: Called with a line for every event.

    Raises:
        RunError: If organizations would refuse the certificates, the list of members is damaged, a port is in use, another
            supervisor runs for the folder, the folder cannot be written, or a process keeps ending right after its start before
            all were ready. Once all were ready, every process is restarted forever.
    """

    def log(line: str) -> None:
        with suppress(OSError):  # a closed terminal must not prevent the processes from being ended
            say(line)

    try:
        folder.superlink.mkdir(mode=0o700, exist_ok=True)
        with lock_folder(folder.superlink), _stop_signals() as stopped:
            _supervise(folder, log, stopped)
    except OSError as error:
        raise RunError(
            f"{folder.superlink} cannot be used ({error.strerror or error}): check the permissions and the space there",
            code="run.not_writable",
        ) from None


def _supervise(folder: FederationFolder, say: Report, stopped: Callable[[], bool]) -> None:
    _report_expiry(certificates.check_certificate(folder.certificates, folder.config.hosts[0]), say)
    folder.members.all()  # a damaged list is reported now, not when the first member fails to join
    record = ProcessRecord(folder.files.superlink.processes, say)
    if left := terminate_all(record.left(), _GRACE_SECONDS):
        say(f"ended {left} processes that a killed `cotune server start` had left")
    for host, port in (("127.0.0.1", folder.config.superlink_port), (folder.config.listen, folder.config.port)):
        open_listener(host, port).close()
    _write_front_config(folder)
    for file in folder.superlink.glob(
        f"{folder.files.superlink.database.name}*"
    ):  # never compacted; whatever was in transfer is requested again
        file.unlink()
    children = _build_processes(folder, say)
    say(f"starting {folder.config.name} at {get_public_address(folder.config)}")
    try:
        with NodeRegistration(
            lambda: open_control(folder.superlink_address, folder.files.certificates.authority), folder.members.all, say
        ) as enrolment:
            ready = False
            while not stopped():
                if not ready and enrolment.ready and _is_listening(folder.config):
                    ready = True
                    say("ready: organizations can join")
                    for child in children:
                        child.restart_forever()
                for child in children:
                    if child.poll():
                        record.keep(running(children))
                record.keep(running(children))
                time.sleep(_POLL_SECONDS)
    finally:
        say("stopping")
        stop(children, _GRACE_SECONDS)
        record.keep(())


def _is_listening(config: ServerConfig) -> bool:
    """Return whether the front listens at the public port."""
    try:
        socket.create_connection((config.listen, config.port), timeout=_POLL_SECONDS).close()
    except OSError:
        return False
    return True


def _build_processes(folder: FederationFolder, say: Report) -> list[SupervisedProcess]:
    environment = _build_environment(folder)
    shown = folder.files.certificates
    superlink = [
        *(_find_program("flower-superlink", environment), "--host", "127.0.0.1", "--port", str(folder.config.superlink_port)),
        *("--ssl-ca-certfile", str(shown.authority)),
        *("--ssl-certfile", str(shown.server), "--ssl-keyfile", str(shown.server_key)),
        *("--enable-supernode-auth", "--isolation", "process", "--disable-runtime-dependency-installation"),
        *(("--database", str(folder.files.superlink.database)) if folder.config.database else ()),
    ]
    front = [sys.executable, "-m", "cotune.server.proxy_process", str(folder.files.superlink.front_config)]
    executor = [
        *(_find_program("flower-superexec", environment), "--runtime-api-address", folder.superlink_address),
        *("--root-certificates", str(shown.authority)),
    ]
    commands = {"SuperLink": superlink, "front": front, "executor": executor}
    return [
        SupervisedProcess(name, command, folder.files.superlink.get_log(name), environment, say)
        for name, command in commands.items()
    ]


def _build_environment(folder: FederationFolder) -> dict[str, str]:
    """Return an environment with this Python's programs first on the path, as Flower starts the apps of runs by name."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    return {
        **os.environ,
        **_ENVIRONMENT,
        "FLWR_HOME": str(folder.files.superlink.flower_home),
        FEDERATION_VARIABLE: str(folder.path),
        "PATH": path,
    }


def _find_program(name: str, environment: Mapping[str, str]) -> str:
    found = shutil.which(name, path=environment["PATH"])
    if found is None:
        raise RunError(
            f"{name} is not installed beside {sys.executable}: install cotune again, with its flwr",
            code="run.program_not_installed",
        )
    return found


def _write_front_config(folder: FederationFolder) -> None:
    folder.files.superlink.flower_home.mkdir(mode=0o700, exist_ok=True)
    front = {
        "certificates": str(folder.certificates),
        "members": str(folder.files.members),
        "refusals": str(folder.files.superlink.refusals),
        "superlink_port": folder.config.superlink_port,
        "host": folder.config.listen,
        "port": folder.config.port,
        "quotas": folder.config.quotas.model_dump(exclude_none=True),
    }
    atomic_write(folder.files.superlink.front_config, tomli_w.dumps(front).encode())


def _report_expiry(until: datetime, say: Report) -> None:
    left = (until - datetime.now(UTC)).days
    say(f"the certificate is valid until {until:%Y-%m-%d}")
    if left < EXPIRY_WARNING_DAYS:
        say(f"WARNING: that is in {left} days; renew it with `cotune server renew`")


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a stop signal was received. The handler only records it."""
    signals: list[int] = []

    def note(number: int, frame: object) -> None:
        signals.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

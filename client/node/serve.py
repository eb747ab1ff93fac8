"""Run the resident node of an organization until it is stopped, in one process per site.

The process locks node/lock in the site.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cotune.client.audit_log import AuditLog
from cotune.client.node.connector import Connector
from cotune.client.node.node import Node
from cotune.client.node.worker import TrainerProcess
from cotune.client.site_folder import NodePaths, SitePaths
from cotune.errors import DataError, RunError
from cotune.storage.files import exclusive_lock


def run_node(
    site: Path, address: str, *, root_certificates: Path | None = None, key: Path, stop: threading.Event | None = None
) -> None:
    """Run a node until SIGINT, SIGTERM or `stop`, whatever happens to the server.

    Args:
        site: The organization's folder.
        address: host:port of the server, or of the TLS proxy before it.
        root_certificates: A PEM file; None: those that this machine trusts.
        key: The file of the organization's private key (OpenSSH, elliptic curve), which the server has registered.
        stop: Set to stop the node; None: only signals stop it.

    Raises:
        DataError: If the folder is not a site.
        RunError: If another node serves the site, or the address, the key or the certificates cannot be used.
    """
    paths = SitePaths(site)
    if not paths.description.is_file():
        raise DataError(f"{site} is not a site: expected a folder with a site.json", code="data.not_a_site")
    _check_address(address)
    connect = Connector(site, address, root_certificates, key)
    stop = stop or threading.Event()
    with _exclusive_node(paths.node), _stopped_by_signals(stop):
        worker = TrainerProcess(site.resolve(), address)
        try:
            Node(paths.node.folder, worker, stop, AuditLog(site)).run(connect)
        finally:
            worker.stop()


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise RunError(
            f'"{address}" is not the address of a server: expected host:port, as in fed.example.org:8443',
            code="run.wrong_address",
        )


@contextmanager
def _exclusive_node(node: NodePaths) -> Iterator[None]:
    """Keep a second node off a site during the block."""
    try:
        node.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{node.folder} cannot be written ({error.strerror}): free space, or correct its permissions", code="run.not_writable"
        ) from None
    with exclusive_lock(node.lock, f"another node serves {node.folder.parent}: stop it first, or leave it to its work"):
        yield


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set `stop` during the block; a second one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def answer(*_: object) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, answer)
    try:
        yield
    finally:
        restore()

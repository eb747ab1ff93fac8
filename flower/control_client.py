"""A client of Flower's Control API, by which the coordinator registers nodes and starts runs.

The API requires no authentication, so it must be reachable only on loopback. Runs are started with a bundle that contains only
configuration; both sides run the cotune that is installed on their machines.

Every member can ask the SuperLink for a run's configuration, so it contains the run's name and no path. The processes of runs get
the federation's folder from their environment, which does not leave this machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.x509 import load_pem_x509_certificates
from flwr.app import UserConfig
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from cotune.errors import RunError
from cotune.flower.nodes import RegisteredNode

# environment variable with the federation's folder, for processes of `cotune server start`
FEDERATION_VARIABLE = "COTUNE_FEDERATION"


def get_run_name(run: Path) -> str:
    """Return the name of a run's folder in the SuperLink's configuration of the run."""
    return run.name


def find_run_folder(name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the run that a run configuration names.

    Args:
        name: The name of a run of the federation; in a simulation, the folder itself.
        environment: Of this process; it contains the federation's folder.

    Raises:
        RunError: If there is no such run.
    """
    if not name:
        raise RunError('the run configuration has no "run": expected the folder of a run', code="run.no_run_named")
    home = environment.get(FEDERATION_VARIABLE)
    if not home:
        return Path(name)
    if name in (".", "..") or Path(name).name != name:
        raise RunError(
            f"the run configuration names {name[:100]!r}: expected the name of a run of the federation",
            code="run.invalid_run_name",
        )
    return Path(home) / "runs" / name


APP = b"""
[project]
name = "cotune"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "cotune"
[tool.flwr.app.components]
serverapp = "cotune.server.app:app"
clientapp = "cotune.client.app:app"
[tool.flwr.app.config]
run = ""
"""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RunState:
    """The state of a run on the SuperLink.

    Attributes:
        status: "pending", "starting", "running" or "finished".
        outcome: Of a finished run: "completed", "failed" or "stopped".
        details: In Flower's words.
    """

    status: str
    outcome: str = ""
    details: str = ""


class ControlClient:
    """Calls of the Control API, one after the other.

    Each raises SuperLinkUnreachable if the SuperLink does not answer, and RunError if it refuses.
    """

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> tuple[RegisteredNode, ...]:
        """Return the nodes whose keys are registered."""
        found = _call(self._client.ListNodes, ListNodesRequest()).nodes_info
        return tuple(RegisteredNode.from_info(node) for node in found if node.status != "unregistered")

    def register(self, key: bytes, name: str) -> int:
        """Register a node's public key (PEM) under a name, and return the node's id."""
        return int(_call(self._client.RegisterNode, RegisterNodeRequest(public_key=key, name=name)).node_id)

    def unregister(self, node: int) -> None:
        """Remove a node, whose calls are refused from then on."""
        _call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node))

    def start(self, run: Path) -> int:
        """Submit the folder of a run to the executor, and return the run's id. Members can read what is sent here."""
        from flwr.cli.build import build_fab_from_files  # late: it loads FastAPI, and most who know a run's folder start none

        content, _ = build_fab_from_files({"pyproject.toml": APP})
        bundle = Fab(hashlib.sha256(content).hexdigest(), content, {})
        config = user_config_to_proto(UserConfig({"run": get_run_name(run)}))
        answer = _call(self._client.StartRun, StartRunRequest(fab=fab_to_proto(bundle), override_config=config))
        if not answer.HasField("run_id"):
            raise RunError(
                f"the SuperLink did not take the run ({answer.note or 'no reason given'}): see its log", code="run.not_submitted"
            )
        return int(answer.run_id)

    def stop(self, run_id: int) -> None:
        """Stop a run; its finished rounds stay in its folder."""
        _call(self._client.StopRun, StopRunRequest(run_id=run_id))

    def state(self, run_id: int) -> RunState | None:
        """Return the state of a run; None if the SuperLink does not know it, as after a restart without a database."""
        try:
            found = _call(self._client.ListRuns, ListRunsRequest(run_id=run_id)).run_dict.get(run_id)
        except _Refused as error:
            if error.status == httpx.codes.NOT_FOUND:
                return None
            raise
        return None if found is None else RunState(found.status.status, found.status.sub_status, found.status.details)

    def running(self) -> tuple[int, ...]:
        """Return the ids of the runs that are not finished."""
        runs = _call(self._client.ListRuns, ListRunsRequest()).run_dict
        return tuple(sorted(run_id for run_id, run in runs.items() if run.status.status != "finished"))


class SuperLinkUnreachable(RunError):
    """The SuperLink's port does not answer."""

    code = "run.superlink_unreachable"


class _Refused(RunError):
    code = "run.superlink_refused"

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"the SuperLink refused a request ({status}: {detail}): see its log")
        self.status = status


@contextmanager
def open_control(address: str, authority: Path) -> Iterator[ControlClient]:
    """Open a client of a SuperLink's Control API. Nothing is sent before the first call.

    Args:
        address: host:port on loopback.
        authority: File with the certificate of the federation's authority.

    Raises:
        RunError: If the file cannot be read.
    """
    try:
        certificates = authority.read_bytes()
        load_pem_x509_certificates(certificates)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no certificate"
        raise RunError(
            f"{authority} cannot be read ({reason}): expected the federation's own",
            code="run.certificate_not_readable",
        ) from None
    version = RuntimeVersionHttpInterceptor(component_name="cotune")
    with ControlHttpClient.from_server_address(address, False, certificates, interceptors=[version]) as client:
        yield ControlClient(client)


def _call(method: Callable[[Any], _Answer], request: Any) -> _Answer:
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _Refused(error.response.status_code, error.response.text[:200]) from None
    except httpx.HTTPError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise RunError(
                "another server than this federation's answers at the SuperLink's port: stop it, or choose another superlink_port"
                " in server.toml and start again",
                code="run.foreign_superlink",
            ) from None
        raise SuperLinkUnreachable(
            f"the SuperLink cannot be reached ({error}): expected one that `cotune server start` keeps running"
        ) from None
    except ValueError as error:
        raise RunError(
            f"the SuperLink's answer is not Flower's ({error}): use the flwr that cotune was installed with",
            code="run.foreign_superlink",
        ) from None

"""A federation of real processes on this machine, by cotune's own commands, and what may be killed of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import tomli_w

from cotune.client.site_setup import make_site
from cotune.data.dataset import write_manifest
from cotune.data.record_reading import read_records
from cotune.plan.load import load_plan
from cotune.plan.pinned_base import pin_base
from cotune.privacy.policy import Policy, dump_policy
from cotune.server.deployment.creation import create_federation
from cotune.server.deployment.federation import FederationFolder, ServerConfig
from cotune.server.deployment.members import read_public_key
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import Participant, Progress, RunFile, RunFolder, manifest_file
from cotune.simulations.engines import run_on
from cotune.simulations.prepare import make_site as make_simulated_site
from cotune.simulations.split import Share
from tests.support.attackers import Attacker, Deed
from tests.support.commands import Command
from tests.support.forked_serverapp import find_serverapp, write_program
from tests.support.loopback import free_port, until, write_model, write_sentences
from tests.support.processes import find_worker

_Found = TypeVar("_Found")
_PATIENCE = 420.0  # seconds for anything to happen, on a machine that does other things too


@dataclass
class Deployment:
    """`fed/`, a site for each organization, and the processes that were started, by name: server, run, and the organizations'.

    new_workers: whether training processes and ServerApps are new interpreters, as outside of tests; otherwise they are forked.
    """

    folder: Path
    organizations: tuple[str, ...]
    processes: dict[str, Command] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # organization -> of its first `client join`
    new_workers: bool = False

    @property
    def fed(self) -> Path:
        return self.folder / "fed"

    @property
    def port(self) -> int:
        """The public one."""
        return FederationFolder(self.fed).config.port

    @property
    def authority(self) -> Path:
        return self.fed / "certificates" / "ca.crt"

    @property
    def database(self) -> Path:
        return self.fed / "superlink" / "state.sqlite"

    def site(self, name: str) -> Path:
        return self.folder / name

    @property
    def programs(self) -> Path | None:
        """What the server starts in place of this Python's programs."""
        return None if self.new_workers else self.folder / "programs"

    def start(self, name: str, *words: str | Path, programs: Path | None = None) -> None:
        """A command that stays; what it prints goes to <name>.log."""
        log = self.folder / f"{name}.log"
        environ = _environment()
        self.processes[name] = Command(words, self.folder, environ, log, new_workers=self.new_workers, programs=programs)

    def start_server(self) -> None:
        before = self.log("server").count("ready")
        self.start("server", "server", "start", self.fed, programs=self.programs)
        self.wait(lambda: self.log("server").count("ready") > before)

    def join(self, name: str) -> None:
        named = ("--data", self.folder / f"{name}.csv", "--model", self.folder / "base", *self.options.get(name, ()))
        data = () if (self.site(name) / "data.json").exists() else named
        self.start(name, "client", "join", self.site(name), self.fed / "federation.toml", *data)

    def leave(self, name: str) -> None:
        """As Ctrl-C at the organization does."""
        self.processes[name].send_signal(signal.SIGTERM)
        assert self.processes[name].wait(600) == 0
        self.wait(lambda: name not in self.online())

    def attacker(self, name: str, deeds: Mapping[int, Deed]) -> Attacker:
        """In the place of a member's node, with its key."""
        return Attacker(f"localhost:{self.port}", self.authority, self.site(name) / "node.key", deeds)

    def node_of(self, name: str) -> int:
        """The number that its node has at the server."""
        return int((self.site(name) / "node" / "id").read_text(encoding="utf-8").split()[0])

    def online(self) -> set[str]:
        """By what the server has said last of each."""
        words = [line.split() for line in self.log("server").splitlines()]
        told = {line[1]: line[3] for line in words if line[2:3] == ["is"] and line[3:4] in (["online"], ["offline"])}
        return {name for name, state in told.items() if state == "online"}

    def run(self, *options: str) -> None:
        """Begins a run, or goes on with the last; returns when its folder is there."""
        before = self.runs() if "--resume" not in options else []
        self.start("run", "server", "run", self.fed, *options)
        self.wait(lambda: len(self.runs()) > len(before))

    def runs(self) -> list[Path]:
        return sorted((self.fed / "runs").glob("*/run.json"))

    def finish(self, seconds: float = 2 * _PATIENCE) -> RunFolder:
        """Waits for `server run` to end well. Raises AssertionError."""
        self.wait(lambda: self.processes["run"].poll() == 0, seconds)
        return self.newest()

    def ends_within(self, seconds: float) -> bool:
        """Whether `server run` does, however."""
        with suppress(subprocess.TimeoutExpired):
            self.processes["run"].wait(seconds)
        return self.processes["run"].poll() is not None

    def newest(self) -> RunFolder:
        return RunFolder(self.runs()[-1].parent)

    def wait(self, condition: Callable[[], _Found], seconds: float = _PATIENCE) -> _Found:
        """What the condition gives once it is true. Raises AssertionError, with what everybody has said, where it does not come
        true, or `server run` has failed meanwhile.
        """

        def met() -> _Found:
            found = condition()
            assert found or not self._failed(), f"`server run` has failed\n{self.said()}"
            return found

        try:
            return until(met, seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def _failed(self) -> bool:
        """Not where it was killed."""
        return "run" in self.processes and (self.processes["run"].poll() or 0) > 0

    def said(self, lines: int = 15) -> str:
        """The last lines of all logs and events: what somebody who cannot come here needs to see."""
        codes = {name: process.poll() for name, process in self.processes.items()}
        states = [f"{name}: {'runs' if code is None else f'has ended with {code}'}" for name, code in codes.items()]
        files = sorted(file for file in self.folder.rglob("*") if file.name.endswith((".log", ".log.1", "events.jsonl")))
        return "\n".join([*states, *(f"--- {file}\n{_last_lines(file, lines)}" for file in files)])

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Of the newest run."""
        file = self.runs()[-1].parent / "events.jsonl"
        return [event for event in (read_events(file) if file.exists() else []) if not names or event["event"] in names]

    def reached(self, event: str, round: int) -> Callable[[], bool]:
        return lambda: any(each.get("round", 0) >= round for each in self.events(event))

    def log(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    # --- what may be killed

    def find(self, what: str) -> psutil.Process:
        """A process by what it does: server, run, superlink, superexec, front, serverapp, an organization, or trainer:<organization>."""
        if what in self.processes:
            return psutil.Process(self.processes[what].pid)
        if what.startswith("trainer:"):
            node = self.processes[what.removeprefix("trainer:")].pid
            return _below(node, "spawn_main") if self.new_workers else find_worker(node, self.folder)
        words = {"superlink": "flower-superlink", "superexec": "flower-superexec", "front": "cotune.server.proxy_process"}
        if what == "serverapp" and self.programs is not None:
            return find_serverapp(self.programs)
        words["serverapp"] = "flwr-serverapp"
        return _below(self.processes["server"].pid, words[what])

    def kill(self, what: str) -> None:
        process = self.wait(lambda: self.get_running(what))
        process.kill()
        if what in self.processes:
            self.processes[what].wait()
        until(lambda: not _runs(process))

    def get_running(self, what: str) -> psutil.Process | None:
        with suppress(LookupError, psutil.NoSuchProcess):
            return self.find(what)
        return None

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(600)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_lines(file: Path, lines: int) -> str:
    return "\n".join(line[:400] for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _below(pid: int, words: str) -> psutil.Process:
    """Raises LookupError."""
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if words in " ".join(process.cmdline()) and _runs(process):
                return process
    raise LookupError(words)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


@contextmanager
def deployment(
    folder: Path,
    *organizations: str,
    plan: dict[str, Any] | None = None,
    database: bool = True,
    absent: tuple[str, ...] = (),
    write: Callable[[Path, int], object] = write_sentences,
    options: Mapping[str, tuple[str, ...]] | None = None,
    server_base: Path | None = None,
    new_workers: bool = False,
) -> Iterator[Deployment]:
    """A federation that is set up, its server started and its organizations joined. plan: tables over the default's. absent:
    members beside them that have a site and join nothing. write: makes a file of records from a seed. options: organization -> further ones of its first
    `client join`. server_base: the server's copy of the base model, without weights; it has no test set then.
    """
    made = Deployment(folder, organizations, options=options or {}, new_workers=new_workers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.toml").write_text(tomli_w.dumps(_plan(folder, plan or {})), encoding="utf-8")
    for number, name in enumerate((*organizations, "test")):
        write(folder / f"{name}.csv", number)
    config = ServerConfig(
        name="faults",
        hosts=("localhost",),
        port=free_port(),
        superlink_port=free_port(),
        database=database,
        test=folder / "test.csv" if server_base is None else None,
        base=server_base,
    )
    if server_base is not None:
        pinned = pin_base(str(folder / "plan.toml"))
        (folder / "plan.toml").write_text(pinned, encoding="utf-8")
    federation = create_federation(made.fed, load_plan(folder / "plan.toml"), config)
    for name in (*organizations, *absent):
        make_site(made.site(name), name, device="cpu")
        federation.members.invite(name, read_public_key(made.site(name) / "node.pub"))
        _allow(made.site(name) / "policy.toml")
    if made.programs is not None:
        write_program(made.programs)
    try:
        made.start_server()
        for name in organizations:
            made.join(name)
        made.wait(lambda: made.online() == set(organizations))
        yield made
    finally:
        made.stop()


def _allow(policy: Path) -> None:
    """Everything."""
    policy.write_text(dump_policy(Policy.permissive()), encoding="utf-8")


def _plan(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "rounds": 3,
        "labels": ["bad", "good"],
        "privacy": "none",
        "model": {"base": str(write_model(folder / "base")), "max_length": 16, "pooling": "mean"},
        "data": {"source": "records.csv"},
        "local": {"learning_rate": 1.0, "batch_size": 0.5, "steps": 2},
        "server": {"quorum": 1.0, "absent_seconds": 120.0, "deadline_seconds": 240.0},
    }
    for key, value in changes.items():
        plan[key] = {**plan[key], **value} if isinstance(value, dict) and isinstance(plan.get(key), dict) else value
    return plan


def weights(progress: Progress) -> dict[str, bytes]:
    """A run's model, bit by bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in progress.state.items()}


def play_in_process(fed: Deployment, rounds: int) -> dict[str, bytes]:
    """The model that the federation's plan makes of its records when it is simulated in this process, where nothing goes wrong."""
    federation = FederationFolder(fed.fed)
    agreed = federation.plan.model
    plan = federation.plan.model_copy(
        update={"rounds": rounds, "model": agreed.model_copy(update={"base": str(federation.config.base)})}
    )
    path = fed.folder / "in-process"
    files = {name: fed.folder / f"{name}.csv" for name in (*fed.organizations, "test")}
    rows = {name: np.arange(len(read_records(plan.data, file, plan.task))) for name, file in files.items()}
    for name in fed.organizations:
        make_simulated_site(path / "sites" / name, name, plan, [Share(name, files[name], rows[name], len(rows[name]))], "cpu")
    held_out = manifest_file(path, "validation")  # by which a simulation accepts a round, as a coordinator does by the test set
    write_manifest(held_out, plan.data, [(files["test"], rows["test"])], plan.task)
    people = tuple(Participant(name=name, site=f"sites/{name}") for name in fed.organizations)
    file = RunFile(run="in-process", created="", engine="in-process", device="cpu", participants=people)
    run = RunFolder.create(path, plan, file)
    run_on("in-process", run)
    return weights(run.load())


def bring_back(fed: Deployment, what: str) -> None:
    """By the same command again; what `server start` supervises comes back by itself."""
    if what == "server":
        fed.start_server()
    elif what == "run":
        fed.run("--resume")
    elif what in fed.organizations:
        fed.join(what)

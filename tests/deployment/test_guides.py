"""docs/coordinate.md, docs/join.md, README.md and the JOIN.md of a federation, followed word by word by a coordinator and three organizations.

Each has a folder of its own and types what its page says, in the order of the page: hospital-a reads docs/join.md, hospital-b
JOIN.md, hospital-c README.md. What only they can know stands for placeholders: names, the address, the hash that `check` shows.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
import tomli_w

from tests.support.console import Cotune, _logging_as_it_was, cotune, folder
from tests.support.datasets import sentences
from tests.support.loopback import free_port, until
from tests.support.pages import blocks_of, commands_of, spoken_in

__all__ = ["_logging_as_it_was", "cotune", "folder"]  # fixtures

_PATIENCE = 420.0


class Guide:
    """The commands of a page, in order; each is taken once, and at the end none is left."""

    def __init__(self, commands: list[str]) -> None:
        self.left = commands

    def take(self, beginning: str) -> str:
        """Raises AssertionError where the page does not say so."""
        found = next((command for command in self.left if command.startswith(beginning)), None)
        assert found is not None, f"no `{beginning} …` among {self.left}"
        self.left.remove(found)
        return found


def guide_to(page: str, *beginnings: str, text: str | None = None) -> Guide:
    blocks = [block for block in blocks_of(page, text) if block.language == "bash" and block.reason is None]
    commands = [command for block in blocks for command in commands_of(block)]
    return Guide([command for command in commands if not beginnings or command.startswith(beginnings)])


@dataclass
class Office:
    """A folder of somebody's own, and the processes that were left running there, by what begins their commands."""

    cotune: Cotune  # the command line in this process
    folder: Path
    guide: Guide
    replaced: dict[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def do(self, command: str, code: int = 0) -> str:
        """What a command prints. Raises AssertionError for another exit code."""
        words = shlex.split(self._filled(command))
        with chdir(self.folder):
            done = self.cotune(*words[1:])
        assert done.code == code, f"{command}\n{done.out}{done.err}"
        return done.out

    def follow(self, beginning: str, code: int = 0) -> str:
        return self.do(self.guide.take(beginning), code)

    def leave_running(self, beginning: str) -> None:
        with self._log(beginning).open("ab") as log:
            words = shlex.split(self._filled(self.guide.take(beginning)))
            self.running[beginning] = subprocess.Popen(
                [sys.executable, "-m", "cotune.cli.main", *words[1:]],
                cwd=self.folder,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, beginning: str, pattern: str) -> None:
        def said() -> bool:
            text = self._log(beginning).read_text(encoding="utf-8")
            assert self.running[beginning].poll() is None, text
            return re.search(pattern, text, re.MULTILINE) is not None

        until(said, _PATIENCE)

    def stop(self) -> list[int]:
        """As Ctrl-C does; the exit codes."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        return [process.wait(600) for process in self.running.values()]

    def _log(self, beginning: str) -> Path:
        return self.folder / f"{beginning.replace(' ', '-')}.log"

    def _filled(self, command: str) -> str:
        for pattern, what in self.replaced.items():
            command = re.sub(pattern, what, command)
        return command


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "300"}


def write_patients(file: Path, seed: int, count: int = 700) -> None:
    """A sentence of each patient."""
    rows = [(text, label, f"patient {seed}-{i}") for i, (text, label) in enumerate(sentences(count, seed))]
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label", "patient_id"), *rows])


def write_plan(file: Path, base: Path) -> None:
    plan = {
        "name": "guide",
        "rounds": 2,
        "labels": ["bad", "good", "so"],
        "model": {"base": str(base), "max_length": 16, "pooling": "mean"},
        "data": {"source": "records.csv"},
        "local": {"learning_rate": 1.0, "batch_size": 0.2, "steps": 5},
        "privacy": {"epsilon": 3.0, "unit": "patient_id", "max_records": 2},
    }
    file.write_text(tomli_w.dumps(plan), encoding="utf-8")


@pytest.fixture
def coordinator(tmp_path: Path, cotune: Cotune, base_model: Callable[[str], Path]) -> Iterator[Office]:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    write_plan(folder / "my.toml", base_model("bert"))
    write_patients(folder / "test.csv", 9, 200)
    ports = f"--host localhost --port {free_port()} --superlink-port {free_port()}"
    office = Office(cotune, folder, guide_to("docs/coordinate.md"), {"--host fed.example.org": ports})
    yield office
    office.stop()


@pytest.fixture
def organizations(tmp_path: Path, cotune: Cotune, base_model: Callable[[str], Path]) -> Iterator[dict[str, Office]]:
    """hospital-b gets its guide from the coordinator. Each has the base model in a folder, which the plan only names."""
    guides = {"hospital-a": guide_to("docs/join.md"), "hospital-b": Guide([])}
    guides["hospital-c"] = guide_to(
        "README.md", "cotune client init", "cotune client check site-a", "cotune client policy site-a", "cotune client join"
    )
    made = {}
    for seed, (name, guide) in enumerate(guides.items()):
        here = {"--name hospital-a": f"--name {name}", r"--data records\.csv": f"--data records.csv --model {base_model('bert')}"}
        made[name] = Office(cotune, tmp_path / name, guide, here)
        made[name].folder.mkdir()
        write_patients(made[name].folder / "records.csv", seed)
    yield made
    for office in made.values():
        office.stop()


def allow(office: Office, said: str) -> None:
    """What `check` says: each command that would allow a rule."""
    for command in re.findall(r"to allow it: (cotune .+)", said):
        office.do(command)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_coordinator_and_three_organizations_follow_docs(coordinator: Office, organizations: dict[str, Office]) -> None:
    coordinator.follow("cotune plan check")
    coordinator.follow("cotune server init")
    coordinator.leave_running("cotune server start")
    coordinator.wait_for("cotune server start", "ready")
    found(coordinator, organizations)
    invite = coordinator.guide.take("cotune server invite")
    for name, office in organizations.items():
        office.follow("cotune client init")
        shutil.copy(next(office.folder.glob("site*/node.pub")), coordinator.folder / "node.pub")
        coordinator.do(invite.replace("hospital-a", name))
    for name in organizations:
        coordinator.wait_for("cotune server start", f"{name} may join")
    prepare_by_join(organizations["hospital-a"])
    prepare_by_page_of_federation(organizations["hospital-b"])
    prepare_by_readme(organizations["hospital-c"])
    for office in organizations.values():
        office.leave_running("cotune client join")
    for office in organizations.values():
        office.wait_for("cotune client join", r":\d\d connected$")
    assert coordinator.follow("cotune server status").count("online") == 3
    assert "3 of 3 organizations are in this model" in coordinator.follow("cotune server run")
    for office in organizations.values():
        office.wait_for("cotune client join", "the finished model is in")
    afterwards(coordinator, organizations)
    assert [office.guide.left for office in (coordinator, *organizations.values())] == [[], [], [], []]


def found(coordinator: Office, organizations: dict[str, Office]) -> None:
    """What the coordinator gives to everybody."""
    for office in organizations.values():
        shutil.copy(coordinator.folder / "fed" / "federation.toml", office.folder)
    page = (coordinator.folder / "fed" / "JOIN.md").read_text(encoding="utf-8")
    guide = organizations["hospital-b"].guide = guide_to("JOIN.md", text=page)
    wheel = f"./cotune-{version('cotune')}-py3-none-any.whl"
    assert guide.take("pip install") == f"pip install {wheel}"  # cotune is installed here


def prepare_by_join(office: Office) -> None:
    check = office.guide.take("cotune client check")
    declined = office.do(check, code=1)
    hashes = re.findall(r'training\.base_models=\["(\w+)"\]', declined)
    office.replaced["<hash>"] = hashes[0]
    office.follow("cotune client policy")
    office.do(check)


def prepare_by_page_of_federation(office: Office) -> None:
    check = office.guide.take("cotune client check")
    allow(office, office.do(check, code=1))
    office.do(check)


def prepare_by_readme(office: Office) -> None:
    """Its plan promises to records, and this one to patients: `check` says so."""
    check = office.guide.take("cotune client check")
    declined = office.do(check, code=1)
    office.replaced["<hash>"] = re.findall(r'training\.base_models=\["(\w+)"\]', declined)[0]
    office.follow("cotune client policy")
    allow(office, office.do(check, code=1))
    office.do(check)


def afterwards(coordinator: Office, organizations: dict[str, Office]) -> None:
    """What the pages offer once there is a model; the commands in their sentences, too."""
    first, second, _ = organizations.values()
    assert "ε" in first.follow("cotune client ledger")
    for command in ("cotune client sent", "cotune client ledger"):
        second.follow(command)
    second.guide.take("cotune client approve")  # nothing waits for it
    spoken = Guide([shlex.join(words) for page in ("docs/join.md", "docs/coordinate.md") for words in spoken_in(page)])
    first.do(spoken.take("cotune client sent site --verify"))
    shutil.copy(first.folder / "site" / "audit.jsonl", coordinator.folder)
    [played] = (coordinator.folder / "fed" / "runs").glob("*/run.json")
    coordinator.replaced["'?fed/runs/<run>'?"] = str(played.parent)
    coordinator.do(spoken.take("cotune server verify-trail"))
    assert first.stop() == [0]
    first.do(spoken.take("cotune client renew-key site"))
    shutil.copy(first.folder / "site" / "node-renewal.json", coordinator.folder)
    coordinator.do(spoken.take("cotune server accept-key"))
    coordinator.do("cotune server renew-keys fed")
    shutil.copy(coordinator.folder / "fed" / "server-renewals.jsonl", first.folder)
    first.do(spoken.take("cotune client trust"))
    switch = spoken.take("cotune server renew-keys fed --switch")
    coordinator.do(switch, code=1)  # nobody has answered since, as hospital-a got the file by hand
    coordinator.do(f"{switch} --anyway")
    assert "hospital-a" in coordinator.do(spoken.take("cotune server list"))
    coordinator.do(spoken.take("cotune server revoke"))


def test_readme_and_the_page_for_coordinators_say_the_same() -> None:
    """So that README.md's commands are played with those of docs/coordinate.md."""

    def plain(command: str) -> str:
        return re.sub(r" --examples \S+", "", command.replace("my.toml", "plan.toml"))

    on_page = [plain(command) for command in guide_to("docs/coordinate.md", "cotune server").left]
    assert set(guide_to("README.md", "cotune server").left) == set(on_page)

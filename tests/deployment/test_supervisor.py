"""`cotune server start` with Flower's real programs: what it keeps running, for whom, and what is left of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.errors import RunError
from cotune.plan.load import parse_plan
from cotune.server.deployment.creation import create_federation
from cotune.server.deployment.execution.supervisor import supervise
from cotune.server.deployment.federation import FederationFolder, ServerConfig, write_config
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder
from tests.support.served import PROGRAMS, free_port, public_key, runs, serving, until

pytestmark = pytest.mark.long


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


def test_federation_survives_member_changes_and_kills(folder: FederationFolder, waiting_run: RunFolder) -> None:
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


def test_superlink_in_memory_is_resubmitted_and_run_ends(folder: FederationFolder, waiting_run: RunFolder) -> None:
    write_config(folder.path, folder.config.model_copy(update={"database": False}))
    folder.members.invite("hospital-c", public_key())
    with serving(FederationFolder(folder.path)) as served:
        assert served.keys() == served.members() != set()
        served.kill("SuperLink")
        until(lambda: served.keys() == served.members(), served.log)
        served.begin_a_run(waiting_run)
        served.stop()

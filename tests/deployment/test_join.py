"""One organization with the commands that it types, and a real SuperLink: from its first look to leaving."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.client.audit_log import AuditLog
from cotune.client.site import Site
from cotune.protocol.federation_file import Invitation
from cotune.server.deployment.federation import FederationFolder, ServerConfig, write_config
from cotune.server.deployment.keys.signing import create_signing_key, public_hex, read_signing_key
from cotune.server.deployment.members import read_public_key
from cotune.server.runs.run_folder import Participant, RunFolder
from tests.support.console import Cotune, _logging_as_it_was, cotune, folder
from tests.support.loopback import Federation, federation, prepare_run, until

__all__ = ["_logging_as_it_was", "cotune", "folder"]  # fixtures


ALLOWED = ("training.min_examples=0", "training.min_batch=0", "training.record_privacy=false")


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation") / "loopback", 0) as made:
        yield made


def test_an_organization_joins_trains_and_leaves(
    fed: Federation, cotune: Cotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")

    def client(*words: str | Path, code: int = 0) -> str:
        done = cotune("client", *words)
        assert done.code == code, done.out + done.err
        return done.out

    first, second = (prepare_run(tmp_path / name / f"run-{name}", 1, rounds=2) for name in ("a", "b"))
    site = tmp_path / "site"
    authority = (fed.certificates / "ca.crt").read_text(encoding="ascii")
    document = tmp_path / "federation.toml"
    client("init", site, "--name", first.file.participants[0].name, "--device", "cpu")
    home = signing(tmp_path / "fed", site)
    about = {"id": home.config.id, "signing_key": public_hex(read_signing_key(home.certificates))}
    document.write_text(Invitation("tests", fed.address, authority, first.plan, **about).to_toml(), encoding="utf-8")
    first, second = (in_federation(run, home) for run in (first, second))
    bases = [run.plan.model.base_hash for run in (first, second)]
    rules = (*ALLOWED, f"training.base_models={json.dumps(bases)}")
    client("policy", site, *(word for rule in rules for word in ("--set", rule)))

    records = tmp_path / "a" / "sentences.csv"
    assert "its key is not registered" in client("check", site, document, "--data", records, code=1)
    fed.keys[:] = [site / "node"]
    fed.register()
    shown = client("check", site, document)
    assert "the server lets this organization in; the server's certificate is good for 364 days" in shown

    log = fed.folder / "join.log"
    node = fed.start_command("join", "client", "join", site, document)
    until(lambda: bool(re.search(r":\d\d connected$", log.read_text(encoding="utf-8"), re.MULTILINE)))
    assert "the node of this site is connected" in client("check", site, document)
    fed.submit(first.path)
    until(lambda: first.finished)
    assert [entry["participants"] for entry in first.load().history] == [[first.file.participants[0].name]] * 2

    assert second.plan.plan_id != first.plan.plan_id
    fed.submit(second.path)  # a plan that nobody here has approved
    until(lambda: "cotune client approve" in log.read_text(encoding="utf-8"))
    assert not sent(site, "update")[2:]
    client("approve", site, "--yes")
    until(lambda: second.finished)  # it had waited, and asked again
    assert any(entry["plan_id"] == second.plan.plan_id for entry in sent(site, "update"))

    node.send_signal(signal.SIGTERM)
    assert node.wait(600) == 0
    assert fed.online() == 0
    assert [entry["round"] for entry in sent(site, "update")][:2] == [1, 2]
    assert all(entry["server"] == fed.address for entry in sent(site, "update"))
    assert sent(site, "refusal")[0]["said"] == "declined: its rule training.approval does not allow this plan"
    assert not site.stat().st_mode & 0o077
    inside = [path for path in site.rglob("*") if path.is_file() and "models" not in path.parts]  # models may be served by others
    assert not any(path.stat().st_mode & 0o077 for path in inside)


def signing(folder: Path, site: Path) -> FederationFolder:
    """A federation with a signing key whose one member is the site's organization."""
    write_config(folder, ServerConfig(name="tests", id=32 * "a", hosts=("localhost",)))
    home = FederationFolder(folder)
    create_signing_key(home.certificates)
    home.members.invite(Site(site).organization, read_public_key(site / "node.pub"))
    return home


def in_federation(run: RunFolder, home: FederationFolder) -> RunFolder:
    """The same run, as one of the federation."""
    people = tuple(Participant(name=who.name) for who in run.file.participants)
    file = run.file.model_copy(update={"participants": people, "federation": str(home.path)})
    return RunFolder.create(home.path / "runs" / run.path.name, run.plan, file)


def sent(site: Path, what: str) -> list[dict[str, Any]]:
    return [entry for entry in AuditLog(site).entries() if entry["what"] == what]

"""All keys of a federation are renewed while it works, between real processes: nobody is invited again, and no run is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cotune.client.audit_log import AuditLog
from cotune.client.node.keys import renew_key
from cotune.client.site import Site
from cotune.protocol.key_renewal import read_node_renewal
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.keys import key_rotation as rotation
from tests.support.deployment import Deployment, deployment

pytestmark = pytest.mark.long

PATIENT = {"deadline_seconds": 1200.0}


def cotune(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotune.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def everybody(history: tuple[Mapping[str, Any], ...]) -> bool:
    return [sorted(entry["participants"]) for entry in history] == [["north", "south"]] * 3


def agree(fed: Deployment) -> None:
    """Both ends of every trail, over all renewals."""
    for name in fed.organizations:
        for run in fed.runs():
            verified = cotune("server", "verify-trail", run.parent, "--site-log", fed.site(name) / "audit.jsonl")
            assert verified.returncode == 0, verified.stdout + verified.stderr
            sent = cotune("client", "sent", fed.site(name), "--trail", run.parent / "trail.jsonl")
            assert sent.returncode == 0, sent.stdout + sent.stderr


def test_every_key_is_renewed_during_a_run(tmp_path: Path) -> None:
    """north's while it trains, which goes on; then the federation's own, which both learn, and the server's certificate."""
    with deployment(tmp_path, "north", "south", plan={"rounds": 3, "privacy": "none", "server": PATIENT}) as fed:
        fed.run()
        fed.wait(fed.reached("round_finished", 1))
        trainer = fed.find("trainer:north")
        trainer.send_signal(signal.SIGSTOP)
        old = (tmp_path / "north" / "node.pub").read_text()
        federation = FederationFolder(fed.fed)
        statement, _ = renew_key(Site(fed.site("north")))
        federation.members.renew(read_node_renewal(statement), federation.config.id)
        fed.wait(lambda: (tmp_path / "north" / "node.pub").read_text() != old)
        rotation.announce_keys(federation)
        assert rotation.list_members_without_keys(federation) == ["north", "south"]
        trainer.send_signal(signal.SIGCONT)
        assert everybody(fed.finish().load().history)
        assert trainer.is_running()  # it was not restarted for the new key
        agree(fed)

        switched = cotune("server", "renew-keys", fed.fed, "--switch")
        assert switched.returncode == 0, switched.stderr
        server = fed.processes.pop("server")
        server.send_signal(signal.SIGTERM)
        server.wait(600)
        fed.start_server()
        fed.wait(lambda: fed.online() == {"north", "south"})
        fed.run()
        assert everybody(fed.finish().load().history)
        agree(fed)
        for name in fed.organizations:
            entries = AuditLog(fed.site(name)).entries()
            assert [entry["what"] for entry in entries].count("keys") == 1
            assert len({entry["key"] for entry in entries if entry["what"] == "request"}) == 2
            trust = json.loads((fed.site(name) / "node" / "trust.json").read_text())
            assert [each["until"] is None for each in trust["generations"]] == [False, True]

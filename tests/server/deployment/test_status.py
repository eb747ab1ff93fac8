"""Where a federation stands, from what is on disk and who is connected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest

from cotune.errors import RunError
from cotune.flower.control_client import ControlClient
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.keys.certificates import check_certificate
from cotune.server.deployment.new_run import create_run
from cotune.server.deployment.status import OrganizationStatus, Status, look, read_connections
from cotune.server.runs.run_folder import Progress, RunFolder
from tests.support.events import make_event
from tests.support.federations import FakeSuperLink, founded


@pytest.fixture
def federation(tmp_path: Path, base_model: Callable[[str], Path]) -> FederationFolder:
    return founded(tmp_path / "fed", base_model("bert"), "a", "b", "c", privacy={"epsilon": 8.0})


def metrics(accuracy: float) -> dict[str, float]:
    return {"accuracy": accuracy, "precision": 0.5, "recall": 0.5, "f1": 0.5}


def finish(run: RunFolder, round: int, **entry: Any) -> None:
    """A round as the coordinator writes it: checkpoint, then event."""
    before = run.load()
    whole = {"round": round, "stage": "head", "metrics": None, "epsilon": {}, "participants": [], "dropped": [], **entry}
    run.save(Progress(round, {}, {}, (*before.history, whole)))
    run.events.write(make_event("round_finished", **whole))


def of(status: Status, name: str) -> OrganizationStatus:
    return next(organization for organization in status.organizations if organization.name == name)


def test_status_before_a_run_has_members_and_certificate(federation: FederationFolder) -> None:
    federation.members.revoke("b")
    status = look(federation, None)
    assert (status.federation, status.server_reachable, status.run) == ("toy", False, None)
    assert status.certificate_expires is not None
    assert datetime.fromisoformat(status.certificate_expires) == check_certificate(federation.certificates, "127.0.0.1")
    assert [(o.name, o.connection, o.word, o.last_round) for o in status.organizations] == [
        ("a", "unknown", "not in a run yet", 0),
        ("b", "unknown", "revoked", 0),
        ("c", "unknown", "not in a run yet", 0),
    ]


def test_who_is_connected_is_known_by_key(federation: FederationFolder) -> None:
    a, b, c = federation.members.all()
    federation.members.revoke("c")
    superlink = cast(ControlClient, FakeSuperLink(online=(b.key, c.key, b"a stranger's")))
    assert read_connections(federation.members.all(), superlink) == {"a": "offline", "b": "online"}
    status = look(federation, read_connections(federation.members.all(), superlink))
    assert status.server_reachable
    assert [o.connection for o in status.organizations] == ["offline", "online", "offline"]
    assert a.key != b.key


def test_a_superlink_that_is_away_leaves_connections_unknown(federation: FederationFolder) -> None:
    class Away(FakeSuperLink):
        def nodes(self) -> Any:
            raise RunError("away")

    assert read_connections(federation.members.all(), cast(ControlClient, Away())) is None


def test_the_last_word_of_each_organization(federation: FederationFolder) -> None:
    run = create_run(federation)

    def log(name: str, **fields: Any) -> None:
        run.events.write(make_event(name, **fields))

    assert [o.word for o in look(federation, None).organizations] == ["not asked yet"] * 3
    log("run_started", rounds=2)
    log("round_started", round=1, organizations=["a", "b", "c"])
    log("update_received", round=1, organization="a", bytes=600, steps=3, epsilon=1.234)
    log("update_quarantined", round=1, organization="b", reason="its norm is 7e9", file="b.safetensors")
    log("update_dropped", round=1, organization="b", reason="refused: its norm is 7e9")
    status = look(federation, None)
    assert [o.word for o in status.organizations] == [
        "answered in round 1",
        "dropped in round 1: refused: its norm is 7e9",
        "asked in round 1",
    ]
    assert of(status, "a").bytes_up == 600
    finish(run, 1, participants=["a"], epsilon={"a": 1.231}, metrics=metrics(0.5))
    log("round_started", round=2, organizations=["a", "c"])
    log("update_dropped", round=2, organization="c", reason="declined: its rule privacy does not allow this plan")
    status = look(federation, None)
    assert [(o.word, o.last_round, o.epsilon) for o in status.organizations] == [
        ("asked in round 2", 1, 1.24),
        ("dropped in round 1: refused: its norm is 7e9", 0, None),
        ("dropped in round 2: declined: its rule privacy does not allow this plan", 0, None),
    ]


def test_left_out_and_delivered_are_last_words(federation: FederationFolder) -> None:
    run = create_run(federation, ["server.strikes=1"])
    finish(run, 1, participants=["a", "b"], quarantined=["c"])
    (run.path / "delivered.json").write_text(json.dumps({"a": "2026-01-01T00:00:00+00:00"}))
    words = [o.word for o in look(federation, None).organizations]
    assert words == ["has the finished model", "not asked yet", "left out after refused updates or time-outs"]


def test_a_run_that_nobody_plays_is_interrupted(federation: FederationFolder) -> None:
    run = create_run(federation)
    run.events.write(make_event("run_started", rounds=2))
    for event, phase in (("waiting", "interrupted"), ("run_finalized", "finished")):
        run.events.write(make_event(event))
        status = look(federation, {}, plays=False).run
        assert status is not None
        assert status.phase.startswith(phase)


def test_member_without_updates_is_shown_as_such(federation: FederationFolder) -> None:
    run = create_run(federation)
    run.events.write(
        make_event("update_dropped", round=1, organization="a", reason="declined: its rule privacy does not allow this plan")
    )
    finish(run, 1, participants=["b", "c"])
    (run.path / "delivered.json").write_text(json.dumps({"a": "2026-01-01T00:00:00+00:00"}))
    declined = "dropped in round 1: declined: its rule privacy does not allow this plan"
    assert of(look(federation, None), "a").word == f"{declined}; has the finished model"


def test_the_run_is_as_far_as_its_checkpoints_and_its_events_say(federation: FederationFolder) -> None:
    run = create_run(federation, name="one")

    def stands() -> tuple[int, str, float | None, str | None]:
        found = look(federation, None).run
        assert found is not None
        return found.round, found.phase, found.accuracy, found.reason

    assert stands() == (0, "not begun", None, None)
    run.events.write(make_event("run_started", rounds=2))
    run.events.write(make_event("waiting", connected=["a"], needed=2, absent=["b", "c"]))
    assert stands() == (0, "waiting for organizations", None, None)
    run.events.write(make_event("round_started", round=1, organizations=["a"]))
    finish(run, 1, metrics=metrics(0.75))
    assert stands() == (1, "under way", 0.75, None)
    run.events.write(make_event("run_failed", round=2, reason="too few"))
    assert stands() == (1, "failed", 0.75, "too few")
    run.events.write(make_event("run_started", rounds=2))
    finish(run, 2)
    run.events.write(make_event("run_finished", rounds=2))
    assert stands() == (2, "handing out the model", 0.75, None)
    run.events.write(make_event("run_finalized"))
    assert stands() == (2, "finished", 0.75, None)
    found = look(federation, None).run
    assert found is not None
    assert (found.run, found.rounds, found.last_event) == ("one", 2, "run_finalized")


def test_durable_round_counts_though_its_event_was_lost(federation: FederationFolder) -> None:
    run = create_run(federation)
    finish(run, 1, participants=["a"])
    run.events.path.unlink()
    status = look(federation, None)
    assert status.run is not None
    assert (status.run.round, of(status, "a").last_round) == (1, 1)


def test_a_certificate_that_nobody_would_accept_is_a_problem(federation: FederationFolder) -> None:
    (federation.certificates / "server.crt").unlink()
    status = look(federation, None)
    assert status.certificate_expires is None
    assert "server.crt" in str(status.certificate_problem)


def test_it_is_plain_json(federation: FederationFolder) -> None:
    create_run(federation)
    assert json.loads(json.dumps(asdict(look(federation, None))))["organizations"][0]["name"] == "a"

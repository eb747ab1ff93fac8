"""The finished model is handed to everybody who may have it, and who has confirmed is known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from cotune.errors import RunError
from cotune.flower.chunks import TooLarge
from cotune.protocol.messages import Receipt, Request, received_digest
from cotune.server import app as server_app
from cotune.server.app import main
from cotune.server.deployment.federation import FederationFolder
from cotune.server.runs.deliveries import read_deliveries
from cotune.server.runs.run_folder import RunFolder
from tests.support.delivery import deliver, finished, receipt, receiving
from tests.support.failures import fails_with
from tests.support.organizations import adding
from tests.support.rounds import IMPATIENT, NAMES, play, wrong_shape
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import WildGrid, real, told, wild


def test_everybody_gets_the_served_model_of_the_last_round_once(new_run: NewRun) -> None:
    folder = finished(new_run)
    seen = list[Request]()
    assert deliver(receiving(folder, seen), folder) == []
    assert sorted(request.organization for request in seen) == list(NAMES)
    for request in seen:
        assert (request.round, request.plan, request.admitted) == (2, folder.plan.canonical(), 2)
        assert received_digest(request.state) == received_digest(folder.load().state)
    assert sorted(read_deliveries(folder)) == list(NAMES)
    assert sorted(event["organization"] for event in told(folder, "delivered")) == list(NAMES)
    seen.clear()
    assert deliver(receiving(folder, seen), folder) == []
    assert seen == []


def test_anyone_who_was_away_gets_it_when_the_run_is_continued(new_run: NewRun) -> None:
    folder = finished(new_run)
    seen = list[Request]()
    grid = receiving(folder)
    grid.offline = {"org-2"}
    assert deliver(grid, folder) == ["org-2"]
    assert told(folder, "delivery_failed") == [
        {"event": "delivery_failed", "organization": "org-2", "reason": "it was not connected"}
    ]
    assert deliver(receiving(folder, seen), folder) == []
    assert [request.organization for request in seen] == ["org-2"]
    assert sorted(read_deliveries(folder)) == list(NAMES)


def test_a_receipt_that_is_too_large_is_none(new_run: NewRun) -> None:
    folder = finished(new_run)
    grid = receiving(folder)
    grid.unfit["org-2"] = TooLarge("it has more than 1,048,576 bytes, the most that were expected")
    assert deliver(grid, folder) == ["org-2"]
    [event] = told(folder, "delivery_failed")
    assert event["reason"] == "it has more than 1,048,576 bytes, the most that were expected"


def test_anyone_who_reconnects_is_handed_it_again(new_run: NewRun) -> None:
    """The request may be lost, as Flower hands each over once; or an answer, as it was cut off."""
    folder = finished(new_run)
    grid = receiving(folder)
    grid.swallowed["org-2"] = 1

    def reconnects(name: str, message: Message) -> None:
        grid.since[name] = str(grid.pushed[name])

    grid.on_push = reconnects
    grid.delay["org-2"] = 0.5
    assert deliver(grid, folder, replace(IMPATIENT, export=5.0)) == []
    assert grid.pushed["org-2"] > 1
    assert max(grid.pushed.values()) <= 3


def silent(new_run: NewRun, **server: Any) -> tuple[RunFolder, WildGrid]:
    """org-2 is connected, and never answers what it is handed."""
    folder = finished(new_run, server={"absent_seconds": 0.2, "min_timeout_seconds": 0.3, "quorum": 0.5, **server})
    grid = receiving(folder)
    grid.swallowed["org-2"] = 1000
    return folder, grid


def test_silent_organization_does_not_hold_up_the_delivery(new_run: NewRun) -> None:
    """Without the rule this test takes ten minutes."""
    folder, grid = silent(new_run)
    assert deliver(grid, folder) == ["org-2"]
    assert told(folder, "delivery_failed") == [
        {"event": "delivery_failed", "organization": "org-2", "reason": "it did not confirm in time"}
    ]
    assert deliver(grid, folder) == ["org-2"]  # nor when the run is continued, and it is the only one
    assert deliver(receiving(folder), folder) == []
    assert sorted(read_deliveries(folder)) == list(NAMES)


def test_anyone_who_is_only_slow_gets_it_in_time(new_run: NewRun) -> None:
    folder = finished(new_run, server={"absent_seconds": 0.2, "min_timeout_seconds": 30.0, "quorum": 0.5})
    grid = receiving(folder)
    grid.delay["org-2"] = 0.6
    assert deliver(grid, folder) == []


@pytest.mark.parametrize("change", [{"timeout_factor": 0.0}, {}])
def test_delivery_hurries_nobody_while_most_are_silent(new_run: NewRun, change: dict[str, float]) -> None:
    folder, grid = silent(new_run, min_timeout_seconds=0.01, **change)
    grid.delay["org-2"] = 0.5
    grid.swallowed["org-2"] = 0
    if not change:
        grid.swallowed["org-3"] = grid.swallowed["org-1"] = 1000
    assert "org-2" not in deliver(grid, folder, replace(IMPATIENT, export=1.0))


def test_silent_superlink_does_not_hold_up_the_delivery(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(new_run)
    grid = receiving(folder)

    def away() -> Any:
        raise OSError("connection refused")

    monkeypatch.setattr(grid, "get_nodes", away)
    assert deliver(grid, folder, replace(IMPATIENT, first_look=0.3)) == list(NAMES)
    assert told(folder, "delivery_started") == [{"event": "delivery_started", "organizations": list(NAMES)}]


def test_anyone_who_was_revoked_or_left_out_gets_none(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2, server={"strikes": 1, "quorum": 0.5}))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": adding(1.0), "org-3": wrong_shape})
    play(folder, grid)
    FederationFolder(folder.path.parent.parent).members.revoke("org-2")
    seen = list[Request]()
    assert deliver(receiving(folder, seen), folder) == []
    assert {request.organization: bool(request.state) for request in seen} == {"org-1": True, "org-3": False}
    assert set(read_deliveries(folder)) == {"org-1"}


@pytest.mark.parametrize("change", [{"received": "0" * 64}, {"organization": "org-2"}, {"plan_id": "0" * 64}])
def test_a_receipt_for_something_else_is_none(new_run: NewRun, change: dict[str, str]) -> None:
    folder = finished(new_run)
    assert deliver(receiving(folder, org_1=receipt(folder, **change)), folder) == ["org-1"]
    assert sorted(read_deliveries(folder)) == ["org-2", "org-3"]
    [event] = told(folder, "delivery_failed")
    assert event["reason"] == "its receipt is for another model or organization"


def test_delivery_names_failures_and_repeats_lost_requests(new_run: NewRun) -> None:
    def fails(request: Request) -> Receipt:
        raise OSError("disk full")

    folder = finished(new_run)
    grid = receiving(folder, org_1=fails)
    grid.lost["org-2"] = 1
    assert deliver(grid, folder) == ["org-1"]
    [event] = told(folder, "delivery_failed")
    assert event["reason"] == "OSError: disk full"


def test_a_damaged_list_is_a_run_error(new_run: NewRun) -> None:
    folder = finished(new_run)
    (folder.path / "delivered.json").write_text("[]")
    with fails_with("run.damaged_document", "delivered.json") as error:
        read_deliveries(folder)
    assert error.value.code == "run.damaged_document"


# --- the app


def context(folder: RunFolder) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"run": str(folder.path)})  # type: ignore[arg-type]


def test_app_trains_delivers_and_delivers_again_to_the_lacking(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2, server={"absent_seconds": 0.2, "quorum": 0.5}))
    grid = receiving(folder)
    grid.offline = {"org-3"}
    main(grid, context(folder))
    assert folder.finished
    assert sorted(read_deliveries(folder)) == ["org-1", "org-2"]
    seen = list[Request]()
    main(receiving(folder, seen), context(folder))
    assert [request.organization for request in seen] == ["org-3"]
    assert json.loads((folder.path / "delivered.json").read_bytes()).keys() == set(NAMES)


def test_the_app_leaves_a_run_alone_that_another_process_plays(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES))
    with folder.locked(), fails_with("run.locked"):
        main(receiving(folder), context(folder))
    assert not folder.events.path.exists()


def test_unexpected_error_becomes_an_event_once(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real(new_run(*NAMES, server={"wait_seconds": 0.0, "quorum": 1.0}))
    grid = receiving(folder)
    grid.offline = set(NAMES)
    with pytest.raises(RunError):
        main(grid, context(folder))
    assert len(told(folder, "run_failed")) == 1
    monkeypatch.setattr(server_app, "train", lambda grid, folder: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(receiving(folder), context(folder))
    [_, failed] = told(folder, "run_failed")
    assert failed["round"] == 1
    assert failed["reason"].startswith("the run cannot go on (")
    assert failed["reason"].endswith("continue it with --resume")

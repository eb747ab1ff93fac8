"""Organizations at which a person has yet to approve the plan: the round waits for them, asks again, and strikes nobody."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Error, Message
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import PolicyError
from cotune.flower.runtime_client import RunStopped
from cotune.reporting.run_report import write_report
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.status import look
from cotune.server.rounds.approvals import NOT_APPROVED, PendingApprovals, awaits_approval
from cotune.server.runs.events import observe_run
from cotune.server.runs.exclusions import count_strikes
from cotune.server.runs.results import summarize
from cotune.server.runs.run_folder import RunFolder
from cotune.server.time_limits import TimeLimits
from tests.support.failures import fails_with
from tests.support.organizations import adding
from tests.support.rounds import assert_moved, dropped, initial, play
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import WildGrid, real, told, wild

NAMES = ("org-1", "org-2", "org-3")
EVERYBODY = {name: adding(value) for name, value in zip(NAMES, (1.0, 3.0, 5.0), strict=True)}


def says(words: str) -> Callable[[Message], Message]:
    return lambda message: Message(Error(1001, words), reply_to=message)


def not_approved(folder: RunFolder, **approves_at: int) -> WildGrid:
    """Those named approve the plan before they are asked for the so many-th time, in any round (0: never)."""
    grid = wild(folder, EVERYBODY)
    answer = grid.answer

    def answered(message: Message) -> Message:
        name = grid._name(message)
        when = approves_at.get(name.replace("-", "_"), 1)
        return (
            answer(message) if when and grid.pushed[name] >= when else says(PolicyError("training.approval", "x").public)(message)
        )

    grid.answer = answered  # type: ignore[method-assign]
    return grid


def test_run_without_approval_waits_and_goes_on(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    grid = not_approved(folder, org_1=4, org_2=3, org_3=5)
    progress = play(folder, grid)
    assert len(progress.history[0]["participants"]) >= 2
    assert grid.pushed["org-1"] == 4 or grid.pushed["org-2"] == 3
    first = told(folder, "awaiting_approval")[0]
    assert first == {"event": "awaiting_approval", "round": 1, "organizations": first["organizations"]}
    assert {name for event in told(folder, "awaiting_approval") for name in event["organizations"]} == set(NAMES)


def test_round_needing_everybody_waits_for_the_last_approval(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2, server={"quorum": 1.0, "strikes": 1}))
    grid = not_approved(folder, org_2=6)
    progress = play(folder, grid)
    assert [entry["participants"] for entry in progress.history] == [list(NAMES)] * 2
    assert_moved(progress.state, initial(folder), by=6.0)
    assert grid.pushed == {"org-1": 2, "org-2": 7, "org-3": 2}
    assert [event["organizations"] for event in told(folder, "awaiting_approval")] == [["org-2"], []]
    assert dropped(progress) == [{}, {}]
    assert count_strikes(folder, progress.history) == {}


def test_round_with_quorum_begins_without_late_approvals(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=3, server={"quorum": 0.5, "absent_seconds": 3600.0, "strikes": 1}))
    grid = not_approved(folder)
    round_of = grid.groups["org-3"]
    answer = grid.answer
    grid.answer = lambda message: (  # type: ignore[method-assign]
        says(PolicyError("training.approval", "x").public)(message)
        if grid._name(message) == "org-3" and round_of[-1] != "3"
        else answer(message)
    )
    progress = play(folder, grid)
    assert [entry["participants"] for entry in progress.history] == [["org-1", "org-2"]] * 2 + [list(NAMES)]
    reasons = dropped(progress)
    assert reasons[0] == reasons[1] == {"org-3": NOT_APPROVED}
    assert reasons[2] == {}
    assert [(entry["quarantined"], entry["timed_out"], entry["absent"]) for entry in progress.history] == [([], [], [])] * 3


def test_who_has_yet_to_approve_is_named_in_status_and_report(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 0.5}))
    play(folder, not_approved(folder, org_3=0))
    status = look(FederationFolder(folder.path.parent.parent), None)
    [word] = [each.word for each in status.organizations if each.name == "org-3"]
    assert "approve" in word
    write_report(summarize(folder, folder.load()), folder.path / "report.html")
    assert NOT_APPROVED.split(";")[0] in (folder.path / "report.html").read_text(encoding="utf-8")


def test_the_status_says_while_it_waits_that_it_does(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    seen = []
    grid = not_approved(folder, org_1=3, org_2=3, org_3=3)

    def looks(name: str, message: Message) -> None:
        if grid.pushed[name] == 2:
            seen.append(look(FederationFolder(folder.path.parent.parent), {}))

    grid.on_push = looks
    play(folder, grid)
    assert seen[0].run is not None
    assert "approve" in seen[0].run.phase


def test_run_stops_after_approval_seconds_and_resumes(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"approval_seconds": 0.2}))
    with fails_with("run.no_quorum", "1", "3", "2", "org-2", "org-3"):
        play(folder, not_approved(folder, org_2=0, org_3=0))
    again = RunFolder(folder.path)
    assert play(again, wild(again, EVERYBODY)).history[0]["participants"] == list(NAMES)


def test_a_run_that_is_killed_while_it_waits_waits_again(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0}))
    grid = not_approved(folder, org_3=0)

    def killed(name: str, message: Message) -> None:
        if grid.pushed["org-3"] == 3:
            grid.get_nodes = stops  # type: ignore[method-assign]

    def stops() -> Any:
        raise RunStopped

    grid.on_push = killed
    with fails_with("run.stopped_at_superlink"):
        play(folder, grid)
    again = RunFolder(folder.path)
    grid = not_approved(again, org_3=3)
    progress = play(again, grid)
    assert progress.history[0]["participants"] == list(NAMES)
    assert grid.pushed["org-3"] == 3
    assert [event["organizations"] for event in told(folder, "awaiting_approval")] == [["org-3"], ["org-3"], []]


def test_approval_after_the_deadline_gets_a_deadline_of_its_own(new_run: NewRun) -> None:
    """Approved long after the round's deadline, it has as much time to train as anybody; a silent one gets no more for it."""
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 0.6, "deadline_seconds": 1.2}))
    grid = not_approved(folder, org_2=30)
    grid.delay["org-3"] = 3600.0

    def slow(name: str, message: Message) -> None:
        grid.delay["org-2"] = 0.3 if grid.pushed["org-2"] >= 30 else 0.0

    grid.on_push = slow
    progress = play(folder, grid)
    assert progress.history[0]["participants"] == ["org-1", "org-2"]
    assert dropped(progress) == [{"org-3": "no reply within 1.2 seconds"}]
    assert 1.1 < grid.ttls["org-2"][-1] <= 1.2


def test_anyone_who_reconnects_is_asked_at_once(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PendingApprovals, "_backoff", lambda self, times: 3600.0)
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0}))
    grid = not_approved(folder, org_2=2)

    def joins_again(event: str, fields: dict[str, Any]) -> None:
        if event == "awaiting_approval":
            grid.since["org-2"] = "later"

    with observe_run(joins_again):
        assert play(folder, grid).history[0]["participants"] == list(NAMES)
    assert grid.pushed["org-2"] == 2


def test_another_rule_is_final_in_its_round(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 0.5}))
    grid = wild(folder, EVERYBODY)
    answer = grid.answer
    words = PolicyError("training.tasks", "x").public
    grid.answer = lambda message: (  # type: ignore[method-assign]
        says(words)(message) if grid._name(message) == "org-3" else answer(message)
    )
    assert dropped(play(folder, grid)) == [{"org-3": words}]
    assert grid.pushed["org-3"] == 1


def test_only_those_words_are_taken_for_a_missing_approval(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    asked = list[Message]()
    grid = wild(folder, EVERYBODY)
    grid.on_push = lambda name, message: asked.append(message)
    play(folder, grid)
    assert awaits_approval(says(PolicyError("training.approval", "whatever").public)(asked[0]))
    assert not awaits_approval(says("declined: its rule training.approval")(asked[0]))
    assert not awaits_approval(says(PolicyError("training.units", "").public)(asked[0]))
    assert not awaits_approval(grid.answer(asked[0]))
    assert not awaits_approval(None)


@given(times=st.integers(1, 10_000))
def test_the_wait_grows_and_stays_bounded(times: int) -> None:
    pending = PendingApprovals(TimeLimits(approval_backoff=5.0, max_approval_backoff=300.0))
    waits = [pending._backoff(each) for each in (times, times + 1)]
    assert 5.0 <= waits[0] <= waits[1] <= 300.0


def test_the_bound_counts_from_the_first_that_had_not_approved() -> None:
    waited = PendingApprovals()
    assert waited.end(10.0) == 0.0
    for at, name in zip(itertools.count(100.0), ("org-1", "org-2", "org-1"), strict=False):
        waited.add(name, at, "")
    assert waited.end(10.0) == 110.0
    waited.discard("org-1")
    waited.discard("org-2")
    assert waited.end(10.0) == 0.0

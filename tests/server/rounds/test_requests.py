"""Rounds of a real run, on a grid on which things go wrong."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from flwr.app import Message

from cotune.errors import RunError
from cotune.flower.chunks import Malformed, TooLarge
from cotune.flower.runtime_client import RunStopped
from cotune.protocol.messages import Request
from cotune.server.deployment.federation import FederationFolder
from cotune.server.runs.events import observe_run
from cotune.server.runs.run_folder import RunFolder
from tests.support.failures import fails_with
from tests.support.organizations import adding, update
from tests.support.rounds import (
    IMPATIENT,
    NAMES,
    assert_moved,
    dropped,
    everybody,
    initial,
    play,
    raises,
    same,
    simulate,
    wrong_shape,
)
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import files, full_disk, real, told, wild


def noise(request: Request) -> Any:
    """Sums of such different sizes depend on their order."""
    number = int(request.organization[-1])
    rng = np.random.default_rng([request.round, number])
    scale = 1000.0 ** (number - 2)
    draws = {n: torch.from_numpy(rng.normal(size=t.shape).astype("float32") * scale) for n, t in sorted(request.state.items())}
    return update(request, draws, examples=number * 7)


# --- who is asked


def test_organizations_are_known_by_their_keys(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2))
    progress = play(folder, wild(folder, everybody(1.0, 2.0, 6.0)))
    assert_moved(progress.state, initial(folder), by=6.0)
    assert [entry["participants"] for entry in progress.history] == [list(NAMES)] * 2


def test_a_request_lives_as_long_as_the_round_and_names_it(new_run: NewRun) -> None:
    folder = real(new_run("org-1", rounds=2, server={"deadline_seconds": 100.0}))
    grid = wild(folder, everybody(1.0))
    play(folder, grid)
    assert grid.groups["org-1"] == ["1", "2"]
    assert all(90 < ttl <= 100 for ttl in grid.ttls["org-1"])


def test_revoked_organization_is_not_asked_nor_in_the_quorum(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0, 100.0))

    def revokes(name: str, message: Message) -> None:
        if (name, message.metadata.group_id) == ("org-3", "1"):
            FederationFolder(folder.path.parent.parent).members.revoke("org-3")

    grid.on_push = revokes
    progress = play(folder, grid)
    assert [entry["excluded"] for entry in progress.history] == [[], ["org-3"]]
    assert progress.history[1]["participants"] == ["org-1", "org-2"]
    assert told(folder, "client_excluded") == [
        {"event": "client_excluded", "round": 2, "organization": "org-3", "reason": "its invitation was revoked"}
    ]


# --- waiting


def test_a_round_waits_for_its_quorum_to_be_connected(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 0.6, "absent_seconds": 0.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.offline = {"org-2", "org-3"}
    back = threading.Timer(0.3, lambda: grid.offline.discard("org-3"))
    back.start()
    progress = play(folder, grid)
    assert progress.history[0]["participants"] == ["org-1", "org-3"]
    assert progress.history[0]["absent"] == ["org-2"]
    assert dropped(progress) == [{"org-2": "it was not connected"}]
    [waiting] = told(folder, "waiting")
    assert waiting == {"event": "waiting", "round": 1, "connected": ["org-1"], "needed": 2, "absent": ["org-2", "org-3"]}


def test_missing_quorum_ends_the_run_which_can_be_resumed(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0, "wait_seconds": 0.1}))
    grid = wild(folder, everybody(1.0, 1.0, 1.0))
    grid.offline = {"org-2"}
    with fails_with("run.too_few_connected", "1", "2", "3", "0.1", "3", "org-2"):
        play(folder, grid)
    assert sum(grid.pushed.values()) == 0  # nobody has trained for nothing
    grid.offline = set()
    assert play(folder, grid).round == 1


def test_anyone_who_connects_during_a_round_is_asked_then(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 0.5, "absent_seconds": 60.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.offline = {"org-2"}
    grid.on_push = lambda name, message: grid.offline.clear()
    assert play(folder, grid).history[0]["participants"] == list(NAMES)


def test_the_deadline_ends_a_round_for_anyone_who_is_slow(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 0.5, "deadline_seconds": 0.5}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.delay = {"org-1": 3600.0}
    progress = play(folder, grid)
    assert dropped(progress) == [{"org-1": "no reply within 0.5 seconds"}]
    assert_moved(progress.state, initial(folder), by=4.0)


# --- what is lost is asked again


@pytest.mark.parametrize("fault", ["pushes_fail", "not_taken", "lost", "pulls_fail"])
def test_what_is_lost_twice_is_asked_again(new_run: NewRun, fault: str) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    getattr(grid, fault)["org-2"] = 2
    progress = play(folder, grid)
    assert dropped(progress) == [{}]
    assert_moved(progress.state, initial(folder), by=3.0)
    assert grid.pushed == {"org-1": 1, "org-2": 1 if fault == "pulls_fail" else 3, "org-3": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("pushes_fail", "its request could not be handed over: OSError: database is locked, 3 times"),
        ("not_taken", "the SuperLink did not take its request, 3 times"),
        ("lost", "it has left, or its machine or network is gone; it is asked again when it comes back, 3 times"),
    ],
)
def test_what_is_lost_three_times_is_left_and_the_run_goes_on(new_run: NewRun, fault: str, reason: str) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    getattr(grid, fault)["org-2"] = 1000
    progress = play(folder, grid)
    assert dropped(progress) == [{"org-2": reason}]
    assert grid.pushed["org-2"] == 3


def test_reconnected_organization_is_asked_again(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.swallowed["org-2"] = 1
    grid.on_push = lambda name, message: grid.since.update({name: "a little later"})
    assert_moved(play(folder, grid).state, initial(folder), by=3.0)
    assert grid.pushed["org-2"] == 2


def test_reconnecting_organization_is_asked_ten_times(new_run: NewRun) -> None:
    """Several faults may fall into one round; a node that never stays is no reason to send the model for ever."""
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5, "deadline_seconds": 2.0}))
    grid = wild(folder, everybody(1.0, 3.0))
    grid.delay["org-2"] = 3600.0
    grid.on_push = lambda name, message: grid.since.update({name: f"time {grid.pushed[name]}"})
    progress = play(folder, grid)
    assert dropped(progress) == [{"org-2": "no reply within 2 seconds"}]
    assert grid.pushed["org-2"] == 10


def test_an_organization_that_answers_twice_counts_once(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.delay = dict.fromkeys(NAMES, 0.2)
    grid.on_push = lambda name, message: grid.since.update({name: message.metadata.group_id})
    progress = play(folder, grid)
    assert [entry["participants"] for entry in progress.history] == [list(NAMES)] * 2
    assert_moved(progress.state, initial(folder), by=6.0)
    assert sum(grid.pushed.values()) > 6


def test_a_lost_node_that_stays_away_is_absent(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"absent_seconds": 0.2}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.lost["org-2"] = 1
    grid.on_push = lambda name, message: grid.offline.add(name) if name == "org-2" else None
    progress = play(folder, grid)
    assert progress.history[0]["absent"] == ["org-2"]
    assert dropped(progress) == [
        {"org-2": "it has left, or its machine or network is gone; it is asked again when it comes back"}
    ]


def test_what_an_organization_says_itself_is_final_and_no_strike(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=4))
    grid = wild(folder, {**everybody(1.0, 3.0), "org-3": raises})
    progress = play(folder, grid)
    assert grid.pushed["org-3"] == 4
    assert [entry["quarantined"] for entry in progress.history] == [[]] * 4


def test_one_that_hangs_holds_up_neither_the_others_nor_the_end(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=2, server={"deadline_seconds": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    release = grid.hangs["org-1"] = threading.Event()
    try:
        progress = play(folder, grid)
    finally:
        release.set()
    assert [entry["participants"] for entry in progress.history] == [["org-2", "org-3"]] * 2
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("cotune-")]
    assert all(thread.daemon for thread in threads)


def test_silent_superlink_is_reported_once_and_its_return_too(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real(new_run("org-1", rounds=1))
    grid = wild(folder, everybody(1.0))
    found = grid.get_nodes
    until = time.monotonic() + 0.5

    def away() -> Any:
        if time.monotonic() < until:
            raise OSError("connection refused")
        return found()

    monkeypatch.setattr(grid, "get_nodes", away)
    assert play(folder, grid, replace(IMPATIENT, silent=0.1)).round == 1
    assert told(folder, "connection_lost", "connection_restored") == [
        {"event": "connection_lost", "reason": "OSError: connection refused"},
        {"event": "connection_restored"},
    ]


def test_a_connection_that_is_lost_during_a_round_is_told_of(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real(new_run("org-1", rounds=1))
    grid = wild(folder, everybody(1.0))
    found = grid.get_nodes
    asked = threading.Event()

    def breaks_off() -> Any:
        if asked.wait(0.0) and not told(folder, "connection_lost"):
            raise OSError("connection refused")
        if told(folder, "connection_restored"):
            grid.ready_now()
        return found()

    monkeypatch.setattr(grid, "get_nodes", breaks_off)
    grid.delay = {"org-1": math.inf}
    grid.on_push = lambda name, message: asked.set()
    assert play(folder, grid, replace(IMPATIENT, silent=0.1)).round == 1
    assert [event["event"] for event in told(folder, "connection_lost", "connection_restored")] == [
        "connection_lost",
        "connection_restored",
    ]


@pytest.mark.parametrize("method", ["get_nodes", "push_messages", "pull_messages"])
def test_run_stopped_at_the_superlink_ends_and_resumes(new_run: NewRun, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    folder = real(new_run("org-1", rounds=1))
    grid = wild(folder, everybody(1.0))

    def refuses(*_: Any) -> Any:
        raise RunStopped

    monkeypatch.setattr(grid, method, refuses)
    with fails_with("run.stopped_at_superlink"):
        play(folder, grid)
    assert play(folder, wild(folder, everybody(1.0))).round == 1


# --- whatever the order, the same model


def test_the_order_of_arrival_does_not_change_a_bit(new_run: NewRun) -> None:
    changes = {"rounds": 2, "server": {"max_update_norm": 1e12}}
    simulated = new_run(*NAMES, **changes)
    expected = simulate(simulated, dict.fromkeys(NAMES, noise)).state
    for order in itertools.permutations(NAMES):
        folder = real(new_run(*NAMES, **changes))
        grid = wild(folder, dict.fromkeys(NAMES, noise))
        grid.delay = {name: 0.08 * order.index(name) for name in NAMES}
        assert same(play(folder, grid).state, expected)
        received = [event["organization"] for event in told(folder, "update_received") if event["round"] == 1]
        assert received == list(order)
        assert files(folder.path / "inbox") == []


# --- over-selection


def test_first_replies_complete_a_round_and_others_are_reported(new_run: NewRun) -> None:
    server = {"sample_size": 2, "over_selection": 0.5}
    folder = real(new_run(*NAMES, rounds=1, server=server))
    grid = wild(folder, dict.fromkeys(NAMES, adding(1.0)))
    grid.delay = {"org-2": 3600.0}
    progress = play(folder, grid)
    assert sum(grid.pushed.values()) == 3
    assert sorted(progress.history[0]["participants"]) == ["org-1", "org-3"]
    assert dropped(progress) == [{"org-2": "the round was complete before it answered"}]
    assert progress.history[0]["quarantined"] == progress.history[0]["absent"] == []


def test_failed_organization_is_replaced_by_one_asked_beyond(new_run: NewRun) -> None:
    folder = new_run(*NAMES, rounds=6, server={"sample_size": 2, "over_selection": 0.5, "quorum": 1.0})
    progress = simulate(folder, {**everybody(1.0, 1.0), "org-3": raises})
    assert [sorted(entry["participants"]) for entry in progress.history] == [["org-1", "org-2"]] * 6


# --- strikes


def test_organization_is_excluded_after_strikes_also_on_resume(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=4, server={"strikes": 2}))

    def until_the_first_round_is_over(event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished":
            raise ConnectionError

    with observe_run(until_the_first_round_is_over), pytest.raises(ConnectionError):
        play(folder, wild(folder, {**everybody(1.0, 1.0), "org-3": wrong_shape}))
    again = RunFolder(folder.path)
    progress = play(again, wild(again, {**everybody(1.0, 1.0), "org-3": wrong_shape}))
    assert [entry["quarantined"] for entry in progress.history] == [["org-3"], ["org-3"], [], []]
    assert [entry["excluded"] for entry in progress.history] == [[], [], ["org-3"], ["org-3"]]
    [left] = told(folder, "client_excluded")
    assert left == {
        "event": "client_excluded",
        "round": 3,
        "organization": "org-3",
        "reason": "2 of its updates were refused, or did not come in time",
    }


def test_of_a_federation_of_two_one_alone_is_no_fusion(new_run: NewRun) -> None:
    """Unless the plan says so: the round fails, and once the other is left out, the run ends."""
    folder = real(new_run("org-1", "org-2", rounds=3, server={"strikes": 1}))
    answers = {"org-1": adding(1.0), "org-2": wrong_shape}
    with fails_with("run.no_quorum", "1", "1", "2"):
        play(folder, wild(folder, answers))
    with fails_with("run.too_few_left", "org-1", "2"):
        play(folder, wild(folder, answers))
    assert folder.load().round == 0


def test_without_strikes_nobody_is_ever_left_out(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=5, server={"strikes": 0})
    progress = simulate(folder, {"org-1": adding(1.0), "org-2": wrong_shape})
    assert [entry["quarantined"] for entry in progress.history] == [["org-2"]] * 5
    assert [entry["excluded"] for entry in progress.history] == [[]] * 5


def test_where_all_are_left_out_the_run_ends(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=3, server={"strikes": 1, "quorum": 0.5})

    def turns_bad(request: Request) -> Any:
        return adding(1.0)(request) if request.round == 1 else wrong_shape(request)

    with fails_with("run.no_quorum", "2", "0", "1"):
        simulate(folder, {"org-1": turns_bad, "org-2": wrong_shape})
    assert folder.load().history[0]["quarantined"] == ["org-2"]


# --- what is replayed, foreign, too large or too much


def test_an_update_of_an_earlier_model_is_refused(new_run: NewRun) -> None:
    """A replay of an attempt before a restart, whose base was another."""
    folder = real(new_run("org-1", "org-2", rounds=2, server={"quorum": 0.5}))
    kept = dict[int, Any]()

    def replays(request: Request) -> Any:
        kept.setdefault(0, adding(1.0)(request))
        return update(request, kept[0].delta, received=kept[0].received)

    progress = play(folder, wild(folder, {"org-1": adding(1.0), "org-2": replays}))
    assert dropped(progress)[0] == {}
    assert "it was trained from another model" in dropped(progress)[1]["org-2"]


def test_an_update_in_the_name_of_another_is_refused(new_run: NewRun) -> None:
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5}))

    def poses(request: Request) -> Any:
        return update(request, dict(request.state), organization="org-1")

    progress = play(folder, wild(folder, {"org-1": adding(1.0), "org-2": poses}))
    assert dropped(progress) == [{"org-2": "it is from org-1, expected org-2"}]


@pytest.mark.parametrize("trouble", [TooLarge("it has more than 600 bytes"), Malformed("it cannot be put together")])
def test_an_answer_that_cannot_be_taken_is_a_strike(new_run: NewRun, trouble: Exception) -> None:
    folder = real(new_run("org-1", "org-2", rounds=3, server={"quorum": 0.5, "strikes": 2}))
    grid = wild(folder, everybody(1.0, 3.0))
    grid.unfit["org-2"] = trouble
    progress = play(folder, grid)
    assert dropped(progress)[0] == {"org-2": str(trouble)}
    assert [entry["quarantined"] for entry in progress.history] == [["org-2"], ["org-2"], []]
    assert grid.pushed == {"org-1": 3, "org-2": 2}  # asked once in each round, and not after so many
    assert files(folder.path / "quarantine") == ["round-00001-org-2.safetensors", "round-00002-org-2.safetensors"]


def test_disclosure_not_asked_for_is_rejected_and_sanitized(new_run: NewRun) -> None:
    folder = real(new_run("org-1", "org-2", "org-3", rounds=1, server={"quorum": 0.3}))

    def chats(request: Request) -> Any:
        return update(request, adding(1.0)(request).delta, disclosures={"my opinion": 1.0})  # type: ignore[union-attr]

    def paints(request: Request) -> Any:
        return update(request, {**adding(1.0)(request).delta, "\x1b[2J\nall is well": torch.zeros(1)})  # type: ignore[union-attr]

    progress = play(folder, wild(folder, {"org-1": adding(1.0), "org-2": chats, "org-3": paints}))
    assert dropped(progress)[0] == {
        "org-2": "it discloses 'my opinion', which the plan does not ask for",
        "org-3": "it has 1 parameters too many and lacks 0 (\\u001b[2J all is well)",
    }


def test_what_the_plan_asks_for_is_taken(new_run: NewRun) -> None:
    folder = real(new_run("org-1", rounds=1, disclosures={"label_histogram": True, "local_metrics": True}))
    words = {**{f"label {label}": 3.0 for label in folder.plan.labels}, "correct": 2.0, "records": 9.0}

    def tells(request: Request) -> Any:
        return update(request, adding(1.0)(request).delta, disclosures=words)  # type: ignore[union-attr]

    [entry] = play(folder, wild(folder, {"org-1": tells})).history
    assert entry["disclosures"] == {"org-1": words}


@pytest.mark.parametrize(("count", "expected"), [(4, "5 to 20"), (21, "5 to 20")])
def test_count_outside_the_agreed_bounds_is_rejected(new_run: NewRun, count: int, expected: str) -> None:
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5}), examples={"org-2": (5, 20)})
    progress = play(folder, wild(folder, {"org-1": adding(1.0, 1000), "org-2": adding(1.0, count)}))
    assert dropped(progress) == [{"org-2": f"it declares {count} examples, expected {expected}"}]


def test_more_examples_than_the_plan_allows_are_refused(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=1, server={"max_examples": 99})
    progress = simulate(folder, {"org-1": adding(1.0, 99), "org-2": adding(1.0, 100)})
    assert dropped(progress) == [{"org-2": "it declares 100 examples, expected 1 to 99"}]


def test_an_answer_far_larger_than_the_request_is_refused_unread(new_run: NewRun) -> None:
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5}))

    def floods(request: Request) -> Any:
        return update(request, {**adding(1.0)(request).delta, "flood": torch.zeros(2**19)})  # type: ignore[union-attr]

    progress = play(folder, wild(folder, {"org-1": adding(1.0), "org-2": floods}))
    assert dropped(progress)[0]["org-2"].startswith("it has 20980")
    [event] = told(folder, "update_quarantined")
    assert (folder.path / "quarantine" / event["file"]).is_file()


def test_history_is_plain_json_in_the_order_of_organizations(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    grid = wild(folder, everybody(1.0, 1.0, 1.0))
    grid.delay = {"org-1": 0.1, "org-2": 0.05}
    [entry] = play(folder, grid).history
    assert entry["participants"] == list(NAMES)
    plain = entry.as_json()
    assert json.loads(json.dumps(plain)) == plain


# --- asked twice


def test_anyone_who_is_lost_at_one_request_may_answer_another(new_run: NewRun) -> None:
    """Its node reconnects twice, so that three requests are under way; the first is reported lost, the third is answered."""
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0))
    grid.lost["org-2"] = 1

    def reconnects(name: str, message: Message) -> None:
        grid.delay["org-2"] = math.inf if grid.pushed["org-2"] < 3 else 0.5
        if grid.pushed["org-2"] == 3:  # no sooner: a loss that is known before is a reason for a request by itself
            grid.ready_now()
        grid.swallowed["org-2"] = int(grid.pushed["org-2"] == 2)
        grid.since["org-2"] = f"time {min(2, grid.pushed['org-2'])}"

    grid.on_push = reconnects
    progress = play(folder, grid)
    assert dropped(progress) == [{}]
    assert grid.pushed["org-2"] == 3
    assert_moved(progress.state, initial(folder), by=2.0)


def test_an_answer_that_is_lost_on_the_way_is_asked_for_again(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    grid.handovers_fail["org-2"] = 1
    assert_moved(play(folder, grid).state, initial(folder), by=3.0)
    assert grid.pushed == {"org-1": 1, "org-2": 2, "org-3": 1}


def test_reply_that_was_cut_off_is_asked_for_again(new_run: NewRun) -> None:
    """As by a node that was killed: Flower goes on to wait for the rest of it, and the node has sent it again long since."""
    folder = real(new_run(*NAMES, rounds=1, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    release = grid.hangs["org-2"] = threading.Event()
    grid.hangs_at.add("org-2")
    try:
        assert_moved(play(folder, grid, replace(IMPATIENT, slow=0.2)).state, initial(folder), by=3.0)
    finally:
        release.set()
    assert grid.pushed == {"org-1": 1, "org-2": 2, "org-3": 1}


@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_missing_replies_are_asked_for_when_superlink_is_back(new_run: NewRun, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It may have been killed between marking an answer as handed over and handing it over, however soon it is back."""
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 1.0}))
    grid = wild(folder, everybody(1.0, 3.0))
    grid.swallowed["org-2"] = 1
    found = grid.get_nodes
    asked = threading.Event()

    def away() -> Any:
        if asked.is_set():
            asked.clear()
            if how == "refuses":
                raise httpx.ConnectError("connection refused")
            time.sleep(0.4)
        return found()

    monkeypatch.setattr(grid, "get_nodes", away)
    grid.on_push = lambda name, message: asked.set() if grid.pushed[name] == 1 and name == "org-2" else None
    limits = replace(IMPATIENT, away=0.3) if how == "is silent" else IMPATIENT
    assert_moved(play(folder, grid, limits).state, initial(folder), by=2.0)
    assert grid.pushed["org-2"] >= 2  # where the machine itself is silent for a moment, once more


# --- answers that are none


def test_an_empty_answer_is_dropped_and_the_run_goes_on(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = real(new_run(*NAMES, rounds=1))
    grid = wild(folder, everybody(1.0, 3.0, 5.0))
    answer = grid.answer

    def empty(message: Message) -> Message:
        reply = answer(message)
        if grid._name(message) == "org-2":
            reply.__dict__["_content"] = None  # as Flower inflates a message without a body
        return reply

    monkeypatch.setattr(grid, "answer", empty)
    assert dropped(play(folder, grid)) == [{"org-2": "its answer is empty"}]


def test_what_a_stranger_names_cannot_write_on_the_screen(new_run: NewRun) -> None:
    folder = real(new_run(*NAMES, rounds=1))

    def rude(request: Request) -> Any:
        return update(request, {"\x1b[2J\x1b[31mall is well\r\n" + "x" * 1000: torch.ones(1)})

    [[reason]] = [list(each.values()) for each in dropped(play(folder, wild(folder, {**everybody(1.0, 3.0), "org-3": rude})))]
    assert reason.isprintable()
    assert "all is well" in reason


# --- a full disk


@pytest.mark.parametrize("most", [0, 200, 300, 600, 1000, 1400, 1800])
def test_full_disk_ends_the_run_in_a_sentence_and_it_resumes(new_run: NewRun, most: int) -> None:
    """Whichever file does not fit: events, an update that came before its turn, one that was refused, the checkpoint."""
    answers = {"org-1": noise, "org-2": noise, "org-3": wrong_shape}
    changes = {"rounds": 2, "server": {"max_update_norm": 1e12}}
    whole = real(new_run(*NAMES, **changes))
    folder = real(new_run(*NAMES, **changes))
    expected = play(whole, wild(whole, answers))
    grid = wild(folder, answers)
    grid.delay = {"org-1": 0.05}
    with full_disk(most), pytest.raises(RunError, match=r"(cannot be written|cannot go on) .*free space.*--resume"):
        play(folder, grid)
    again = RunFolder(folder.path)
    progress = play(again, wild(again, answers))
    assert same(progress.state, expected.state)
    assert [entry["quarantined"] for entry in progress.history] == [["org-3"]] * 2
    assert [event["round"] for event in told(folder, "round_finished")][-1] == 2

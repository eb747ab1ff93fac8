"""A member that is asked, stays connected and never answers.

On commit a605cba it cost every round the whole of `server.deadline_seconds`, an hour by default, and got no strike: a run of ten
rounds took ten hours longer, and each round of it named the member again.
"""

from __future__ import annotations

import pytest
from flwr.app import MessageType

from cotune.plan.server_config import RoundsConfig
from cotune.server.request_outcomes import Accepted
from cotune.server.rounds.requests import Requests
from cotune.server.rounds.round import Round, Selection
from cotune.server.runs.exclusions import count_strikes, find_excluded
from tests.support.organizations import adding
from tests.support.rounds import play
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, told, wild


def test_slow_organization_costs_few_rounds_and_is_excluded(new_run: NewRun) -> None:
    folder = real(new_run("org-1", "org-2", "org-3", rounds=5, server={"min_timeout_seconds": 0.2, "timeout_factor": 0.001}))
    grid = wild(folder, {name: adding(1.0) for name in ("org-1", "org-2", "org-3")})
    grid.delay = {"org-2": 3600.0}
    progress = play(folder, grid)
    assert [entry["timed_out"] for entry in progress.history] == [["org-2"]] * 3 + [[]] * 2
    assert [entry["excluded"] for entry in progress.history] == [[]] * 3 + [["org-2"]] * 2
    assert [d["organization"] for entry in progress.history for d in entry["dropped"]] == ["org-2"] * 3
    assert find_excluded(folder, progress.history) == ["org-2"]
    assert count_strikes(folder, progress.history) == {"org-2": 3}
    [event] = told(folder, "client_excluded")
    assert (event["organization"], event["round"]) == ("org-2", 4)


def of(asked: list[str], came: dict[str, float], **config: float) -> Round:
    """A round in which these have replied, after so many seconds."""
    requests = Requests(1, MessageType.TRAIN, {}, 0)
    selection = Selection(asked, 1, len(asked))
    made = Round(None, RoundsConfig(**config), selection, requests, None, print, is_real=True)  # type: ignore[arg-type]
    made._tracker.seconds_taken.update(came)
    made._outcomes.update(dict.fromkeys(came, Accepted()))
    return made


@pytest.mark.parametrize(
    ("came", "seconds"),
    [
        ({}, 3600.0),
        ({"a": 1.0}, 3600.0),  # fewer than half: the fault may be the coordinator's own
        ({"a": 1.0, "b": 3.0}, 300.0),  # the floor
        ({"a": 40.0, "b": 60.0}, 600.0),  # of two the slower: one that pretends to be fast moves it not at all
        ({"a": 0.0, "b": 60.0, "c": 80.0}, 600.0),  # one that pretends to be fast moves the median little
        ({"a": 4000.0, "b": 4000.0}, 3600.0),  # never longer than the deadline
    ],
)
def test_how_long_the_others_are_waited_for(came: dict[str, float], seconds: float) -> None:
    assert of(["a", "b", "c", "d"], came)._timeout() == seconds


def test_silence_timeout_can_be_switched_off() -> None:
    assert of(["a", "b"], {"a": 1.0}, timeout_factor=0.0)._timeout() == 3600.0


def test_an_outage_of_the_coordinator_is_nobodys_strike(new_run: NewRun) -> None:
    """Where hardly anybody answers in time, the fault is not the members'."""
    folder = real(new_run("org-1", "org-2", "org-3", rounds=1, server={"deadline_seconds": 0.3, "quorum": 0.1}))
    grid = wild(folder, {name: adding(1.0) for name in ("org-1", "org-2", "org-3")})
    grid.delay = {"org-2": 3600.0, "org-3": 3600.0}
    [entry] = play(folder, grid).history
    assert [d["organization"] for d in entry["dropped"]] == ["org-2", "org-3"]
    assert entry["timed_out"] == []

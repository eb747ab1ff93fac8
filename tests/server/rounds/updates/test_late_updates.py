"""Updates that come after their round."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

from cotune.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.protocol.messages import Request
from cotune.server.runs.run_folder import RunFolder
from tests.support.organizations import adding, update
from tests.support.rounds import assert_moved, initial, play
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import WildGrid, real, told, wild

FOLD = {"late": "fold", "max_staleness": 1, "quorum": 0.5, "deadline_seconds": 1.0}


def by_round(first: float, later: float, examples: int) -> Any:
    return lambda request: adding(first if request.round == 1 else later, examples)(request)


def slow_last(folder: RunFolder, grid: WildGrid) -> None:
    """org-2's answer to round 1 is there in round 2, which stays open for a while."""

    def delays(who: str, message: Any) -> None:
        first = message.metadata.group_id == "1"
        grid.delay = {"org-2": 1e9} if first else {"org-1": 0.6}
        if not first:
            grid.ready_now()

    grid.on_push = delays


def test_a_late_update_counts_less_and_after_those_of_the_round(new_run: NewRun) -> None:
    """By hand: round 1 is org-1's 1. Round 2: (10 · 1 + 30 · 5 + 30 · 2^(-½) · (−4)) / (40 + 30 · 2^(-½))."""
    folder = real(new_run("org-1", "org-2", rounds=2, server=FOLD))
    grid = wild(folder, {"org-1": adding(1.0, 10), "org-2": by_round(-4.0, 5.0, 30)})
    slow_last(folder, grid)
    progress = play(folder, grid)
    weight = 30 / math.sqrt(2)
    second = (10 * 1 + 30 * 5 + weight * -4) / (40 + weight)
    assert_moved(progress.state, initial(folder), by=1 + second)
    assert [entry["late"] for entry in progress.history] == [[], [{"organization": "org-2", "round": 1}]]
    assert progress.history[0]["dropped"] == [{"organization": "org-2", "reason": "no reply within 1 seconds"}]
    assert all(1.9 < ttl <= 2.0 for ttl in grid.ttls["org-2"])


def test_a_late_update_is_held_to_the_model_of_its_own_round(new_run: NewRun) -> None:
    def other_model(request: Request) -> Any:
        return update(request, {n: torch.ones_like(t) for n, t in request.state.items()}, received="0" * 64)

    folder = real(new_run("org-1", "org-2", rounds=2, server=FOLD))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": lambda r: other_model(r) if r.round == 1 else adding(1.0)(r)})
    slow_last(folder, grid)
    progress = play(folder, grid)
    assert_moved(progress.state, initial(folder), by=2.0)
    assert [entry["quarantined"] for entry in progress.history] == [[], ["org-2"]]
    assert progress.history[1]["participants"] == ["org-1", "org-2"]


def test_where_late_updates_are_ignored_none_is_folded(new_run: NewRun) -> None:
    folder = real(new_run("org-1", "org-2", rounds=2, server={**FOLD, "late": "ignore"}))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": by_round(-400.0, 1.0, 10)})
    slow_last(folder, grid)
    assert_moved(play(folder, grid).state, initial(folder), by=2.0)


def test_an_ignored_late_update_that_is_seen_is_told_of(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pull was under way as the round ended."""
    folder = real(new_run("org-1", "org-2", rounds=2, server={**FOLD, "late": "ignore"}))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": by_round(-400.0, 1.0, 10)})
    hang = grid.hangs["org-2"] = threading.Event()

    def releases(who: str, message: Any) -> None:
        if message.metadata.group_id == "2":
            grid.delay["org-1"] = 0.2
            hang.set()

    grid.on_push = releases
    assert_moved(play(folder, grid).state, initial(folder), by=2.0)
    assert told(folder, "late_update_ignored") == [
        {"event": "late_update_ignored", "round": 2, "organization": "org-2", "of_round": 1}
    ]


TABLE = {"model": {"base": "b"}, "data": {"source": "d"}, "privacy": "none", "server": {"late": "fold"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": "median"}, 'the fusion "median" is not supported with server.late = fold'),
        ({"strategy": {"fusion": "ties"}}, 'the fusion "ties" is not supported with server.late = fold'),
        ({"strategy": "scaffold"}, 'client term "scaffold" is not supported with server.late = fold'),
        ({"strategy": {"weighting": "noise_aware"}}, 'weighting "noise_aware" is not supported with server.late = fold'),
        ({"strategy": {"weighting": "inverse_loss"}}, 'weighting "inverse_loss" is not supported'),
        ({"train": [{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1}]}, "several stages"),
        ({"train": "lora", "lora": {"smaller_ranks": True}}, "adapters of different ranks"),
        (
            {"client_privacy": {"epsilon": 8.0}, "strategy": {"weighting": "uniform"}},
            'is not supported with client_privacy, which bounds what an organization adds to one round: expected late = "ignore"',
        ),
    ],
)
def test_late_fold_is_refused_for_rules_that_cannot_fold(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError) as error:
        parse_plan({**TABLE, **changes})
    assert reason in str(error.value)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedprox"])
def test_running_means_can_take_late_updates(strategy: str) -> None:
    assert parse_plan({**TABLE, "strategy": strategy}).server.late == "fold"


def test_a_late_update_that_comes_twice_is_folded_in_once(new_run: NewRun) -> None:
    """org-2 is asked twice in round 1, as it reconnects, and the pulls of both its answers hang until round 2."""
    folder = real(new_run("org-1", "org-2", rounds=2, server=FOLD))
    grid = wild(folder, {"org-1": adding(1.0, 10), "org-2": by_round(-4.0, 5.0, 30)})
    hang = grid.hangs["org-2"] = threading.Event()

    def releases(who: str, message: Any) -> None:
        if message.metadata.group_id == "1":
            grid.since["org-2"] = "a little later"
        else:
            grid.delay["org-1"] = 0.4
            hang.set()

    grid.on_push = releases
    progress = play(folder, grid)
    assert grid.pushed["org-2"] == 3
    weight = 30 / math.sqrt(2)
    assert_moved(progress.state, initial(folder), by=1 + (10 * 1 + 30 * 5 + weight * -4) / (40 + weight))
    assert [entry["late"] for entry in progress.history] == [[], [{"organization": "org-2", "round": 1}]]

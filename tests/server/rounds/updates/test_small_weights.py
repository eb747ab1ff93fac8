"""The run says of anyone who trains for the whole ε and has hardly a say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from flwr.app import RecordDict

from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.runs.run_folder import RunFolder
from cotune.strategies.types import Update
from tests.support.organizations import Answer, adding, federation, model_of
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import told


def played(folder: RunFolder, answers: Mapping[str, Answer]) -> list[tuple[int, str, float]]:
    """(round, organization, weight) of what was told."""
    train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None)
    return [(event["round"], event["organization"], event["weight"]) for event in told(folder, "weight_is_small")]


def test_member_with_one_record_among_thousands_is_reported_once(new_run: NewRun) -> None:
    """By hand: 1 of 2,001; a tenth of an equal share is 1 of 30."""
    counts = {"org-1": 1_000, "org-2": 1, "org-3": 1_000}
    folder = new_run(*counts, rounds=3, strategy="fedavg")
    found = played(folder, {name: adding(1.0, examples=count) for name, count in counts.items()})
    assert found == [(1, "org-2", pytest.approx(1 / 2_001, abs=1e-4))]


@pytest.mark.parametrize(("small", "shown"), [(51, False), (49, True)])
def test_below_a_tenth_of_an_equal_share(new_run: NewRun, small: int, shown: bool) -> None:
    """Of two, that is 50 of 1,000."""
    folder = new_run("org-1", "org-2", rounds=1, strategy="fedavg")
    found = played(folder, {"org-1": adding(1.0, examples=1_000 - small), "org-2": adding(1.0, examples=small)})
    assert bool(found) is shown


def test_small_weights_are_not_reported_without_count_weighting(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=1, strategy={"weighting": "uniform"})
    assert played(folder, {"org-1": adding(1.0, examples=10_000), "org-2": adding(1.0, examples=1)}) == []


class _Killed(BaseException):
    """As by SIGKILL."""


def test_small_weight_is_reported_when_first_seen_not_on_resume(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", "org-3", rounds=3, strategy="fedavg", server={"quorum": 0.5})
    large = adding(1.0, examples=1_000)
    small = adding(1.0, examples=1)

    def late(request: Request) -> Update | RecordDict:
        return (adding(float("nan")) if request.round == 1 else small)(request)

    def killed(request: Request) -> Update | RecordDict:
        if request.round == 3:
            raise _Killed
        return large(request)

    with pytest.raises(_Killed):
        played(folder, {"org-1": killed, "org-2": small, "org-3": late})
    found = played(RunFolder(folder.path), {"org-1": large, "org-2": small, "org-3": late})
    assert [(round, name) for round, name, _ in found] == [(1, "org-2"), (2, "org-3")]

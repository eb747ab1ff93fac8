"""Organizations that take part only where enough others do, and how a run gets over their waiting for each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from cotune.errors import RunError
from cotune.protocol.signatures import detach
from cotune.protocol.statements import RequestStatement
from cotune.server.rounds.selection import build_cohort, record_waiting
from cotune.server.runs.run_folder import Progress, RunFolder
from tests.support import rounds
from tests.support.events import round_entry
from tests.support.failures import fails_with
from tests.support.organizations import adding
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, told, wild

WAITS = "declined: its rule training.min_cohort does not allow this plan"
OTHER = "declined: its rule training.max_steps does not allow this plan"


def play(folder: RunFolder, declines: Callable[[str, RequestStatement], str]) -> Progress:
    """declines: (organization, the request that is signed) -> why it declines; "" where it does not."""
    names = [participant.name for participant in folder.file.participants]
    grid = wild(folder, {name: adding(1.0) for name in names})
    answered = grid.answer

    def answer(message: Any) -> Any:
        _, signed = detach(message.content)
        assert signed is not None
        reason = declines(grid._name(message), RequestStatement.parse(signed.text))
        return Message(Error(1001, reason), reply_to=message) if reason else answered(message)

    grid.answer = answer  # type: ignore[method-assign]
    return rounds.play(folder, grid)


def wanting(least: int) -> Callable[[str, RequestStatement], str]:
    """All have the rule; org-3 takes no part in the first round for another reason."""

    def declines(name: str, asked: RequestStatement) -> str:
        if (name, asked.round) == ("org-3", 1):
            return OTHER
        return WAITS if asked.cohort < least else ""

    return declines


def test_organizations_waiting_for_each_other_go_on_on_resume(new_run: NewRun) -> None:
    """Two took part in round 1, and each of the three wants three: without a trace of who waited, round 2 fails for ever."""
    folder = real(new_run("org-1", "org-2", "org-3", rounds=3, server={"quorum": 0.6}))
    with fails_with("run.no_quorum", "training.min_cohort"):
        play(folder, wanting(3))
    assert folder.last_round == 1
    [failed] = told(folder, "run_failed")
    assert failed["round"] == 2
    assert failed["reason"].count(WAITS) == 3
    progress = play(folder, wanting(3))
    assert [len(entry["participants"]) for entry in progress.history] == [2, 3, 3]


def test_a_run_of_too_few_organizations_says_so_each_time(new_run: NewRun) -> None:
    """Anyone who is asked counts before the first round: more there are not."""
    folder = real(new_run("org-1", "org-2", rounds=1))
    for _ in range(2):
        with pytest.raises(RunError, match=r"begin a run of more organizations"):
            play(folder, lambda name, asked: WAITS if asked.cohort < 3 else "")
    assert folder.last_round == 0


def test_one_that_declines_otherwise_does_not_count(new_run: NewRun) -> None:
    folder = new_run("a", "b", "c")
    record_waiting(folder, 2, {"a": WAITS, "b": OTHER, "c": "no reply within 5 seconds"})
    entry = round_entry(participants=["c"])
    assert sorted(build_cohort(folder, (entry,), ["a", "b", "c"])) == ["a", "c"]


def test_a_sentence_that_only_contains_the_rule_does_not_count(new_run: NewRun) -> None:
    folder = new_run("a", "b")
    record_waiting(folder, 2, {"a": WAITS, "b": f"its answer is no update: {WAITS}"})
    assert sorted(build_cohort(folder, (round_entry(participants=[]),), ["a", "b"])) == ["a"]


def test_who_waited_in_another_round_does_not_count(new_run: NewRun) -> None:
    folder = new_run("a", "b")
    record_waiting(folder, 3, {"a": WAITS})
    assert build_cohort(folder, (round_entry(participants=["b"]),), ["a", "b"]) == ["b"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"5", json.dumps({"round": 2, "waiting": 7}).encode()])
def test_a_damaged_file_leaves_the_roster_as_it_was(new_run: NewRun, content: bytes) -> None:
    folder = new_run("a", "b")
    Path(folder.path / "cohort.json").write_bytes(content)
    assert build_cohort(folder, (round_entry(participants=["b"]),), ["a", "b"]) == ["b"]


def test_cohort_is_asked_at_first_then_participants_and_waiting(new_run: NewRun) -> None:
    folder = new_run("a", "b")
    assert build_cohort(folder, (), ["a", "b"]) == ["a", "b"]
    dropped = [{"organization": "b", "reason": OTHER}, {"organization": "c", "reason": WAITS}]
    assert build_cohort(folder, (round_entry(participants=["a"], dropped=dropped),), ["a", "b", "c"]) == ["a", "c"]

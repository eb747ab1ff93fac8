"""Who is sent the whole state, and who what has changed since the version that it has."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from cotune.plan.plan import Plan
from cotune.protocol.changes import RoundChange
from cotune.protocol.messages import Recipient, Request, decode_request, state_digest
from cotune.protocol.refusals import WHOLE_STATE, VersionLost
from cotune.protocol.signatures import SIGNED
from cotune.reporting.documents.rounds import LateEntry, RoundEntry
from cotune.server.rounds.round_requests import RoundRequests, find_held
from cotune.server.runs.events import read_events
from cotune.strategies.types import Update
from tests.support.organizations import Answer, adding
from tests.support.rounds import NAMES, dropped, play, simulate
from tests.support.run_folders import NewRun
from tests.support.unreliable_grid import real, told, wild

PEOPLE = [Recipient(name) for name in ("a", "b", "c")]


@pytest.fixture
def plan(new_run: NewRun) -> Plan:
    return new_run(rounds=6, wire_down="int8").plan


def made(plan: Plan, rounds: int = 2, added: int = 0) -> RoundRequests:
    """The requests of a round after some that have changed w. added: how many values the last one has added."""
    before = {"w": torch.zeros(4096)}
    state = {"w": torch.zeros(4096), **({"new": torch.ones(added)} if added else {})}
    changes = [
        RoundChange(number, state_digest(before), frozenset(before), {"w": torch.ones(4096)}) for number in range(1, rounds + 1)
    ]
    return RoundRequests(plan, rounds + 1, state, {}, changes=changes)


def counts(contents: dict[str, RecordDict]) -> dict[str, int | None]:
    """Organization -> number of changes; None: the whole state."""
    read = {name: decode_request(content, "int8") for name, content in contents.items()}
    return {name: len(request.changes) if request.versions else None for name, request in read.items()}


def test_everybody_gets_what_it_lacks(plan: Plan) -> None:
    assert counts(made(plan).encode(PEOPLE, {"a": 2, "b": 1})) == {"a": 1, "b": 2, "c": None}


def test_the_whole_is_sent_where_changes_are_no_fewer_bytes(plan: Plan) -> None:
    found = counts(made(plan, rounds=5).encode(PEOPLE, {"a": 5, "b": 2, "c": 1}))
    assert found == {"a": 1, "b": None, "c": None}  # a quarter each, and the same heads
    assert counts(made(plan, added=4096).encode(PEOPLE, {"a": 2})) == {"a": 1, "b": None, "c": None}
    assert counts(made(plan, rounds=3, added=4096).encode(PEOPLE, {"a": 1})) == {"a": 3, "b": None, "c": None}


def test_changes_of_many_arrays_are_sent_one_at_a_time(plan: Plan) -> None:
    """Where those of two rounds would be more than an organization takes."""
    state = {f"w{number}": torch.zeros(1000) for number in range(5000)}
    changes = [RoundChange(number, 64 * "0", frozenset(state), state) for number in (1, 2)]
    requests = RoundRequests(plan, 3, state, {}, changes=changes, stays=True)
    assert counts(requests.encode(PEOPLE[:2], {"a": 2, "b": 1})) == {"a": 1, "b": None}


def test_a_whole_request_has_the_signature_of_the_other(plan: Plan) -> None:
    requests = made(plan)
    content = requests.encode(PEOPLE, {"a": 2})["a"]
    content[SIGNED] = ConfigRecord({"statement": "said", "signature": "signed"})
    exchange = requests.to_whole(PEOPLE)
    assert exchange is not None
    whole = exchange("a", content)
    assert whole[SIGNED] is content[SIGNED]
    rest = RecordDict({name: record for name, record in whole.items() if name != SIGNED})
    assert decode_request(rest, "int8").versions == ()
    assert made(plan.model_copy(update={"wire_down": "float32"}), rounds=0).to_whole(PEOPLE) is None


def entry(round: int, *participants: str, late: dict[str, int] | None = None) -> RoundEntry:
    folded = [LateEntry(organization=name, round=number) for name, number in (late or {}).items()]
    return RoundEntry.model_construct(round=round, participants=list(participants), late=folded)


def test_who_answered_has_the_state_of_that_round() -> None:
    history = [entry(1, "a", "b"), entry(2, "a"), entry(3, "c", late={"b": 2}), entry(4, "c", late={"a": 1})]
    changes = [RoundChange(number, 64 * "0", frozenset(), {}) for number in (1, 2, 3, 4)]
    assert find_held(history, changes) == {"a": 2, "b": 2, "c": 4}
    assert find_held(history, changes[2:]) == {"a": 1, "b": 2, "c": 4}  # too old to be built on, all but c
    assert find_held(history, []) == {}


def test_who_asks_for_the_whole_twice_is_dropped(new_run: NewRun) -> None:
    """A member that has the whole state and asks for it again: the round goes on without it, as after any refusal."""
    folder = new_run("org-1", "org-2", "org-3", rounds=2, wire_down="int8")
    asked: list[int] = []

    def never(request: Request) -> Update:
        asked.append(len(request.versions))
        raise VersionLost("the site is empty")

    progress = simulate(folder, {"org-1": adding(1.0), "org-2": adding(1.0), "org-3": never})
    assert dropped(progress) == [{"org-3": WHOLE_STATE}] * 2
    assert asked == [0, 0, 0, 0]  # twice in each round, with the whole
    sent = [event for event in read_events(folder.events.path) if event.event == "whole_state_sent"]
    assert [(event["round"], event["organization"]) for event in sent] == [(1, "org-3"), (2, "org-3")]


def test_a_round_that_is_not_applied_is_a_change_by_nothing(new_run: NewRun) -> None:
    """With an array for each that is shared: by those of requests, the public port judges how many an answer may have."""
    folder = new_run("org-1", "org-2", rounds=3, wire_down="int8")
    held: list[dict[str, torch.Tensor]] = []

    def answer(request: Request) -> Update:
        held.append(dict(request.state))
        if request.round > 1:
            assert request.changes[-1].keys() == request.state.keys()
        return adding(1.5e4 if request.round == 1 else 1.0)(request)

    progress = simulate(folder, {"org-1": answer, "org-2": answer})
    assert [entry.applied for entry in progress.history] == [False, True, True]
    assert [len(entry.participants) for entry in progress.history] == [2, 2, 2]
    assert all(torch.equal(held[0][name], held[2][name]) for name in held[0])
    down = [entry.bytes_down for entry in progress.history]
    assert down[0] > down[1] == down[2]


def test_in_a_real_run_the_whole_is_sent_under_the_same_signature(new_run: NewRun) -> None:
    """With keys, signatures and a trail: org-2 loses its version once, org-3 in each round, and both train in it."""
    folder = real(new_run(*NAMES, rounds=3, wire_down="int8"))
    forgets = {("org-2", 2), *(("org-3", round) for round in (2, 3))}
    statements: dict[tuple[str, int], list[str]] = defaultdict(list)

    def answers(name: str) -> Answer:
        def answer(request: Request) -> Update:
            if request.versions and (name, request.round) in forgets:
                raise VersionLost("the site is empty")
            return adding(1.0)(request)

        return answer

    grid = wild(folder, {name: answers(name) for name in NAMES})

    def note(name: str, message: Message) -> None:
        signed = message.content[SIGNED]
        assert isinstance(signed, ConfigRecord)
        statements[name, int(message.metadata.group_id)].append(str(signed["statement"]))

    grid.on_push = note
    progress = play(folder, grid)
    assert dropped(progress) == [{}, {}, {}]
    assert {key for key, asked in statements.items() if len(asked) > 1} == forgets
    assert all(len(set(asked)) == 1 for asked in statements.values())
    sent = told(folder, "whole_state_sent")
    assert {(event["organization"], event["round"]) for event in sent} == forgets

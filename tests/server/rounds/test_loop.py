from __future__ import annotations

import itertools
import json
import math
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors import safe_open

from cotune.data.metrics.metrics import ClassMetrics
from cotune.errors import RunError
from cotune.flower.inprocess_grid import InProcessGrid
from cotune.protocol.messages import Request, encode_update
from cotune.protocol.version import PROTOCOL
from cotune.server.app import train_rounds
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import Participant, Progress, RunFile, RunFolder
from cotune.server.time_limits import TimeLimits
from cotune.strategies.sums import weighted
from cotune.strategies.types import Update, WeightedUpdate
from tests.support.failures import fails_with
from tests.support.organizations import Answer, adding, federation, model_of, update
from tests.support.rounds import assert_moved, initial, raises, same
from tests.support.rounds import simulate as play
from tests.support.run_folders import NewRun

# --- what a round computes


def test_fedavg_of_two_organizations_with_unequal_weights(new_run: NewRun) -> None:
    """By hand: (10 · 1 + 30 · (−3)) / 40 = −2 in each round."""
    folder = new_run("org-1", "org-2", rounds=2)
    start = initial(folder)
    progress = play(folder, {"org-1": adding(1.0, examples=10), "org-2": adding(-3.0, examples=30)})
    assert progress.round == 2
    assert_moved(progress.state, start, by=-4.0)
    assert_moved(folder.load().state, start, by=-4.0)


def test_uniform_weighting_forgets_the_sizes(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=1, strategy={"weighting": "uniform"})
    start = initial(folder)
    progress = play(folder, {"org-1": adding(1.0, examples=10), "org-2": adding(-3.0, examples=30)})
    assert_moved(progress.state, start, by=-1.0)


def test_server_momentum_is_kept_in_the_checkpoint(new_run: NewRun) -> None:
    """By hand, lr ½, momentum ½, D = 1: v = 1, 1½, 1¾ and θ = ½ (1 + 1½ + 1¾) = 2⅛, also when the run stops in between."""

    def stops(request: Request) -> Any:
        return adding(1.0)(request) if request.round < 3 else 1 / 0

    folder = new_run("org-1", rounds=3, strategy={"server_optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.5}})
    start = initial(folder)
    with pytest.raises(RunError):
        play(folder, {"org-1": stops})
    assert_moved(
        folder.load().memory, {f"optimizer/{name}": torch.zeros_like(t, dtype=torch.float64) for name, t in start.items()}, by=1.5
    )
    assert_moved(play(folder, {"org-1": adding(1.0)}).state, start, by=2.125)


def test_every_organization_gets_the_state_of_the_round_before(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=3)
    start = initial(folder)
    seen = defaultdict[str, list[Request]](list)

    def remembers(request: Request) -> Any:
        seen[request.organization].append(request)
        return adding(1.0)(request)

    play(folder, {"org-1": remembers, "org-2": remembers})
    for name, requests in seen.items():
        assert [request.round for request in requests] == [1, 2, 3]
        for i, request in enumerate(requests):
            assert (request.plan, request.organization) == (folder.plan.canonical(), name)
            assert_moved(dict(request.state), start, by=float(i))


def test_a_stage_adds_its_parameters_and_shares_only_its_own(new_run: NewRun) -> None:
    folder = new_run("org-1", train=[{"mode": "full", "rounds": 1}, {"mode": "head", "rounds": 1}])
    model = model_of(folder.plan)
    asked = dict[int, set[str]]()

    def trains(request: Request) -> Any:
        asked[request.round] = set(request.state)
        stage = "full" if request.round == 1 else "head"
        names = model.names(stage)
        return update(request, {name: torch.ones_like(request.state[name]) for name in names})

    progress = play(folder, {"org-1": trains})
    full = set(model.names("full"))
    head = set(model.names("head"))
    assert head < full
    assert asked == {1: full, 2: full}  # who trains the head needs the moved encoder too
    model.load({})
    start = model.state(sorted(full))
    for name in full:
        torch.testing.assert_close(progress.state[name], start[name] + (2 if name in head else 1))


def test_the_history_holds_what_happened(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=2, privacy={"epsilon": 8.0, "delta": 1e-5})
    metrics = iter(
        [ClassMetrics(0.25, 0.5, 0.75, 1.0), ClassMetrics(0.25, 0.5, 0.75, 1.0), ClassMetrics(0.5, 0.5, 0.5, 0.5)]
    )  # first: before all

    def spends(request: Request) -> Any:
        delta = {name: torch.ones_like(t) for name, t in request.state.items()}
        return update(request, delta, epsilon=float(request.round))

    grid = federation(folder.plan, {"org-1": spends, "org-2": adding(1.0)})
    first, second = train_rounds(grid, folder, model_of(folder.plan), lambda state: next(metrics)).history
    assert first["metrics"] == {"accuracy": 0.25, "precision": 0.5, "recall": 0.75, "f1": 1.0}
    assert (first["round"], first["stage"], first["dropped"]) == (1, "head", [])
    assert first["participants"] == ["org-1", "org-2"]
    assert (first["applied"], first["suspects"], first["weights"]) == (True, [], {"org-1": 0.5, "org-2": 0.5})
    assert first["norms"] == {"org-1": pytest.approx(51**0.5, rel=1e-3), "org-2": pytest.approx(51**0.5, rel=1e-3)}
    assert (first["epsilon"], second["epsilon"]) == ({"org-1": 1.0}, {"org-1": 2.0})
    arrays = 4 * (3 * 16 + 3)  # bytes of a float32 head for 3 classes on 16 features
    assert 2 * arrays < first["bytes_up"] < 2 * (arrays + 1000)
    assert 2 * (arrays + len(folder.plan.canonical())) < first["bytes_down"] < 2 * (arrays + len(folder.plan.canonical()) + 1000)


def test_fewer_nodes_serve_several_organizations_each(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", "org-3", rounds=1)
    start = initial(folder)
    answers = {"org-1": adding(1.0), "org-2": adding(2.0), "org-3": adding(6.0)}
    several = federation(folder.plan, answers)
    two = InProcessGrid(several._app, 2)
    assert_moved(train_rounds(two, folder, model_of(folder.plan), lambda state: None).state, start, by=3.0)


def test_requests_of_real_organizations_name_no_site(new_run: NewRun) -> None:
    simulated = new_run("org-1", rounds=1)
    file = RunFile(run="real", created="2026-01-01T00:00:00+00:00", engine="flower", participants=(Participant(name="org-1"),))
    folder = RunFolder.create(simulated.path.parent / "real", simulated.plan, file)
    sites = []

    def remembers(request: Request) -> Any:
        sites.append(request.site)
        return adding(1.0)(request)

    assert play(folder, {"org-1": remembers}).round == 1
    assert sites == [""]


# --- replies are streamed


class Watching(InProcessGrid):
    """Counts the replies that are alive, as messages or as decoded updates, whenever a new one comes."""

    replies: list[weakref.ref[Any]]
    alive: list[int]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in super().pull_messages(message_ids):
            self.alive.append(sum(other() is not None for other in self.replies))
            self.replies.append(weakref.ref(reply))
            yield reply
            del reply


def test_the_server_holds_one_reply_at_a_time_beside_the_sum(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    Watching.replies = []
    Watching.alive = []

    def watched(update: WeightedUpdate) -> dict[str, torch.Tensor]:
        Watching.replies.append(weakref.ref(next(iter(update.update.delta.values()))))
        return weighted(update)

    monkeypatch.setattr("cotune.strategies.fusions.averaging.mean.weighted", watched)
    names = [f"org-{i}" for i in range(8)]
    folder = new_run(*names, rounds=2)
    play(folder, {name: adding(1.0) for name in names}, Watching)
    assert Watching.alive == [0] * 16  # when a reply comes, nothing of the others is held any more


class Delayed(InProcessGrid):
    """Replies become available in a given order: each one only when `polls` pulls were made in vain for its place."""

    order: tuple[str, ...] = ()
    never: tuple[str, ...] = ()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.pulls = 0
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        ready = []
        for number in message_ids:
            message = self._pending.get(number)
            name = str(message.content.config_records["request"]["organization"]) if message else ""
            waits = self.order.index(name) if name in self.order else 0
            if name not in self.never and self.pulls > waits:
                ready.append(number)
        return super().pull_messages(ready)


def test_order_of_replies_does_not_change_the_result(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("org-1", "org-2", "org-3")

    def random(request: Request) -> Any:
        rng = np.random.default_rng([request.round, int(request.organization[-1])])
        scale = 10.0 ** (3 * int(request.organization[-1]) - 6)  # sums of such different sizes depend on their order
        noise = {name: torch.from_numpy(rng.normal(size=t.shape).astype("float32") * scale) for name, t in request.state.items()}
        return update(request, noise, examples=int(request.organization[-1]) * 7)

    hurried = TimeLimits(poll=0.001)
    results = []
    for order in itertools.permutations(names):
        monkeypatch.setattr(Delayed, "order", order)
        folder = new_run(*names, rounds=2, server={"max_update_norm": 1e12})
        results.append(play(folder, dict.fromkeys(names, random), Delayed, hurried).state)
    assert all(same(results[0], other) for other in results[1:])


# --- what is not as agreed is left out


def ones(request: Request) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in request.state.items()}


def record(request: Request, arrays: Mapping[str, Array] | None = None, **fields: Any) -> RecordDict:
    """A well-formed update, but for the given arrays and header fields."""
    plan_id = fields.pop("plan_id", None)
    good = encode_update(update(request, ones(request)), plan_id or PLAN_ID[0])
    header = {**good.config_records["update"], **fields}
    content = RecordDict({"delta": good.array_records["delta"], "update": ConfigRecord(header)})
    if arrays is not None:
        content["delta"] = ArrayRecord({**good.array_records["delta"], **arrays})
    return content


def test_refused_message_in_process_is_kept_as_written(new_run: NewRun) -> None:
    """In process, where tensors stand in the place of arrays."""

    def hostile(request: Request, *, stays: bool) -> RecordDict:
        return encode_update(update(request, ones(request), examples=0), folder.plan.plan_id, stays=stays)

    found = []
    for stays in (True, False):
        folder = new_run("org-1", "org-2", rounds=1)
        play(folder, {"org-1": lambda request: update(request, ones(request)), "org-2": partial(hostile, stays=stays)})
        with safe_open(folder.path / "quarantine" / "round-00001-org-2.safetensors", framework="np") as kept:
            about = json.loads(kept.metadata()["quarantine"])
            found.append([about["arrays"], about["bytes"], *(len(kept.get_tensor(name)) for name in kept.keys())])  # noqa: SIM118
    assert found[0] == found[1]
    assert found[0][1] > 0


@pytest.mark.parametrize(
    ("strategy", "harm", "reason"),
    [
        ("fednova", {"steps": 0}, "it states 0 steps, expected 1 to 20"),
        ("fednova", {"steps": 21}, "it states 21 steps, expected 1 to 20"),
        (
            {"weighting": {"name": "q_fair", "q": 2.0}},
            {"disclosures": {"loss": 1e200}},
            "it discloses a loss of 1e+200, expected 0 to 1e+06",
        ),
        (
            {"recipe": "qfedavg", "fusion": {"q": 2.0}},
            {"disclosures": {"loss": 1e200}},
            "it discloses a loss of 1e+200, expected 0 to 1e+06",
        ),
    ],
)
def test_no_number_that_an_organization_states_ends_the_run(
    new_run: NewRun, strategy: Any, harm: dict[str, Any], reason: str
) -> None:
    told = {"loss": 1.0} if "disclosures" in harm else {}  # what the strategy asks for, and nothing else

    def honest(request: Request) -> Update:
        return update(request, ones(request), steps=20, disclosures=told)

    def hostile(request: Request) -> Update:
        return update(request, ones(request), **{"steps": 20, "disclosures": told, **harm})

    folder = new_run("org-1", "org-2", rounds=1, strategy=strategy)
    [entry] = play(folder, {"org-1": honest, "org-2": hostile}).history
    assert entry["participants"] == ["org-1"]
    assert entry["dropped"] == [{"organization": "org-2", "reason": reason}]


PLAN_ID: list[str] = []  # of the run under test

BAD: dict[str, tuple[Answer, str]] = {
    "raises": (raises, "out of memory"),
    "nan": (lambda r: update(r, {**ones(r), "classifier.bias": torch.tensor([0, math.nan, 0])}), "not finite"),
    "infinite": (lambda r: update(r, {**ones(r), "classifier.bias": torch.full((3,), -math.inf)}), "not finite"),
    "shape": (lambda r: update(r, {**ones(r), "classifier.bias": torch.ones(4)}), "classifier.bias has the shape (4,)"),
    "too few": (lambda r: update(r, {"classifier.bias": torch.ones(3)}), "lacks 1 (classifier.weight)"),
    "too many": (lambda r: update(r, {**ones(r), "bert.x": torch.ones(3)}), "1 parameters too many"),
    "empty": (lambda r: update(r, {}), "lacks 2"),
    "huge": (lambda r: update(r, {n: 1e6 * t for n, t in ones(r).items()}), "expected at most 10000"),
    "other plan": (lambda r: record(r, plan_id="0" * 64), "received an update for plan 000000000000"),
    "other round": (lambda r: update(r, ones(r), round=r.round + 1), "it is for round"),
    "other name": (lambda r: update(r, ones(r), organization="good-1"), "it is from good-1, expected bad"),
    "no examples": (lambda r: update(r, ones(r), examples=0), "it declares 0 examples"),
    "protocol": (lambda r: record(r, protocol=99), f"protocol 99, expected {PROTOCOL}"),
    "type": (lambda r: record(r, examples="many"), "examples = 'many': expected int"),
    "noise": (lambda r: update(r, ones(r), noise_variance={"classifier.bias": 1.0}), "it states noise for 1 parameters"),
    "float64": (lambda r: record(r, {"classifier.bias": Array(np.ones(3))}), "has the type float64"),
    "pickle": (
        lambda r: record(r, {"classifier.bias": Array("float32", (3,), "numpy.ndarray", b"\x80\x04N.")}),
        "classifier.bias cannot be read",
    ),
    "nothing": (lambda r: RecordDict(), "without its header"),
    "no arrays": (lambda r: RecordDict({"update": record(r)["update"]}), "without its arrays"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_update_is_dropped_with_its_reason(new_run: NewRun, kind: str) -> None:
    answer, reason = BAD[kind]
    folder = new_run("good-1", "bad", "good-2", rounds=2, server={"max_update_norm": 1e4})
    PLAN_ID[:] = [folder.plan.plan_id]
    start = initial(folder)
    progress = play(folder, {"good-1": adding(1.0), "bad": answer, "good-2": adding(3.0)})
    assert_moved(progress.state, start, by=4.0)
    for entry in progress.history:
        assert entry["participants"] == ["good-1", "good-2"]
        (dropped,) = entry["dropped"]
        assert dropped["organization"] == "bad"
        assert reason in dropped["reason"]
    told = [
        event for event in read_events(folder.path / "events.jsonl") if event["event"] in ("update_dropped", "update_quarantined")
    ]
    assert [(event["round"], event["organization"], event["reason"]) for event in told] == [
        (entry["round"], "bad", entry["dropped"][0]["reason"]) for entry in progress.history
    ]


def test_an_update_as_the_wire_test_helper_makes_it_is_good(new_run: NewRun) -> None:
    """So that the bad ones above are bad for their own reason only."""
    folder = new_run("org-1", rounds=1)
    PLAN_ID[:] = [folder.plan.plan_id]
    assert play(folder, {"org-1": record}).history[0]["dropped"] == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_any_stated_epsilon_leaves_history_valid_json(new_run: NewRun, value: float) -> None:
    def states(request: Request) -> Any:
        return record(request, epsilon=value)

    folder = new_run("org-1", "org-2", rounds=1)
    PLAN_ID[:] = [folder.plan.plan_id]
    progress = play(folder, {"org-1": adding(1.0), "org-2": states})
    assert [d["organization"] for d in progress.history[0]["dropped"]] == ["org-2"]
    for line in (folder.path / "events.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


@pytest.mark.parametrize("extra", [{"note": ""}, {"note": b""}, {"note": []}])
def test_a_field_that_nobody_asked_for_does_not_stop_the_server(new_run: NewRun, extra: dict[str, Any]) -> None:
    folder = new_run("org-1", "org-2", rounds=1)
    PLAN_ID[:] = [folder.plan.plan_id]
    progress = play(folder, {"org-1": adding(1.0), "org-2": lambda request: record(request, **extra)})
    assert "org-1" in progress.history[0]["participants"]


# --- quorum, deadlines, nodes


def test_below_quorum_the_run_fails_and_keeps_the_rounds_before(new_run: NewRun) -> None:
    def fails_in_round_two(request: Request) -> Any:
        return adding(1.0)(request) if request.round == 1 else raises(request)

    folder = new_run("org-1", "org-2", "org-3", rounds=3, server={"quorum": 0.67})
    start = initial(folder)
    answers: dict[str, Answer] = {"org-1": adding(1.0), "org-2": fails_in_round_two, "org-3": raises}
    with fails_with("run.no_quorum", "1", "2", "3", "3", "org-3"):
        play(folder, answers)
    assert folder.load() == Progress()
    answers["org-3"] = adding(1.0)
    with fails_with("run.no_quorum", "2", "2", "3", "0.67", "org-2"):
        play(folder, answers)
    assert folder.load().round == 1
    assert_moved(folder.load().state, start, by=1.0)
    failed = [event for event in read_events(folder.path / "events.jsonl") if event["event"] == "run_failed"]
    assert [event["round"] for event in failed] == [1, 2]
    assert "org-2" in failed[1]["reason"]
    answers["org-2"] = adding(1.0)
    assert_moved(play(folder, answers).state, start, by=3.0)
    assert [entry["round"] for entry in folder.load().history] == [1, 2, 3]


def test_one_update_is_needed_however_small_the_quorum(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=1, server={"quorum": 0.01})
    with fails_with("run.no_quorum", "1", "0", "2", "1"):
        play(folder, {"org-1": raises, "org-2": raises})


def test_a_quorum_is_not_rounded_up_by_a_bit(new_run: NewRun) -> None:
    """In floating point 0.55 · 20 is more than 11."""
    names = [f"org-{i}" for i in range(20)]
    folder = new_run(*names, rounds=1, server={"quorum": 0.55})
    answers: dict[str, Answer] = {name: adding(1.0) if i < 11 else raises for i, name in enumerate(names)}
    assert len(play(folder, answers).history[0]["participants"]) == 11


def test_half_is_a_quorum_of_a_half(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5})
    assert play(folder, {"org-1": raises, "org-2": adding(1.0)}).round == 1


def test_a_reply_that_never_comes_is_dropped_after_the_deadline(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"org-{i}" for i in range(1, 5)]
    monkeypatch.setattr(Delayed, "never", ("org-1", "org-3"))
    monkeypatch.setattr(Delayed, "order", ())
    folder = new_run(*names, rounds=1, server={"deadline_seconds": 2.0})
    start = initial(folder)
    began = time.monotonic()
    progress = play(folder, {name: adding(1.0) for name in names}, Delayed)
    assert time.monotonic() - began >= 2.0
    reason = "no reply within 2 seconds"
    assert progress.history[0]["dropped"] == [{"organization": name, "reason": reason} for name in ("org-1", "org-3")]
    assert progress.history[0]["participants"] == ["org-2", "org-4"]
    assert_moved(progress.state, start, by=1.0)


class Nodeless(InProcessGrid):
    asked = 0
    until = 10**9

    def get_node_ids(self) -> Iterable[int]:
        type(self).asked += 1
        return [] if self.asked <= self.until else super().get_node_ids()


def test_without_nodes_the_run_fails_after_a_while(new_run: NewRun) -> None:
    folder = new_run("org-1", rounds=1, server={"wait_seconds": 0.1})
    with fails_with("run.too_few_connected", "1", "0", "1", "0.1", "1", "org-1"):
        play(folder, {"org-1": adding(1.0)}, Nodeless)
    assert [event["event"] for event in read_events(folder.path / "events.jsonl")][-1] == "run_failed"


def test_a_node_that_comes_late_is_waited_for(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nodeless, "asked", 0)
    monkeypatch.setattr(Nodeless, "until", 3)
    assert play(new_run("org-1", rounds=1), {"org-1": adding(1.0)}, Nodeless).round == 1


def test_a_finished_run_is_not_played_again(new_run: NewRun) -> None:
    folder = new_run("org-1", rounds=2)
    first = play(folder, {"org-1": adding(1.0)})
    again = play(folder, {"org-1": raises})
    assert again.round == 2
    assert same(first.state, again.state)

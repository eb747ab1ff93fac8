"""Client-level privacy in the round loop: what is released, what is charged, and when the run must end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from cotune.data.metrics.metrics import Metrics
from cotune.errors import PlanError, RunError
from cotune.models.trainable import State
from cotune.privacy import client_dp as private_mean
from cotune.privacy.accounting.composition import Steps
from cotune.protocol.messages import Request
from cotune.server.app import train_rounds
from cotune.server.rounds.client_dp import ClientLevelPrivacy
from cotune.server.rounds.selection import select
from cotune.server.runs.client_privacy import open_client_account
from cotune.server.runs.events import read_events
from cotune.server.runs.run_folder import Progress, RunFolder
from tests.support.failures import fails_with
from tests.support.organizations import Answer, adding, federation, model_of, update
from tests.support.run_folders import NewRun
from tests.support.silent_noise import SILENT

UNIFORM = {"weighting": "uniform"}


def play(folder: RunFolder, answers: Mapping[str, Answer]) -> Progress:
    return train_rounds(federation(folder.plan, answers), folder, model_of(folder.plan), lambda state: None)


def private_run(new_run: NewRun, *names: str, client_privacy: dict[str, Any] | None = None, **changes: Any) -> RunFolder:
    return new_run(*names, client_privacy=client_privacy or {"clip_norm": 1.0}, strategy=UNIFORM, **changes)


def initial(folder: RunFolder) -> State:
    model = model_of(folder.plan)
    model.load({})
    return model.state(model.names("head"))


def gaps(state: State, start: State) -> torch.Tensor:
    return torch.cat([(state[name] - start[name]).double().flatten() for name in start])


def charges(folder: RunFolder) -> list[tuple[int, Steps]]:
    assert folder.plan.client_privacy is not None
    return open_client_account(folder, folder.plan.client_privacy).charges()


def crashes_in_round(number: int) -> Answer:
    def answer(request: Request) -> Any:
        if request.round == number:
            raise MemoryError("out of memory")
        return adding(1.0)(request)

    return answer


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, to see what it is added to."""
    monkeypatch.setattr(private_mean, "private_generator", lambda: SILENT)


# --- what is released


@pytest.mark.usefixtures("silent")
def test_updates_are_clipped_and_divided_by_the_expected_number(new_run: NewRun) -> None:
    """51 coordinates of 1 have the norm √51: clipped to 1 each is 1/√51. Of three organizations one stays away: K is 3 still."""
    folder = private_run(new_run, "org-1", "org-2", "org-3", rounds=1)
    start = initial(folder)
    answers = {"org-1": adding(1.0, examples=1000), "org-2": adding(9.0, examples=1), "org-3": crashes_in_round(1)}
    moved = gaps(play(folder, answers).state, start)
    torch.testing.assert_close(moved, torch.full_like(moved, 2 / 3 / math.sqrt(len(moved))), rtol=1e-4, atol=1e-6)


def test_the_noise_in_the_model_is_zc_over_k(new_run: NewRun) -> None:
    folder = private_run(new_run, rounds=40, client_privacy={"clip_norm": 0.5, "epsilon": 3.0})
    start = initial(folder)
    z = ClientLevelPrivacy.of(folder).noise.charge.noise_multiplier  # type: ignore[union-attr]
    progress = play(folder, dict.fromkeys(("org-1", "org-2"), lambda r: update(r, {n: 0 * t for n, t in r.state.items()})))
    assert float(gaps(progress.state, start).std()) == pytest.approx(math.sqrt(40) * z * 0.5 / 2, rel=0.35)
    entries = [entry["client_privacy"] for entry in progress.history]
    assert [e["clip_norm"] for e in entries] == [0.5] * 40
    assert [e["unclipped"] for e in entries] == [None] * 40
    assert entries[0]["epsilon"] < entries[-1]["epsilon"] <= 3.0


@pytest.mark.usefixtures("silent")
def test_the_server_optimizer_comes_after_the_noise(new_run: NewRun) -> None:
    strategy = {**UNIFORM, "server_optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.5}}
    folder = new_run("org-1", rounds=2, client_privacy={"clip_norm": 1.0}, strategy=strategy)
    start = initial(folder)
    moved = gaps(play(folder, {"org-1": adding(1.0)}).state, start)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * 2.5 / math.sqrt(len(moved))), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("silent")
def test_adaptive_clip_norm_is_checkpointed_and_follows_norms(new_run: NewRun) -> None:
    """All norms are above C: it grows by e^(η/2) a round, through a crash as well."""
    adaptive = {"clipping": "adaptive", "clip_norm": 0.1, "clip_learning_rate": 0.4}
    folder = private_run(new_run, "org-1", client_privacy=adaptive, rounds=3)
    with pytest.raises(RunError):
        play(folder, {"org-1": crashes_in_round(3)})
    progress = play(folder, {"org-1": adding(1.0)})
    entries = [entry["client_privacy"] for entry in progress.history]
    assert [e["clip_norm"] for e in entries] == pytest.approx([0.1 * math.exp(0.2 * i) for i in range(3)])
    assert [e["unclipped"] for e in entries] == [0.0] * 3
    assert folder.load().clip_norm == pytest.approx(0.1 * math.exp(0.6))


# --- what is charged


def test_every_round_is_charged_before_its_noise_is_drawn(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private_run(new_run, rounds=2)
    seen = []
    draw = private_mean.PrivateMean.result

    def watched(self: private_mean.PrivateMean) -> Any:
        seen.append([round for round, _ in charges(folder)])
        return draw(self)

    monkeypatch.setattr(private_mean.PrivateMean, "result", watched)
    play(folder, dict.fromkeys(("org-1", "org-2"), adding(1.0)))
    assert seen == [[1], [1, 2]]


def test_a_round_without_its_quorum_is_not_charged(new_run: NewRun) -> None:
    folder = private_run(new_run, "org-1", rounds=2)
    with fails_with("run.no_quorum", "2", "0", "1"):
        play(folder, {"org-1": crashes_in_round(2)})
    assert [round for round, _ in charges(folder)] == [1]


def interrupted(folder: RunFolder, round: int) -> None:
    """The process ends after the noise of a round was drawn, and before its checkpoint."""

    class Killed(Exception):
        pass

    def judge(state: State) -> Metrics | None:
        if len(folder.load().history) == round - 1:
            raise Killed
        return None

    with pytest.raises(Killed):
        train_rounds(
            federation(folder.plan, dict.fromkeys(("org-1", "org-2"), adding(1.0))), folder, model_of(folder.plan), judge
        )


def test_round_repeated_after_a_crash_is_charged_again(new_run: NewRun) -> None:
    folder = private_run(new_run, rounds=3)
    interrupted(folder, 2)
    assert [round for round, _ in charges(folder)] == [1, 2]
    assert folder.load().round == 1
    answers = dict.fromkeys(("org-1", "org-2"), adding(1.0))
    progress = play(folder, answers)
    assert [round for round, _ in charges(folder)] == [1, 2, 2]
    assert progress.round == 2
    assert folder.finished
    assert folder.stopped is not None
    assert "round 3 would exceed the client-level ε = 8" in folder.stopped
    assert "the model after round 2" in folder.stopped
    assert progress.history[-1]["client_privacy"]["epsilon"] <= 8.0
    told = read_events(folder.path / "events.jsonl")[-1]
    assert (told["event"], told["rounds"], told["reason"]) == ("run_stopped", 2, folder.stopped)


def test_run_with_budget_spent_on_first_round_has_no_model(new_run: NewRun) -> None:
    folder = private_run(new_run, rounds=1)
    interrupted(folder, 1)
    with fails_with("run.no_model", "1"):
        play(folder, dict.fromkeys(("org-1", "org-2"), adding(1.0)))
    assert not folder.finished


def test_a_lost_account_is_noticed(new_run: NewRun) -> None:
    folder = private_run(new_run, rounds=2)
    with pytest.raises(RunError):
        play(folder, dict.fromkeys(("org-1", "org-2"), crashes_in_round(2)))
    (folder.path / "client-privacy.jsonl").unlink()
    with fails_with("privacy.account_incomplete", "1"):
        play(folder, dict.fromkeys(("org-1", "org-2"), adding(1.0)))


def test_without_it_nothing_is_written(new_run: NewRun) -> None:
    folder = new_run("org-1", rounds=1)
    assert ClientLevelPrivacy.of(folder) is None
    assert play(folder, {"org-1": adding(1.0)}).history[0]["client_privacy"] is None
    assert not (folder.path / "client-privacy.jsonl").exists()


# --- who is asked


def names(folder: RunFolder, round: int) -> list[str]:
    return [person.name for person in select(folder, round)]


def test_everybody_is_asked_unless_the_plan_samples(new_run: NewRun) -> None:
    assert names(new_run("org-1", "org-2"), 1) == ["org-1", "org-2"]


def test_sampling_by_the_plans_seed_is_the_same_in_every_run(new_run: NewRun) -> None:
    people = [f"org-{i}" for i in range(50)]
    one, other = (new_run(*people, server={"sample_rate": 0.3}) for _ in range(2))
    drawn = [names(one, round) for round in range(1, 41)]
    assert drawn == [names(other, round) for round in range(1, 41)]
    assert len({tuple(d) for d in drawn}) == 40
    assert sum(map(len, drawn)) == pytest.approx(0.3 * 50 * 40, rel=0.1)
    assert not (one.path / "selection.key").exists()


def test_amplified_selection_draws_by_a_secret_kept_on_resume(new_run: NewRun) -> None:
    people = [f"org-{i}" for i in range(50)]
    settings = {"client_privacy": {"amplification": True}, "server": {"sample_rate": 0.3}}
    one, other = (private_run(new_run, *people, **settings) for _ in range(2))
    assert one.plan.plan_id == other.plan.plan_id
    drawn = [names(one, round) for round in range(1, 11)]
    assert drawn == [names(RunFolder(one.path), round) for round in range(1, 11)]
    assert drawn != [names(other, round) for round in range(1, 11)]
    (one.path / "selection.key").write_text("")
    with fails_with("run.damaged_document", "selection.key"):
        select(one, 1)


def test_only_the_sampled_are_asked_and_the_quorum_is_of_them(new_run: NewRun) -> None:
    people = [f"org-{i}" for i in range(6)]
    folder = new_run(*people, rounds=3, server={"sample_rate": 0.5, "quorum": 1.0})
    progress = play(folder, dict.fromkeys(people, adding(1.0)))
    for entry in progress.history:
        assert entry["participants"] == names(folder, entry["round"])
        assert entry["dropped"] == []


@pytest.mark.parametrize("private", [False, True])
def test_a_round_in_which_nobody_is_drawn_is_played(new_run: NewRun, private: bool) -> None:
    """Without privacy nothing moves; with it there is noise, as not coming must not show."""
    make = private_run if private else new_run
    folder = (
        make(new_run, "org-1", rounds=1, client_privacy={"clip_norm": 1e-6}, server={"sample_rate": 1e-7})
        if private
        else make("org-1", server={"sample_rate": 1e-9})
    )
    start = initial(folder)
    progress = play(folder, {"org-1": adding(1.0)})
    assert progress.history[0]["participants"] == []
    assert bool(gaps(progress.state, start).any()) == private


# --- what a plan may not ask for


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": {"weighting": "examples"}}, 'expected strategy.weighting = "uniform"'),
        ({"strategy": {"weighting": "noise_aware"}}, 'expected strategy.weighting = "uniform"'),
        ({"strategy": {}}, 'the weighting "examples" would undo'),
        ({"client_privacy": {"amplification": True}, "strategy": UNIFORM}, "expected server.sample_rate below 1"),
        ({"client_privacy": {"bit_noise": 0}, "strategy": UNIFORM}, "client_privacy.bit_noise = 0"),
        ({"client_privacy": {"clip": 1.0}, "strategy": UNIFORM}, "Known: amplification, bit_noise"),
        ({"server": {"sample_rate": 0}}, "server.sample_rate = 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(new_run: NewRun, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        new_run("org-1", **{"client_privacy": {}, **changes})


def test_another_fusion_than_the_mean_is_refused(new_run: NewRun) -> None:
    with fails_with("plan.invalid", "strategy.fusion"):
        new_run("org-1", client_privacy={}, strategy={**UNIFORM, "fusion": "median"})
    with fails_with("plan.invalid", "weighting", "noise_aware"):
        new_run("org-1", strategy={"weighting": "noise_aware", "fusion": "median"})


def test_a_checkpoint_of_before_clip_norms_were_kept_can_be_read(new_run: NewRun) -> None:
    folder = new_run("org-1", rounds=1)
    progress = play(folder, {"org-1": adding(1.0)})
    folder.save(replace(progress, clip_norm=0.25))
    assert folder.load().clip_norm == 0.25
    (folder.path / "stopped.json").write_text(json.dumps({"reason": "enough"}))
    assert folder.stopped == "enough"
    (folder.path / "stopped.json").write_text("{")
    with fails_with("run.damaged_document", "stopped.json"):
        _ = folder.stopped

"""The round loop, the same for every engine: send, stream the replies in, admit, fuse, step, evaluate, checkpoint.

Updates are added one at a time, in the order of the organizations, so that the sum is the same no matter who was faster; the
server
never holds more than a few beside the running sum, unless the weighting must compare them (strategies/combination).

The strategy's half of a round: what its parts see, what they remember, and how the fused delta moves the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor

from cotune.data.tasks.task import Metrics
from cotune.errors import PrivacyError, RunError
from cotune.models.trainable import State, TrainableModel, named_under
from cotune.plan.parameters import rewritten_names, shared_names, statistic_shapes
from cotune.plan.schema import Plan
from cotune.protocol.messages import Recipient, encode_requests, received_digest
from cotune.protocol.signatures import TRAIN
from cotune.server.rounds.accuracy_guard import AccuracyGuard, seen, summarize_updates, suspects
from cotune.server.rounds.client_dp import ClientLevelPrivacy
from cotune.server.rounds.replies import Gathering
from cotune.server.rounds.requests import RequestTracker
from cotune.server.rounds.round_result import RoundResult
from cotune.server.rounds.selection import cohort_of, enough, remember_waiting, select
from cotune.server.rounds.session import ExampleBounds, Session
from cotune.server.rounds.update_validation import Verify
from cotune.server.runs.exclusions import fates_of, left_out, remember
from cotune.server.runs.run_folder import Participant, Progress, RunFolder
from cotune.server.runs.run_model import served
from cotune.server.transport.base import Transport
from cotune.server.transport.node_registry import REVOKED
from cotune.strategies.aggregator import build_aggregator, build_client_term, build_server_optimizer
from cotune.strategies.types import Aggregate, Delta, LocalSteps, RoundContext, apply_delta

Score = Callable[[State], float]
_ANY = 10**9  # steps, where the plan gives epochs: each update's are held to its number of records when it is admitted


def begin_round(model: TrainableModel, plan: Plan, state: State, round: int) -> tuple[State, list[str]]:
    """The state, with what this round adds to it at its present values; and the names that the organizations share."""
    model.load(state)
    names = shared_names(plan, model, round)
    wanted = [*names, *rewritten_names(plan, model, round)]
    return {**state, **model.state([name for name in wanted if name not in state])}, names


def context_of(
    plan: Plan, model: TrainableModel, before: Progress, state: State, round: int, *, organizations: int, score: Score | None
) -> RoundContext:
    """What the fusion and the weighting of a round may know."""
    stage = plan.stage_of(round)
    local = stage.local
    return RoundContext(
        round=round,
        rounds=plan.rounds,
        seed=plan.seed,
        organizations=organizations,
        state=state,
        local=LocalSteps(local.learning_rate, local.momentum, local.steps or _ANY),
        adapters=model.adapters() if stage.mode == "lora" else (),
        memory=_remembered(before, "fusion"),
        score=None if score is None else lambda delta: score(apply_delta(state, delta)),
    )


def broadcast_extras(plan: Plan, before: Progress) -> dict[str, Tensor]:
    """What the plan's client term sends to the organizations beside the state."""
    return build_client_term(plan.strategy).send(_remembered(before, "term"))


def move(plan: Plan, before: Progress, state: State, fused: Delta | Aggregate, context: RoundContext) -> tuple[State, State]:
    """The next state, and all that the parts remember: fusion → the client term's server half → server optimizer."""
    fused = fused if isinstance(fused, Aggregate) else Aggregate(fused)
    if not fused.delta:
        return dict(state), dict(before.memory)  # nobody was asked
    delta, term = build_client_term(plan.strategy).fold(fused, _remembered(before, "term"), context)
    optimizer = build_server_optimizer(plan.strategy)
    moved, memory = optimizer.step(state, replace(fused, delta=delta), _remembered(before, "optimizer"), context)
    return moved, {**_named("fusion", fused.memory), **_named("term", term), **_named("optimizer", memory)}


def _remembered(before: Progress, part: str) -> dict[str, Tensor]:
    return named_under(f"{part}/", before.memory)


def _named(part: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for name, tensor in memory.items()}


_HARDLY = 0.1  # of an equal share
Evaluate = Callable[[State], Metrics | None]


@dataclass(frozen=True)
class _Run:
    """What all rounds of a run have in common."""

    session: Session
    post: Transport
    model: TrainableModel
    evaluate: Evaluate
    score: Score | None
    client_level: ClientLevelPrivacy | None
    gathering: Gathering
    guard: AccuracyGuard

    @property
    def folder(self) -> RunFolder:
        return self.session.folder


def run_rounds(session: Session, model: TrainableModel, evaluate: Evaluate, score: Score | None = None) -> Progress:
    """Plays the rounds that are not finished yet, and returns the run after its last.

    evaluate: a state on the common test set. score: its accuracy on the server's own validation records, for rules that judge
    by it, and for the guard, which otherwise judges a real run by the test set, and a simulated one not at all.

    Raises RunError when a round does not reach its quorum; all rounds before are kept.
    """
    folder = session.folder
    plan = folder.plan
    progress = folder.load()
    client_level = ClientLevelPrivacy.of(folder)
    folder.events.tell(
        "run_started",
        folder=str(folder.path),
        plan=plan.name,
        plan_id=plan.plan_id,
        rounds=plan.rounds,
        resumed_after=progress.round,
    )
    guard = AccuracyGuard(plan.server.max_accuracy_drop, score, by_test_set=session.is_real)
    with closing(session.open_transport()) as post:
        return _rounds(_Run(session, post, model, evaluate, score, client_level, Gathering(session, post), guard), progress)


def _rounds(run: _Run, progress: Progress) -> Progress:
    folder = run.folder
    total = run.folder.plan.rounds
    for round in range(progress.round + 1, total + 1):
        try:
            reason = run.client_level.reason_to_stop(progress) if run.client_level else None
            if reason is not None:
                return _stop(folder, progress, reason)
            progress = _play(run, progress, round)
            folder.save(progress)
        except (RunError, PrivacyError) as error:
            folder.events.tell("run_failed", round=round, reason=str(error))
            raise
        except OSError as error:
            reason = f"round {round} cannot go on ({error}): make room, or mend the permissions, then continue with --resume"
            folder.events.tell("run_failed", round=round, reason=reason)
            raise RunError(reason) from None
        folder.events.tell("round_finished", **progress.history[-1])
    folder.events.tell("run_finished", rounds=total)
    return progress


def _stop(folder: RunFolder, progress: Progress, reason: str) -> Progress:
    """Ends the run with the rounds that it has. Raises RunError when it has none."""
    if not progress.round:
        raise RunError(f"the run ends without a model: {reason}; start a new run")
    folder.stop(reason)
    folder.events.tell("run_stopped", rounds=progress.round, reason=reason)
    return progress


def _play(run: _Run, before: Progress, round: int) -> Progress:
    started = time.monotonic()
    folder = run.folder
    plan = run.folder.plan
    client_level = run.client_level
    members = run.session.read_members()
    people, round_result = _people(run, before, round, members)
    stage = plan.stage_of(round)
    state, names = begin_round(run.model, plan, before.state, round)
    context = context_of(plan, run.model, before, state, round, organizations=len(folder.file.participants), score=run.score)
    folder.events.tell("round_started", round=round, stage=stage.mode, organizations=round_result.people)
    shapes = {name: state[name] for name in names}
    private_mean = client_level.new_mean(shapes, before) if client_level else None
    combination = private_mean or build_aggregator(plan.strategy, context)
    sent = broadcast_extras(plan, before)
    recipients = _recipients(folder, people, before)
    contents = dict(zip(round_result.people, encode_requests(plan.canonical(), round, state, recipients, sent), strict=True))
    received = received_digest(state, sent)
    cohort = cohort_of(folder, before.history, round_result.people)
    fates = fates_of(folder, before.history)
    run.session.trail.sign(TRAIN, round, contents, recipients, received, cohort, fates)
    verify = Verify(
        plan,
        context,
        shapes,
        statistic_shapes(plan, run.model, names),
        received=received,
        bounds=members,
    )
    closing = enough(plan, len(people))
    asking = RequestTracker(
        run.post,
        plan.server,
        round,
        contents,
        verify.max_bytes,
        closing,
        round_result,
        folder.events.tell,
        real=run.session.is_real,
        fuses=_fuses(folder),
    )
    del contents
    run.gathering.gather(asking, round, verify, round_result, combination)
    if not round_result.has_quorum:
        remember(folder, [*round_result.quarantined, *round_result.timed_out])
        remember_waiting(folder, round, round_result.dropped)
    round_result.check_quorum(plan, round)
    if client_level:
        client_level.charge(round)
    moved, memory = move(plan, before, state, combination.result(), context)
    after = served(plan, moved, memory)
    metrics = run.evaluate(after)
    looks = summarize_updates(combination)
    kept = _metrics_before(run, before, state)
    applied = run.guard.accepts(served(plan, state, before.memory), kept, after, metrics)
    entry = round_result.entry(round, stage.mode, metrics, time.monotonic() - started)
    entry |= {"applied": applied, **seen(looks, round_result.people), "suspects": [] if applied else suspects(looks)}
    _tell_of_small_weights(folder, before, round, entry["weights"])
    if not applied:
        moved = dict(state)
        memory = dict(before.memory)
        entry |= {"metrics": kept, "metrics_not_applied": entry["metrics"]}
        folder.events.tell("round_not_applied", round=round, accuracy=metrics and metrics.accuracy, suspects=entry["suspects"])
    clip_norm = None
    if client_level and private_mean:
        entry["client_privacy"] = client_level.entry(before, private_mean)
        clip_norm = client_level.next_clip_norm(before, private_mean)
    return Progress(round, moved, memory, (*before.history, entry), clip_norm)


def _metrics_before(run: _Run, before: Progress, state: State) -> Mapping[str, float] | None:
    """Of the model that the round begins with, where the guard may need them: before the first, of what everybody received."""
    if not run.guard.active:
        return None
    if before.history:
        found: Mapping[str, float] | None = before.history[-1]["metrics"]
        return found
    metrics = run.evaluate(served(run.folder.plan, state, before.memory))
    return None if metrics is None else metrics.as_dict()


def _tell_of_small_weights(folder: RunFolder, before: Progress, round: int, weights: Mapping[str, float]) -> None:
    """Once: who trains for the whole ε and has hardly a say, most often because others state their numbers by another rule."""
    known = {name for entry in before.history for name in entry.get("weights", {})}
    for name, share in weights.items():
        if name not in known and share * len(weights) < _HARDLY:
            folder.events.tell("weight_is_small", round=round, organization=name, weight=share)


def _people(
    run: _Run, before: Progress, round: int, members: Mapping[str, ExampleBounds | None]
) -> tuple[list[Participant], RoundResult]:
    """Who is asked. The quorum is a fraction of them: anyone who may not take part any more does not count.

    Raises RunError when nobody is left.
    """
    folder = run.folder
    plan = run.folder.plan
    struck = left_out(folder, before.history)
    revoked = [p.name for p in folder.file.participants if p.name not in members]
    known = before.history[-1].get("left_out", []) if before.history else []
    for names, reason in (
        (struck, f"{plan.server.strikes} of its updates were refused, or did not come in time"),
        (revoked, REVOKED),
    ):
        for name in [name for name in names if name not in known]:
            folder.events.tell("client_excluded", round=round, organization=name, reason=reason)
    without = sorted({*struck, *revoked})
    if len(without) >= len(folder.file.participants):
        raise RunError(f"nobody may take part any more: all of {', '.join(without)[:500]} are left out; start a new run")
    people = select(folder, round, without)
    closing = enough(plan, len(people))
    needed = plan.server.needed(closing, fuses=_fuses(folder)) if people else 0
    if needed > len(people) > 0:
        raise RunError(
            f"only {people[0].name} is left of {len(folder.file.participants)} organizations, without {', '.join(without)[:500]}:"
            " expected at least two, as one update is no fusion; ask them why, and start a new run, or one with server.quorum"
        )
    return people, RoundResult([person.name for person in people], needed, left_out=without)


def _fuses(folder: RunFolder) -> bool:
    """Whether this is a federation of several: then a model of one is not what they have agreed on."""
    return bool(folder.file.federation) and len(folder.file.participants) >= 2


def _recipients(folder: RunFolder, people: list[Participant], before: Progress) -> list[Recipient]:
    last = before.admitted
    return [Recipient(p.name, last.get(p.name, 0), str(folder.path / p.site) if p.site else "") for p in people]

"""The round loop, the same for every engine: select, request, receive, aggregate, step, evaluate, checkpoint.

Updates are added one at a time, in the order of the organizations, so that the sum does not depend on who was faster. The server
never has more than a few updates in memory beside the running sum; those that must be compared are stored on disk
(strategies/aggregator.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import MessageType
from torch import Tensor

from cotune.data.metrics.metrics import Metrics
from cotune.ensembles.public_inputs import PublicPredictions
from cotune.errors import PrivacyError, RunError
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.plan.trained_parameters import statistic_shapes
from cotune.privacy.client_dp import PrivateMean
from cotune.protocol.messages import Recipient, received_digest, state_digest
from cotune.protocol.statements import TRAIN
from cotune.reporting.documents.events import (
    ClientExcluded,
    RoundFinished,
    RoundNotApplied,
    RoundStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    RunStopped,
    WeightIsSmall,
)
from cotune.reporting.documents.rounds import MetricsEntry, RoundEntry
from cotune.server.rounds.accuracy_guard import AccuracyGuard, find_suspects, read_update_looks, rounded_norms, rounded_weights
from cotune.server.rounds.client_dp import ClientLevelPrivacy
from cotune.server.rounds.requests import Requests
from cotune.server.rounds.round import Round, Selection
from cotune.server.rounds.round_requests import RoundRequests, find_held
from cotune.server.rounds.round_result import RoundResult, metrics_entry
from cotune.server.rounds.rounded_step import RoundedStep, round_step
from cotune.server.rounds.run_environment import ExampleBounds, RunEnvironment
from cotune.server.rounds.selection import build_cohort, count_to_complete, record_waiting, select
from cotune.server.rounds.strategy_step import Score, apply_update, begin_round, broadcast_extras, round_context
from cotune.server.rounds.student import teach_student
from cotune.server.rounds.updates.buffers import UpdateStore
from cotune.server.rounds.updates.replies import UpdateReceiver
from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.server.runs.changes import ChangeFiles
from cotune.server.runs.exclusions import find_excluded, read_strike_records, record_strikes
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.server.runs.run_model import inference_params
from cotune.server.transport.base import Transport
from cotune.server.transport.node_registry import REVOKED
from cotune.strategies.aggregator import Combination, build_aggregator
from cotune.strategies.types import MAX_VALUE, RoundContext, find_extreme

_SMALL_WEIGHT = 0.1  # of an equal share
Evaluate = Callable[[State], Metrics | None]


@dataclass(frozen=True)
class _Run:
    """What all rounds of a run share."""

    environment: RunEnvironment
    transport: Transport
    model: TrainableModel
    evaluate: Evaluate
    score: Score | None
    public: PublicPredictions | None
    client_level: ClientLevelPrivacy | None
    store: UpdateStore
    guard: AccuracyGuard

    @property
    def folder(self) -> RunFolder:
        return self.environment.folder

    @property
    def plan(self) -> Plan:
        return self.environment.folder.plan


@dataclass(frozen=True)
class _Start:
    """The state at the start of a round.

    Attributes:
        number: The round.
        before: The run's progress after the previous round.
        state: The model that all organizations receive.
        shared: The part of it that organizations train and share.
        context: What fusion and weighting may know of the round.
    """

    number: int
    before: Progress
    state: State
    shared: Mapping[str, Tensor]
    context: RoundContext


def run_rounds(
    environment: RunEnvironment,
    model: TrainableModel,
    evaluate: Evaluate,
    score: Score | None = None,
    public: PublicPredictions | None = None,
) -> Progress:
    """Train the rounds that are not finished yet.

    Args:
        environment: The run.
        model: The model of its plan.
        evaluate: State -> metrics on the common test set; None if there is none.
        score: State -> accuracy on the server's validation records, for rules and the accuracy guard. Without it, the guard uses
            the test set in a real run, and nothing in a simulated one.
        public: The plan's public inputs; None if it names none.

    Returns:
        The run's progress after its last round.

    Raises:
        RunError: If a round does not reach its quorum; all earlier rounds are kept.
    """
    folder = environment.folder
    plan = folder.plan
    progress = folder.load()
    client_level = ClientLevelPrivacy.of(folder)
    folder.events.write(
        RunStarted(
            folder=str(folder.path),
            plan=plan.name,
            plan_id=plan.plan_id,
            rounds=plan.rounds,
            resumed_after=progress.round,
        )
    )
    guard = AccuracyGuard(plan.server.max_accuracy_drop, score, by_test_set=environment.is_real)
    with closing(environment.open_transport()) as transport:
        store = UpdateStore.open(folder)
        return _train(_Run(environment, transport, model, evaluate, score, public, client_level, store, guard), progress)


def _train(run: _Run, progress: Progress) -> Progress:
    folder = run.folder
    for number in range(progress.round + 1, run.plan.rounds + 1):
        try:
            reason = run.client_level.reason_to_stop(progress) if run.client_level else None
            if reason is not None:
                return _stop(folder, progress, reason)
            progress = _train_round(run, progress, number)
            folder.save(progress)
        except (RunError, PrivacyError) as error:
            folder.events.write(RunFailed(round=number, reason=str(error)))
            raise
        except OSError as error:
            reason = f"round {number} cannot go on ({error}): free space, or correct the permissions, then continue with --resume"
            folder.events.write(RunFailed(round=number, reason=reason))
            raise RunError(reason, code="run.not_writable") from None
        folder.events.write(RoundFinished(**progress.history[-1]))
    folder.events.write(RunFinished(rounds=run.plan.rounds))
    return progress


def _stop(folder: RunFolder, progress: Progress, reason: str) -> Progress:
    """End the run with the rounds that are finished; raises RunError if there are none."""
    if not progress.round:
        raise RunError(f"the run ends without a model: {reason}; start a new run", code="run.no_model")
    folder.stop(reason)
    folder.events.write(RunStopped(rounds=progress.round, reason=reason))
    return progress


def _train_round(run: _Run, before: Progress, number: int) -> Progress:
    began = time.monotonic()
    example_bounds = run.environment.read_members()
    selection = _select(run, before, number, example_bounds)
    start = _begin(run, before, number)
    stage = run.plan.get_stage(number).mode
    run.folder.events.write(RoundStarted(round=number, stage=stage, organizations=list(selection.asked)))
    combination = _combination(run, start)
    result = _collect(run, start, selection, combination, example_bounds)
    _check_quorum(run, result)
    if run.client_level:
        run.client_level.charge(number)
    return _conclude(run, start, combination, result, began)


def _begin(run: _Run, before: Progress, number: int) -> _Start:
    state, names = begin_round(run.model, run.plan, before.state, number)
    organizations = len(run.folder.file.participants)
    public = run.public.of_round(number, state, names) if run.public else None
    context = round_context(
        run.plan, run.model, before, state, number, organizations=organizations, score=run.score, public=public
    )
    return _Start(number, before, state, {name: state[name] for name in names}, context)


def _combination(run: _Run, start: _Start) -> Combination:
    """Return what combines the updates: a noised mean under client-level privacy, else the plan's weighting and fusion."""
    if run.client_level:
        return run.client_level.new_mean(start.shared, start.before)
    return build_aggregator(run.plan.strategy, start.context, run.store.folder)


def _collect(
    run: _Run, start: _Start, selection: Selection, combination: Combination, bounds: Mapping[str, ExampleBounds | None]
) -> RoundResult:
    """Ask the selected organizations, and add their updates."""
    sent = broadcast_extras(run.plan, start.before)
    received = received_digest(start.state, sent)
    statistics = statistic_shapes(run.plan, run.model, list(start.shared))
    spec = UpdateSpec.build(run.plan, start.context, start.shared, statistics, received=received, example_bounds=bounds)
    receiver = UpdateReceiver(run.environment, run.transport, run.store, selection.asked, spec, combination)
    result = Round(
        run.transport,
        run.plan.server,
        selection,
        _requests(run, start, selection, sent, spec),
        receiver,
        run.folder.events.write,
        is_real=run.environment.is_real,
        limits=run.environment.limits,
    ).collect()
    receiver.end_round()
    return result


def _requests(run: _Run, start: _Start, selection: Selection, sent: Mapping[str, Tensor], spec: UpdateSpec) -> Requests:
    """Build the signed requests of a round. They are large; the result has the only references to their contents."""
    folder = run.folder
    before = start.before
    asked = list(selection.asked)
    recipients = _recipients(folder, asked, before)
    changes = ChangeFiles(folder.path, run.plan.wire_down).read_before(start.number, before.state)
    stays = run.environment.in_process
    made = RoundRequests(run.plan, start.number, start.state, sent, changes=changes, stays=stays)
    contents = made.encode(recipients, find_held(before.history, changes))
    cohort = build_cohort(folder, before.history, asked)
    fates = read_strike_records(folder, before.history)
    run.environment.trail.sign(TRAIN, start.number, contents, recipients, str(spec.received), cohort, fates)
    return Requests(start.number, MessageType.TRAIN, contents, spec.max_bytes, made.to_whole(recipients))


def _recipients(folder: RunFolder, asked: list[str], before: Progress) -> list[Recipient]:
    last = before.last_admitted(asked)
    sites = {who.name: who.site for who in folder.file.participants}
    return [Recipient(name, last.get(name, 0), str(folder.path / sites[name]) if sites[name] else "") for name in asked]


def _check_quorum(run: _Run, result: RoundResult) -> None:
    """Raise RunError if too few updates were accepted, after recording the failed round's strikes and waiting organizations."""
    if not result.has_quorum:
        record_strikes(run.folder, result.strikes)
        record_waiting(run.folder, result.number, result.dropped)
    result.check_quorum(run.plan)


def _conclude(run: _Run, start: _Start, combination: Combination, result: RoundResult, began: float) -> Progress:
    """Apply the round, unless the accuracy falls too far, and add it to the history."""
    folder = run.folder
    number = start.number
    before = start.before
    step = _move(run, start, combination)
    moved = step.state
    memory = step.memory
    after = inference_params(run.plan, moved, memory)
    metrics = run.evaluate(after)
    looks = read_update_looks(combination)
    kept = _metrics_before(run, start)
    extreme = _find_extreme(run.plan, before, moved, memory)
    is_applied = not extreme and run.guard.accepts(inference_params(run.plan, start.state, before.memory), kept, after, metrics)
    known: dict[str, Any] = {
        "applied": is_applied,
        "weights": rounded_weights(looks, result.asked),
        "norms": rounded_norms(looks, result.asked),
        "suspects": [] if is_applied else find_suspects(looks),
    }
    entry = result.entry(run.plan.get_stage(number).mode, metrics, time.monotonic() - began).model_copy(update=known)
    _report_small_weights(folder, before, entry)
    if not is_applied:
        moved = dict(start.state)
        memory = dict(before.memory)
        accuracy = None if metrics is None else metrics.score
        folder.events.write(RoundNotApplied(round=number, accuracy=accuracy, suspects=entry.suspects, reason=extreme))
        entry = entry.model_copy(update={"metrics": kept, "metrics_not_applied": entry.metrics})
    _keep_change(run, start, moved, step.change if is_applied else {n: torch.zeros_like(t) for n, t in start.shared.items()})
    clip_norm = None
    if run.client_level and isinstance(combination, PrivateMean):
        entry = entry.model_copy(update={"client_privacy": run.client_level.entry(before, combination)})
        clip_norm = run.client_level.next_clip_norm(before, combination)
    return Progress(number, moved, memory, (*before.history, entry), clip_norm)


def _move(run: _Run, start: _Start, combination: Combination) -> RoundedStep:
    """Return the next state and the memory of all components; if predictions are shared, also that of their student."""
    plan = run.plan
    moved, memory = apply_update(plan, start.before, start.state, combination.result(), start.context)
    if plan.shares_predictions:
        assert run.public is not None, "a plan that shares predictions names public inputs"
        student = teach_student(plan, run.model, run.public, start.before.memory, moved[SCORES], start.number)
        return RoundedStep(moved, {**memory, **student})
    if find_extreme(moved):
        return RoundedStep(moved, memory)  # which is not applied
    return round_step(plan, start.number, start.state, start.shared, moved, memory, start.before.memory)


def _keep_change(run: _Run, start: _Start, state: State, change: State) -> None:
    """Store what a round has changed, if requests are to build on it."""
    plan = run.plan
    if plan.wire_down != "float32" and start.number < plan.rounds:
        files = ChangeFiles(run.folder.path, plan.wire_down)
        files.write(start.number, start.before.state, start.state, change, state_digest(state))


def _find_extreme(plan: Plan, before: Progress, moved: State, memory: State) -> str:
    """Return why organizations would refuse the state that the next round sends; "" if they would not."""
    found = find_extreme(moved) or find_extreme(broadcast_extras(plan, replace(before, memory=memory)))
    return "" if found is None else f"{found[0]} reaches {found[1]:.3g}, and organizations take at most {MAX_VALUE:g}"


def _metrics_before(run: _Run, start: _Start) -> MetricsEntry | None:
    """Return the metrics of the model at the start of the round, if the guard may need them."""
    if not run.guard.active:
        return None
    before = start.before
    if before.history:
        return before.history[-1].metrics
    return metrics_entry(run.evaluate(inference_params(run.plan, start.state, before.memory)))  # of what everybody received


def _report_small_weights(folder: RunFolder, before: Progress, entry: RoundEntry) -> None:
    """Report once who spends its ε but has little weight, usually because others count their records by another rule."""
    small = {name: share for name, share in entry.weights.items() if share * len(entry.weights) < _SMALL_WEIGHT}
    for name, share in small.items():
        if not any(name in each.weights for each in before.history):
            folder.events.write(WeightIsSmall(round=entry.round, organization=name, weight=share))


def _select(run: _Run, before: Progress, number: int, members: Mapping[str, Any]) -> Selection:
    """Select who is asked. The quorum is a fraction of them; organizations that are excluded or revoked do not count.

    Raises:
        RunError: If no organization is left, or only one where several are needed.
    """
    folder = run.folder
    config = run.plan.server
    excluded = _excluded(run, before, number, members)
    needs_several = run.environment.is_real and len(folder.file.participants) >= 2
    asked = [person.name for person in select(folder, number, excluded)]
    complete = count_to_complete(run.plan, len(asked))
    needed = config.needed(complete, fuses=needs_several) if asked else 0
    if needed > len(asked) > 0:
        raise RunError(
            f"only {asked[0]} is left of {len(folder.file.participants)} organizations, without {', '.join(excluded)[:500]}:"
            " expected at least two, as one update is no fusion; ask them why, and start a new run, or one with server.quorum",
            code="run.too_few_left",
        )
    return Selection(asked, needed, complete, excluded, needs_several)


def _excluded(run: _Run, before: Progress, number: int, members: Mapping[str, Any]) -> list[str]:
    """Return who may not take part any more, and report each once; raises RunError if no organization is left."""
    folder = run.folder
    struck = find_excluded(folder, before.history)
    revoked = [who.name for who in folder.file.participants if who.name not in members]
    known = before.history[-1].excluded if before.history else []
    strikes = f"{run.plan.server.strikes} of its updates were refused, or did not come in time"
    for names, reason in ((struck, strikes), (revoked, REVOKED)):
        for name in [name for name in names if name not in known]:
            folder.events.write(ClientExcluded(round=number, organization=name, reason=reason))
    excluded = sorted({*struck, *revoked})
    if len(excluded) >= len(folder.file.participants):
        everybody = ", ".join(excluded)[:500]
        raise RunError(f"nobody may take part any more: all of {everybody} are left out; start a new run", code="run.nobody_left")
    return excluded

"""The round loop, the same for every engine: send, stream the replies in, admit, fuse, step, evaluate, checkpoint.

Replies are pulled and added one at a time, in the order of the organisations, so that the sum is the same whoever was faster; the
server never holds more than one reply beside the running sum, unless the weighting must compare them (strategies/combination).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from torch import Tensor

from cotune.models.errors import PrivacyError, RunError
from cotune.models.sharing import SharedModel, State
from cotune.models.tasks import Metrics
from cotune.plan.schema import Plan
from cotune.plan.statistics import statistic_shapes
from cotune.server.admission import reason_to_refuse
from cotune.server.client_level import ClientLevelPrivacy
from cotune.server.run_folder import Participant, Progress, RunFolder
from cotune.server.selection import select
from cotune.server.step import Score, context_of, enter_round, move, sent_beside, served
from cotune.strategies.combination import Combination
from cotune.strategies.round import RoundContext
from cotune.strategies.updates import Update
from cotune.strategies.wire import Recipient, decode_update, encode_requests, payload_bytes

__all__ = ["run_rounds"]

_POLL_SECONDS = 0.02
_NODES_SECONDS = 120.0  # how long the run waits for the first node

Evaluate = Callable[[State], Metrics | None]
Refuse = Callable[..., str | None]  # (update, organisation=…) -> why it may not enter


@dataclass
class _Tally:
    """What came in during one round."""

    participants: list[str]
    dropped: list[dict[str, str]]
    epsilon: dict[str, float]
    told: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


def run_rounds(grid: Grid, folder: RunFolder, model: SharedModel, evaluate: Evaluate, score: Score | None = None) -> Progress:
    """Plays the rounds that are not finished yet, and returns the run after its last.

    evaluate: a state on the common test set. score: its accuracy on the server's own validation records, for rules that judge
    by it.

    Raises RunError when a round does not reach its quorum; all rounds before are kept.
    """
    plan, progress, client_level = folder.plan, folder.load(), ClientLevelPrivacy.of(folder)
    total = plan.rounds
    folder.events.tell(
        "run_started", folder=str(folder.path), plan=plan.name, plan_id=plan.plan_id, rounds=total, resumed_after=progress.round
    )
    for round in range(progress.round + 1, total + 1):
        try:
            reason = client_level.reason_to_stop(progress) if client_level else None
            if reason is not None:
                return _stop(folder, progress, reason)
            progress = _play(grid, folder, model, evaluate, progress, round, client_level, score)
        except (RunError, PrivacyError) as error:
            folder.events.tell("run_failed", round=round, reason=str(error))
            raise
        folder.save(progress)
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


def _play(
    grid: Grid,
    folder: RunFolder,
    model: SharedModel,
    evaluate: Evaluate,
    before: Progress,
    round: int,
    client_level: ClientLevelPrivacy | None,
    score: Score | None,
) -> Progress:
    started = time.monotonic()
    plan, people = folder.plan, select(folder, round)
    stage = plan.stage_of(round)
    state, names = enter_round(model, plan, before.state, round)
    context = context_of(plan, model, before, state, round, organisations=len(folder.file.participants), score=score)
    folder.events.tell("round_started", round=round, stage=stage.mode, organisations=[p.name for p in people])
    messages, bytes_down = _requests(grid, folder, people, state, before, round)
    ids = list(grid.push_messages(messages))
    del messages
    tally = _Tally([], [], {}, bytes_down=bytes_down)
    shapes = {name: state[name] for name in names}
    refuse = _refusal(plan, shapes, statistic_shapes(plan, model, names), context)
    private_mean = client_level.new_mean(shapes, before) if client_level else None
    combination: Combination = private_mean or plan.strategy.new_combination(context)
    deadline = time.monotonic() + plan.server.deadline_seconds
    for participant, message_id in zip(people, ids, strict=True):
        reply = _await_reply(grid, message_id, deadline)
        update = _admit(folder, participant, reply, refuse, round, tally)
        del reply
        if update is not None:
            combination.add(update)
        del update  # before the next one comes
    _check_quorum(plan, people, tally, round)
    if client_level:
        client_level.charge(round)
    moved, memory = move(plan, before, state, combination.result(), context)
    entry = _entry(round, stage.mode, tally, evaluate(served(plan, moved, memory)), time.monotonic() - started)
    clip_norm = None
    if client_level and private_mean:
        entry["client_privacy"] = client_level.entry(before, private_mean)
        clip_norm = client_level.next_clip_norm(before, private_mean)
    return Progress(round, moved, memory, (*before.history, entry), clip_norm)


def _requests(
    grid: Grid, folder: RunFolder, people: Sequence[Participant], state: State, before: Progress, round: int
) -> tuple[list[Message], int]:
    """One message per organisation; with fewer nodes than organisations (simulations), nodes serve several."""
    nodes = _nodes(grid)
    last = {name: entry["round"] for entry in before.history for name in entry["participants"]}
    recipients = [Recipient(p.name, last.get(p.name, 0), str(folder.path / p.site) if p.site else "") for p in people]
    contents = encode_requests(folder.plan.canonical(), round, state, recipients, sent_beside(folder.plan, before))
    size = sum(payload_bytes(content) for content in contents)
    ttl = folder.plan.server.deadline_seconds
    messages = [
        Message(content, nodes[i % len(nodes)], MessageType.TRAIN, ttl=ttl, group_id=str(round))
        for i, content in enumerate(contents)
    ]
    return messages, size


def _nodes(grid: Grid) -> list[int]:
    """The connected nodes, in a fixed order. Raises RunError when none comes."""
    deadline = time.monotonic() + _NODES_SECONDS
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > deadline:
            raise RunError(f"no node connected within {_NODES_SECONDS:g} seconds: expected at least one")
        time.sleep(_POLL_SECONDS)
    return nodes


def _await_reply(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """The reply to one message; None when it did not come in time."""
    while True:
        for reply in grid.pull_messages([message_id]):
            return reply
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_SECONDS)


def _admit(
    folder: RunFolder, who: Participant, reply: Message | None, refuse: Refuse, round: int, tally: _Tally
) -> Update | None:
    """The update in a reply, if it may enter the model; otherwise the organisation is shown as dropped, with the reason."""
    update, reason = _open(folder.plan, who, reply, refuse)
    if update is None:
        tally.dropped.append({"organisation": who.name, "reason": reason})
        folder.events.tell("update_dropped", round=round, organisation=who.name, reason=reason)
        return None
    assert reply is not None
    size = payload_bytes(reply.content)
    tally.participants.append(who.name)
    tally.bytes_up += size
    if update.told:
        tally.told[who.name] = dict(update.told)
    if update.epsilon is not None:
        tally.epsilon[who.name] = update.epsilon
    folder.events.tell(
        "update_received", round=round, organisation=who.name, bytes=size, steps=update.steps, epsilon=update.epsilon
    )
    return update


def _open(plan: Plan, who: Participant, reply: Message | None, refuse: Refuse) -> tuple[Update | None, str]:
    if reply is None:
        return None, f"no reply within {plan.server.deadline_seconds:g} seconds"
    if reply.has_error():
        return None, _one_line(reply.error.reason or "") or f"error {reply.error.code}"
    try:
        update = decode_update(reply.content, plan.plan_id)
    except RunError as error:
        return None, str(error)
    reason = refuse(update, organisation=who.name)
    return (update, "") if reason is None else (None, reason)


def _refusal(
    plan: Plan, shapes: Mapping[str, Tensor], statistics: Mapping[str, tuple[int, ...]], context: RoundContext
) -> Refuse:
    """What updates of the round are held to."""
    local = plan.stage_of(context.round).local
    return partial(
        reason_to_refuse,
        round=context.round,
        shapes=shapes,
        statistics=statistics,
        steps_of=None if local.epochs is None else local.steps_of,
        most_steps=local.steps,
        smaller=context.adapters if plan.mixed_ranks else (),
        max_norm=plan.server.max_update_norm,
        noise_needed=plan.privacy != "none" and plan.strategy.compares_noise,
        loss_needed="loss" in plan.strategy.sends,
    )


def _one_line(text: str) -> str:
    """A stranger's words, fit to be shown: one line without control characters, at most 500 long."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]


def _check_quorum(plan: Plan, people: Sequence[Participant], tally: _Tally, round: int) -> None:
    needed = max(1, plan.server.quorum * len(people)) if people else 0
    if len(tally.participants) < needed:
        first = tally.dropped[0]
        raise RunError(
            f"round {round} got {len(tally.participants)} of {len(people)} updates, expected at least {needed:g}"
            f" (server.quorum = {plan.server.quorum:g}); {first['organisation']}: {first['reason']}"
        )


def _entry(number: int, stage: str, tally: _Tally, metrics: Metrics | None, seconds: float) -> dict[str, Any]:
    """A round as it stands in summary.json."""
    return {
        "round": number,
        "stage": stage,
        "metrics": metrics.as_dict() if metrics else None,
        "epsilon": tally.epsilon,
        "told": tally.told,
        "client_privacy": None,
        "participants": tally.participants,
        "dropped": tally.dropped,
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "seconds": round(seconds, 3),
    }

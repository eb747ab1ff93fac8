"""A federation whose organizations are functions; model, grid and messages are the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from cotune.flower.inprocess_grid import InProcessGrid
from cotune.models.trainable import State, TrainableModel, get_model
from cotune.plan.plan import Plan
from cotune.protocol.changes import add_change
from cotune.protocol.messages import Request, decode_request, encode_update, received_digest, state_digest
from cotune.protocol.refusals import WHOLE_STATE, VersionLost, refusal
from cotune.protocol.signatures import detach
from cotune.strategies.types import Update
from tests.support.signing import countersign

Answer = Callable[[Request], Update | RecordDict]  # how an organization answers a request to train


def model_of(plan: Plan) -> TrainableModel:
    return get_model(plan.model, plan.labels, None, plan.seed, "cpu", plan.task)


def federation(
    plan: Plan,
    answers: Mapping[str, Answer],
    grid: type[InProcessGrid] = InProcessGrid,
    key_of: Mapping[str, EllipticCurvePrivateKey] | None = None,
) -> InProcessGrid:
    """One node per organization; each answers requests with its function, and signs with its key where it has one."""
    app = ClientApp()
    held: dict[str, State] = {}  # organization -> the newest state that it was sent

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = decode_request(detach(message.content)[0], plan.wire_down)
        request = replace(request, state=built(request, held.get(request.organization, {})))
        held[request.organization] = dict(request.state)
        try:
            answer = answers[request.organization](request)
        except VersionLost:
            return refusal(message, WHOLE_STATE)
        content = encode_update(answer, plan.plan_id, codec=plan.wire) if isinstance(answer, Update) else answer
        if key_of and request.organization in key_of:
            countersign(content, message.content, request.organization, key_of[request.organization])
        return Message(content, reply_to=message)

    return grid(app, len(answers))


def built(request: Request, held: State) -> State:
    """The whole state of a request, which may hold only what has changed since the version that its recipient has."""
    since = [] if not request.versions else request.changes[request.versions.index(state_digest(held)) :]
    for change in since:
        held = add_change(held, change, whole=request.state)
    return {**(held if request.versions else {}), **request.state}


def adding(value: float, examples: int = 10) -> Answer:
    """An organization whose delta is `value` everywhere."""
    return lambda request: update(request, {n: torch.full_like(t, value) for n, t in request.state.items()}, examples)


def update(request: Request, delta: Mapping[str, torch.Tensor], examples: int = 10, **changes: Any) -> Update:
    received = received_digest(request.state, request.sent)
    fields = {
        "organization": request.organization,
        "round": request.round,
        "examples": examples,
        "steps": 1,
        "received": received,
    }
    return Update(delta=delta, **{**fields, **changes})

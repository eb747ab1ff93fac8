"""The strategy's half of a round: what its parts see, what they remember, and how the fused delta moves the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cotune.models.trainable import State, TrainableModel, strip_prefix
from cotune.plan.parameters import rewritten_names, scores_shape, shared_names
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.server.runs.run_folder import Progress
from cotune.strategies.aggregator import build_client_term, build_server_optimizer
from cotune.strategies.types import Aggregate, Delta, LocalSteps, PublicInputs, RoundContext, apply_delta

Score = Callable[[State], float]
_ANY_STEPS = 10**9  # where the plan gives epochs: each update's steps are held to its number of records when it is validated


def begin_round(model: TrainableModel, plan: Plan, state: State, round: int) -> tuple[State, list[str]]:
    """Return the state, with what this round adds to it at its present values, and the names that organizations share."""
    if plan.shares_predictions:
        return (state or {SCORES: torch.zeros(scores_shape(plan))}), [SCORES]
    model.load(state)
    names = shared_names(plan, model, round)
    wanted = [*names, *rewritten_names(plan, model, round)]
    return {**state, **model.state([name for name in wanted if name not in state])}, names


def round_context(
    plan: Plan,
    model: TrainableModel,
    before: Progress,
    state: State,
    round: int,
    *,
    organizations: int,
    score: Score | None,
    public: PublicInputs | None = None,
) -> RoundContext:
    """Return what the fusion and the weighting of a round may know."""
    stage = plan.get_stage(round)
    local = stage.local
    return RoundContext(
        round=round,
        rounds=plan.rounds,
        seed=plan.seed,
        organizations=organizations,
        state=state,
        local=LocalSteps(local.learning_rate, local.momentum, local.steps or _ANY_STEPS),
        adapters=model.adapters() if stage.mode == "lora" and not plan.shares_predictions else (),
        memory=_remembered(before, "fusion"),
        score=None if score is None else lambda delta: score(apply_delta(state, delta)),
        public=public,
    )


def broadcast_extras(plan: Plan, before: Progress) -> dict[str, Tensor]:
    """Return what the plan's client term sends to the organizations beside the state."""
    return build_client_term(plan.strategy).send(_remembered(before, "term"))


def apply_update(
    plan: Plan, before: Progress, state: State, fused: Delta | Aggregate, context: RoundContext
) -> tuple[State, State]:
    """Return the next state, and all that the parts remember: fusion → the client term's server half → server optimizer."""
    fused = fused if isinstance(fused, Aggregate) else Aggregate(fused)
    if not fused.delta:
        return dict(state), dict(before.memory)  # nobody was asked
    delta, term = build_client_term(plan.strategy).fold(fused, _remembered(before, "term"), context)
    optimizer = build_server_optimizer(plan.strategy)
    moved, memory = optimizer.step(state, replace(fused, delta=delta), _remembered(before, "optimizer"), context)
    return moved, {**_named("fusion", fused.memory), **_named("term", term), **_named("optimizer", memory)}


def _remembered(before: Progress, part: str) -> dict[str, Tensor]:
    return strip_prefix(f"{part}/", before.memory)


def _named(part: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for name, tensor in memory.items()}

"""The strategy's part of a round: what its components see and store, and how the fused delta moves the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cotune.models.trainable import State, TrainableModel, strip_prefix
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.plan.trained_parameters import rewritten_names, scores_shape, shared_names
from cotune.server.runs.run_folder import Progress
from cotune.strategies.aggregator import build_client_term, build_server_optimizer
from cotune.strategies.types import Aggregate, Delta, LocalSteps, PublicInputs, RoundContext, apply_delta

Score = Callable[[State], float]
_ANY_STEPS = 10**9  # if the plan gives epochs; validation then checks each update's steps against its number of records


def begin_round(model: TrainableModel, plan: Plan, state: State, round: int) -> tuple[State, list[str]]:
    """Add the parameters that a round needs to the state.

    Args:
        model: The model of the plan; the state is loaded into it.
        plan: The plan.
        state: The shared parameters so far.
        round: Number of the round.

    Returns:
        (the state with the model's current values of added parameters, names of the parameters that organizations share).
    """
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
    """Build the context for the fusion and the weighting of a round.

    Args:
        plan: The plan.
        model: The model of the plan.
        before: The run's progress after the previous round.
        state: θ, as organizations receive it.
        round: Number of the round.
        organizations: Number of organizations in the run.
        score: State -> accuracy on the server's validation records; None if it has none.
        public: The plan's public inputs; None if it names none.
    """
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
    """Return the tensors that the plan's client term sends to organizations beside the state."""
    return build_client_term(plan.strategy).send(_remembered(before, "term"))


def apply_update(
    plan: Plan, before: Progress, state: State, fused: Delta | Aggregate, context: RoundContext
) -> tuple[State, State]:
    """Apply a fused delta: client term (the server's part) → server optimizer.

    Args:
        plan: The plan.
        before: The run's progress after the previous round.
        state: θ.
        fused: The result of the fusion.
        context: Of the round.

    Returns:
        (the next θ, memory of all components).
    """
    fused = fused if isinstance(fused, Aggregate) else Aggregate(fused)
    if not fused.delta:
        return dict(state), dict(before.memory)  # no organization was asked
    delta, term = build_client_term(plan.strategy).fold(fused, _remembered(before, "term"), context)
    optimizer = build_server_optimizer(plan.strategy)
    moved, memory = optimizer.step(state, replace(fused, delta=delta), _remembered(before, "optimizer"), context)
    return moved, {**_named("fusion", fused.memory), **_named("term", term), **_named("optimizer", memory)}


def _remembered(before: Progress, part: str) -> dict[str, Tensor]:
    return strip_prefix(f"{part}/", before.memory)


def _named(part: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for name, tensor in memory.items()}

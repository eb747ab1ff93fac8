"""The strategy's half of a round: what its parts see, what they remember, and how the fused delta moves the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from cotune.models.sharing import SharedModel, State, named_under
from cotune.plan.model import rewritten_names, shared_names
from cotune.plan.schema import Plan
from cotune.server.run_folder import Progress
from cotune.strategies.build import build_client_term, build_server_optimizer
from cotune.strategies.round import Fused, LocalSteps, RoundContext
from cotune.strategies.updates import Delta, apply_delta

Score = Callable[[State], float]
_ANY = 10**9  # steps, where the plan gives epochs: each update's are held to its number of records when it is admitted


def enter_round(model: SharedModel, plan: Plan, state: State, round: int) -> tuple[State, list[str]]:
    """The state, with what this round adds to it at its present values; and the names that the organisations share."""
    model.load(state)
    names = shared_names(plan, model, round)
    wanted = [*names, *rewritten_names(plan, model, round)]
    return {**state, **model.state([name for name in wanted if name not in state])}, names


def context_of(
    plan: Plan, model: SharedModel, before: Progress, state: State, round: int, *, organisations: int, score: Score | None
) -> RoundContext:
    """What the fusion and the weighting of a round may know."""
    stage = plan.stage_of(round)
    local = stage.local
    return RoundContext(
        round=round,
        rounds=plan.rounds,
        seed=plan.seed,
        organisations=organisations,
        state=state,
        local=LocalSteps(local.learning_rate, local.momentum, local.steps or _ANY),
        adapters=model.adapters() if stage.mode == "lora" else (),
        memory=_remembered(before, "fusion"),
        score=None if score is None else lambda delta: score(apply_delta(state, delta)),
    )


def sent_beside(plan: Plan, before: Progress) -> dict[str, Tensor]:
    """What the plan's client term sends to the organisations beside the state."""
    return build_client_term(plan.strategy).send(_remembered(before, "term"))


def move(plan: Plan, before: Progress, state: State, fused: Delta | Fused, context: RoundContext) -> tuple[State, State]:
    """The next state, and all that the parts remember: fusion → the client term's server half → server optimiser."""
    fused = fused if isinstance(fused, Fused) else Fused(fused)
    if not fused.delta:
        return dict(state), dict(before.memory)  # nobody was asked
    delta, term = build_client_term(plan.strategy).fold(fused, _remembered(before, "term"), context)
    optimizer = build_server_optimizer(plan.strategy)
    moved, memory = optimizer.step(state, replace(fused, delta=delta), _remembered(before, "optimizer"), context)
    return moved, {**_named("fusion", fused.memory), **_named("term", term), **_named("optimizer", memory)}


def served(plan: Plan, state: State, memory: Mapping[str, Tensor]) -> State:
    """The model to judge and to hand out: θ, or what the server optimiser makes of it."""
    return build_server_optimizer(plan.strategy).serve(state, named_under("optimizer/", memory))


def served_of(plan: Plan, progress: Progress) -> State:
    """The served model of a run after its last finished round."""
    return served(plan, progress.state, progress.memory)


def _remembered(before: Progress, part: str) -> dict[str, Tensor]:
    return named_under(f"{part}/", before.memory)


def _named(part: str, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for name, tensor in memory.items()}

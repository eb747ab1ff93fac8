"""Round what a round changes of the shared state to what the plan's `wire_down` can write, so that organizations can rebuild it.

With moves Δ_t of the unrounded state and what rounding has lost so far, e_t (error feedback: Seide et al., Interspeech 2014,
https://doi.org/10.21437/Interspeech.2014-274; of what a server sends: Tang et al., DoubleSqueeze, ICML 2019,
https://arxiv.org/abs/1905.05957):

    q_t = round(Δ_t + e_{t−1}),    θ_t = θ_{t−1} + q_t,    e_t = e_{t−1} + Δ_t − (θ_t − θ_{t−1}).

So θ_t + e_t is the sum of all moves, and errors do not add up. Everybody has θ_t: server, checkpoints, evaluation, and
organizations that get it whole or as changes. All of it is post-processing of what organizations have sent. The last round is not
rounded, as nothing builds on it, and gets what was lost before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cotune.models.trainable import State, strip_prefix
from cotune.plan.plan import Plan
from cotune.protocol.changes import add_change
from cotune.protocol.codecs import round_to, rounding_generator

_LOST = "wire_down/"  # before the names of e in what a run remembers
_SERVER = "the server"  # in the place of an organization, none of which can have this name


@dataclass(frozen=True)
class RoundedStep:
    """A step from θ_{t−1} to θ_t.

    Attributes:
        state: θ_t.
        memory: The run's memory with e_t.
        change: q_t by parameter, of those that organizations share or the round has moved; empty in a round that is not rounded.
    """

    state: State
    memory: State
    change: State = field(default_factory=dict)


def round_step(
    plan: Plan,
    round: int,
    state: Mapping[str, Tensor],
    shared: Collection[str],
    moved: State,
    memory: State,
    before: Mapping[str, Tensor],
) -> RoundedStep:
    """Round the step of a round.

    Args:
        plan: The plan.
        round: Number of the round.
        state: θ_{t−1}, as organizations received it.
        shared: The parameters that organizations train and share; they are part of the change even where it is zero, so that the
            public port can judge by the arrays of requests how many those of answers may be.
        moved: θ_{t−1} + Δ_t, finite.
        memory: Of the plan's components after the round.
        before: The run's memory before the round, with e_{t−1}.
    """
    if plan.wire_down == "float32":
        return RoundedStep(moved, memory)
    lost = strip_prefix(_LOST, before)
    wanted = {
        name: _wanted(tensor, state[name], lost.get(name))
        for name, tensor in moved.items()
        if name in shared or _is_moved(tensor, state[name])
    }
    if round == plan.rounds:
        wanted |= {name: tensor.to(torch.float64) for name, tensor in lost.items() if name not in wanted}
        return RoundedStep({**moved, **{name: (state[name] + step).float() for name, step in wanted.items()}}, memory)
    change = {name: _rounded(plan, round, name, step) for name, step in wanted.items()}
    after = add_change(state, change)
    left = {name: (step - (after[name].double() - state[name].double())).float() for name, step in wanted.items()}
    return RoundedStep(after, {**memory, **{f"{_LOST}{name}": tensor for name, tensor in {**lost, **left}.items()}}, change)


def _is_moved(tensor: Tensor, before: Tensor) -> bool:
    return not torch.equal(tensor, before)


def _wanted(moved: Tensor, before: Tensor, lost: Tensor | None) -> Tensor:
    """Return Δ_t + e_{t−1} of a parameter, in float64."""
    step = moved.double() - before.double()
    return step if lost is None else step + lost.double()


def _rounded(plan: Plan, round: int, name: str, step: Tensor) -> Tensor:
    return round_to(plan.wire_down, step.float(), rounding_generator(plan.seed, _SERVER, round, name))

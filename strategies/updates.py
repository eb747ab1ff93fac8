"""Deltas and updates: what a client computes, Δθ = θ_new − θ_old, and what it sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Delta = Mapping[str, Tensor]  # parameter name -> Δθ of that parameter


@dataclass(frozen=True)
class Update:
    """One organisation's contribution to a round.

    delta: float32 tensors of the parameters that the stage shares. examples: the number of records it declares, its weight.
    steps: local steps taken. epsilon: ε it has spent in this run so far, as it states itself; None without privacy. told: what
    else plan and policy let it say, by name: numbers about its records, with or without noise as its policy has it.
    noise_variance: of the privacy noise on every coordinate of a parameter's delta, by parameter; None where it states none.
    statistics: arrays that a fusion asks for beside the delta, as "fisher/<parameter>" or "gram/<parameter>" (float32).
    received: SHA-256 of what it was trained from (wire.state_digest of the state, and of what was sent beside it).
    """

    organisation: str
    round: int
    delta: Delta
    examples: int
    steps: int
    epsilon: float | None = None
    told: Mapping[str, float] = field(default_factory=dict)
    noise_variance: Mapping[str, float] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    received: str = ""


def difference(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Delta:
    """Δθ = θ_new − θ_old for every parameter of `new`."""
    return {name: tensor - old[name] for name, tensor in new.items()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number; None where there is none."""
    return next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)


def apply_delta(state: Mapping[str, Tensor], delta: Delta) -> dict[str, Tensor]:
    """θ + Δθ, computed in float64 and kept in the parameter's dtype; parameters without a delta stay as they are."""
    moved = {name: (state[name].to(torch.float64) + d.to(torch.float64)).to(state[name].dtype) for name, d in delta.items()}
    return {**state, **moved}

"""Deltas and updates, and what the parts of a strategy see of a round: weighed updates, the context, and the fused delta.

What the parts of a strategy see of a round: weighed updates, the context, and the fused delta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from cotune.models.adapters.adapter import Adapter
from cotune.strategies.blocks import empty, flatten, is_finite, max_abs, read_blocks, shape_of

# of a parameter: those of usable models are below 100, extreme ones are how rounding errors are made large, and sites refuse them
MAX_VALUE = 1e4

Delta = Mapping[str, Tensor]  # parameter name -> Δθ of that parameter


@dataclass(frozen=True)
class Update:
    """One organization's contribution to a round.

    delta: float32 tensors of the parameters that the stage shares. examples: the number of records it declares, its weight.
    steps: local steps taken. epsilon: ε it has spent in this run so far, as it states itself; None without privacy. disclosures:
    what else plan and policy let it say, by name: numbers about its records, with or without noise as its policy has it.
    noise_variance: of the privacy noise on every coordinate of a parameter's delta, by parameter; None where it states none.
    statistics: arrays that a fusion asks for beside the delta, as "fisher/<parameter>" or "gram/<parameter>" (float32).
    received: SHA-256 of what it was trained from (wire.state_digest of the state, and of what was sent beside it).
    """

    organization: str
    round: int
    delta: Delta
    examples: int
    steps: int
    epsilon: float | None = None
    disclosures: Mapping[str, float] = field(default_factory=dict)
    noise_variance: Mapping[str, float] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    received: str = ""


def difference(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Delta:
    """Δθ = θ_new − θ_old for every parameter of `new`."""
    return {name: tensor - old[name] for name, tensor in new.items()}


def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number; None where there is none."""
    return next((name for name in tensors if not is_finite(tensors, name)), None)


def find_extreme(tensors: Mapping[str, Tensor], limit: float = MAX_VALUE) -> tuple[str, float] | None:
    """The name and the largest entry of the first tensor that has one beyond ±limit, or no number; None where there is none."""
    for name in tensors:
        largest = max_abs(tensors, name)
        if not largest <= limit:
            return name, largest
    return None


def apply_delta(state: Mapping[str, Tensor], delta: Delta, rate: float = 1.0) -> dict[str, Tensor]:
    """θ + rate·Δθ, computed in float64 and kept in the parameter's dtype; parameters without a delta stay as they are."""
    return {**state, **{name: _moved(state[name], delta, name, rate) for name in delta}}


def _moved(parameter: Tensor, delta: Delta, name: str, rate: float) -> Tensor:
    """One parameter after the step, by blocks where both are as large."""
    if parameter.dtype not in (torch.float32, torch.float64) or shape_of(delta, name) != parameter.shape:
        return (parameter.to(torch.float64) + delta[name].to(torch.float64) * rate).to(parameter.dtype)
    moved = parameter.detach().clone(memory_format=torch.contiguous_format)
    entries = flatten(moved)
    for where, block in read_blocks(delta, name):
        block *= rate
        entries[where] = entries[where] + block
    return moved


@dataclass(frozen=True)
class LocalSteps:
    """How every organization trains in the round.

    learning_rate: η of the first parameter group. steps: K, or no real limit where the plan gives epochs.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    steps: int = 1


class PublicInputs(Protocol):
    """The plan's public inputs, as the models of a round answer them: a class for each, or for each word of each."""

    def predict(self, delta: Delta) -> Tensor:
        """Return the scores (answers, classes) of θ + delta, in float64; rows of NaN for what was not read."""
        ...

    def distill(
        self, delta: Delta, taught: Tensor, *, temperature: float, learning_rate: float, epochs: int, batch_size: int
    ) -> Delta:
        """Train θ + delta to predict what was taught, and return what it then is apart from θ, in float64.

        Args:
            delta: The start.
            taught: (answers, classes) probabilities; rows of NaN are left out.
            temperature: Of both sides in the loss T² · KL.
            learning_rate: Of Adam at first; it falls to 0 over all steps.
            epochs: Passes over the inputs.
            batch_size: Inputs of a step.
        """
        ...


@dataclass(frozen=True)
class RoundContext:
    """What a part may know of the round beside the updates; a part that wants it has a parameter named `context`.

    round: from 1 to rounds. seed: the plan's. organizations: of the run, asked or not. state: θ, as everybody received it.
    adapters: of the stage, where it trains LoRA factors. memory: what this part remembered of the round before; empty in the
    first. score: the accuracy of θ + delta on the server's own validation records; None where it holds none. public: the plan's
    public inputs; None where it names none.
    """

    round: int = 1
    rounds: int = 1
    seed: int = 0
    organizations: int = 1
    state: Mapping[str, Tensor] = field(default_factory=dict)
    local: LocalSteps = LocalSteps()
    adapters: tuple[Adapter, ...] = ()
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    score: Callable[[Delta], float] | None = None
    public: PublicInputs | None = None


@dataclass(frozen=True)
class WeightedUpdate:
    """An update with its weight w_k, 0 or more and not normalized; a weighting may weigh every parameter by itself.

    state: θ as received, for the shapes: an organization with a smaller rank sends smaller LoRA factors.
    """

    update: Update
    weight: float | Mapping[str, float]
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def delta(self) -> dict[str, Tensor]:
        """The delta in float64; factors of a smaller rank are padded with zeros."""
        return {name: self.padded(name) for name in self.update.delta}

    @property
    def entries(self) -> Delta:
        """The delta as it came, most often in float32, to be read by blocks; as `delta` where factors are of a smaller rank."""
        sent = self.update.delta
        is_whole = all(name not in self.state or self.state[name].shape == shape_of(sent, name) for name in sent)
        return sent if is_whole else self.delta

    def padded(self, name: str) -> Tensor:
        """One parameter of `delta`, which is kept by nobody."""
        sent = self.update.delta
        whole = empty(shape_of(sent, name))
        entries = flatten(whole)
        for where, block in read_blocks(sent, name):
            entries[where] = block
        return self._padded(name, whole)

    def weight_of(self, name: str) -> float | Tensor:
        """w_k of a parameter; a mask times w_k where the organization holds a part of it only."""
        weight = self.weight if isinstance(self.weight, int | float) else self.weight[name]
        sent = self.update.delta[name]
        if name not in self.state or self.state[name].shape == sent.shape:
            return weight
        return self._padded(name, torch.full_like(sent, weight, dtype=torch.float64))

    @property
    def scalar(self) -> float:
        """The one weight of the update. Raises TypeError where every parameter has its own."""
        if not isinstance(self.weight, int | float):
            raise TypeError("expected one weight for the update, got one for each parameter")
        return float(self.weight)

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        shape = self.state[name].shape if name in self.state else tensor.shape
        if shape == tensor.shape:
            return tensor
        whole = torch.zeros(shape, dtype=tensor.dtype)
        whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
        return whole


@dataclass(frozen=True)
class Aggregate:
    """What a round's updates have become: D, how many there were, Σ p_k ‖Δ_k‖², and what the fusion remembers.

    weights: organization -> the share p_k that a fusion has given its update, where that is not its weight's.
    """

    delta: Delta
    participants: int = 1
    mean_squared_norm: float = 0.0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

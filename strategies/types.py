"""Deltas and updates, and what the components of a strategy see of a round: weighted updates, context, and aggregate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from cotune.models.adapters.adapter import Adapter
from cotune.strategies.tensor_blocks import empty, flatten, is_finite, max_abs, read_blocks, shape_of

# The largest magnitude of a parameter. Those of usable models are below 100; an attacker could use extreme ones to amplify
# rounding errors, so sites refuse them.
MAX_VALUE = 1e4

Delta = Mapping[str, Tensor]  # parameter name -> Δθ of that parameter


@dataclass(frozen=True)
class Update:
    """One organization's contribution to a round.

    Attributes:
        organization: Its name.
        round: The round it was trained for.
        delta: float32 tensors of the parameters that the stage shares.
        examples: The number of records that it declares.
        steps: Local steps taken.
        epsilon: ε spent in this run so far, as the organization states it; None without privacy.
        disclosures: Name -> number about its records, noised or not, as far as plan and policy allow.
        noise_variance: Parameter -> variance of the privacy noise on each coordinate of its delta; None if it states none.
        statistics: Arrays (float32) that a fusion asks for, as "fisher/<parameter>" or "gram/<parameter>".
        received: SHA-256 of what it was trained from: the state, and what was sent beside it.
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
    """Return Δθ = θ_new − θ_old for every parameter of `new`."""
    return {name: tensor - old[name] for name, tensor in new.items()}


def find_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is infinite or NaN; None if there is none."""
    return next((name for name in tensors if not is_finite(tensors, name)), None)


def find_extreme(tensors: Mapping[str, Tensor], limit: float = MAX_VALUE) -> tuple[str, float] | None:
    """Return name and largest magnitude of the first tensor with an entry beyond ±limit or NaN; None if there is none."""
    for name in tensors:
        largest = max_abs(tensors, name)
        if not largest <= limit:
            return name, largest
    return None


def apply_delta(state: Mapping[str, Tensor], delta: Delta, rate: float = 1.0) -> dict[str, Tensor]:
    """Return θ + rate·Δθ, computed in float64 and rounded to each parameter's type.

    Args:
        state: θ.
        delta: Δθ; parameters that it lacks stay as they are.
        rate: Factor of the delta.
    """
    return {**state, **{name: _moved(state[name], delta, name, rate) for name in delta}}


def _moved(parameter: Tensor, delta: Delta, name: str, rate: float) -> Tensor:
    """Return one parameter after the step, computed by blocks if parameter and delta have the same shape."""
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

    Attributes:
        learning_rate: η of the first parameter group.
        momentum: Of local SGD.
        steps: K; a very large number if the plan gives epochs instead.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    steps: int = 1


class PublicInputs(Protocol):
    """The plan's public inputs, on which a round's models predict a class for each input, or for each word of each input."""

    def predict(self, delta: Delta) -> Tensor:
        """Return the scores (answers, classes) of θ + delta in float64; rows of NaN for answers that the model cannot give."""
        ...

    def distill(
        self, delta: Delta, taught: Tensor, *, temperature: float, learning_rate: float, epochs: int, batch_size: int
    ) -> Delta:
        """Train θ + delta to predict target probabilities, and return the trained model's difference from θ, in float64.

        Args:
            delta: Where training starts.
            taught: Target probabilities (answers, classes); rows of NaN are left out.
            temperature: T, of both distributions in the loss T² · KL.
            learning_rate: Initial rate of Adam; it falls to 0 over all steps.
            epochs: Passes over the inputs.
            batch_size: Inputs per step.
        """
        ...


@dataclass(frozen=True)
class RoundContext:
    """What a component may know of the round besides the updates, if it has a parameter named `context`.

    Attributes:
        round: From 1 to `rounds`.
        rounds: Of the plan.
        seed: Of the plan.
        organizations: Number of organizations in the run, asked in this round or not.
        state: θ, as all organizations received it.
        local: How organizations train.
        adapters: LoRA adapters of the stage, if it trains any.
        memory: What this component returned as memory in the previous round; empty in the first.
        score: Delta -> accuracy of θ + delta on the server's validation records; None if it has none.
        public: The plan's public inputs; None if it names none.
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
    """An update with its weight.

    Attributes:
        update: As received.
        weight: w_k ≥ 0, not normalized; or parameter -> weight.
        state: θ as received, for its shapes: an organization with a smaller rank sends smaller LoRA factors.
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
        """The delta as received, usually in float32, to be read by blocks; `delta` if factors have a smaller rank."""
        sent = self.update.delta
        is_whole = all(name not in self.state or self.state[name].shape == shape_of(sent, name) for name in sent)
        return sent if is_whole else self.delta

    def padded(self, name: str) -> Tensor:
        """Return one parameter of `delta` without caching it."""
        sent = self.update.delta
        whole = empty(shape_of(sent, name))
        entries = flatten(whole)
        for where, block in read_blocks(sent, name):
            entries[where] = block
        return self._padded(name, whole)

    def weight_of(self, name: str) -> float | Tensor:
        """Return w_k of a parameter; w_k times a mask if the organization has only a part of it."""
        weight = self.weight if isinstance(self.weight, int | float) else self.weight[name]
        sent = self.update.delta[name]
        if name not in self.state or self.state[name].shape == sent.shape:
            return weight
        return self._padded(name, torch.full_like(sent, weight, dtype=torch.float64))

    @property
    def scalar(self) -> float:
        """The update's single weight; raises TypeError if every parameter has its own."""
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
    """The result of a round's fusion.

    Attributes:
        delta: D.
        participants: Number of updates.
        mean_squared_norm: Σ p_k ‖Δ_k‖².
        memory: What the fusion passes to its next round.
        weights: Organization -> p_k, if the fusion changed the shares that follow from the weights.
    """

    delta: Delta
    participants: int = 1
    mean_squared_norm: float = 0.0
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

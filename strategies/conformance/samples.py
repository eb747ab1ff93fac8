"""Synthetic rounds to check a component with: a small model, updates of unlike organizations, and what the component needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cotune.models.adapters.adapter import Adapter
from cotune.strategies.aggregator import Aggregator
from cotune.strategies.registry import ComponentInfo, Needs
from cotune.strategies.types import Aggregate, Delta, LocalSteps, RoundContext, Update

_DENSE = {"encoder.weight": (4, 3), "head.weight": (3, 4), "head.bias": (3,)}
_ADAPTERS = (
    Adapter("query.A", "query.B", "query.weight", scale=2.0, rank=3),
    Adapter("value.A", "value.B", "value.weight", scale=0.5, rank=3),
)
_ADAPTED = {f"{part}.{name}": shape for part in ("query", "value") for name, shape in (("A", (3, 5)), ("B", (4, 3)))}
_ORGANIZATIONS = 5
_STEPS = 4


@dataclass(frozen=True)
class Case:
    """A component with its parameters, and a round for it.

    Attributes:
        info: The component's declaration.
        parameters: All of them, with their values.
        context: Of the round.
        updates: At least as many as the component needs.
        weights: Organization -> weight; 1 for all if the fusion uses none.
    """

    info: ComponentInfo
    parameters: Mapping[str, Any]
    context: RoundContext
    updates: Sequence[Update]
    weights: Mapping[str, float]

    @property
    def sent(self) -> set[str]:
        """The names of the parameters in the updates."""
        return set(self.updates[0].delta)

    def build(self) -> Any:
        """Build the component, if it is a server optimizer or a client term."""
        return self.info.build(**self.parameters)

    def fuse(
        self,
        updates: Sequence[Update] | None = None,
        context: RoundContext | None = None,
        weights: Mapping[str, Any] | None = None,
    ) -> Aggregate:
        """Fuse updates with the real aggregator.

        Args:
            updates: None: those of the case.
            context: None: that of the case.
            weights: Organization -> weight, or parameter -> weight; None: those of the case. 1 for organizations it lacks.
        """
        given = self.weights if weights is None else weights
        weigh = ComponentInfo(
            "weighting", "given", lambda update: given.get(update.organization, 1.0), "", Needs(by_parameter=True)
        )
        driver = Aggregator((weigh, {}), (self.info, self.parameters), context or self.context)
        for update in self.updates if updates is None else updates:
            driver.add(update)
        return driver.result()

    def fresh(self) -> Case:
        """Return a deep copy, for components that might change tensors in place."""
        state = copy.deepcopy(dict(self.context.state))
        return replace(self, context=replace(self.context, state=state), updates=copy.deepcopy(list(self.updates)))


def complete(info: ComponentInfo) -> dict[str, Any]:
    """Return values for the parameters that the component requires: within their bounds, or the first choice."""
    schema = info.schema
    return {name: _value(schema["properties"][name]) for name in schema.get("required", ())}


def _value(about: Mapping[str, Any]) -> Any:
    if "const" in about or "enum" in about:
        return about.get("const") or about["enum"][0]
    if about.get("type") == "string":
        return ""
    least = about.get("minimum", about.get("exclusiveMinimum", 0))
    if about.get("type") == "integer":
        return about.get("minimum", least + 1)
    return (least + about.get("maximum", about.get("exclusiveMaximum", least + 2.0))) / 2


def sample(info: ComponentInfo, parameters: Mapping[str, Any], context: RoundContext | None = None) -> Case:
    """Build a case with as many updates as the component needs and everything it asks organizations to send.

    Args:
        info: The component's declaration.
        parameters: All of them, with their values.
        context: None: a synthetic one. Random numbers are seeded, so that the same arguments give the same case.
    """
    generator = torch.Generator().manual_seed(1)
    context = context or _context(info, generator)
    count = max(_ORGANIZATIONS, info.min_updates(**parameters))
    names = _sent(info, context)
    common = _like(context.state, names, generator)
    updates = [_update(i, common, context, info, generator) for i in range(count)]
    weights = {u.organization: float(u.examples) if info.needs.weights else 1.0 for u in updates}
    return Case(info, parameters, replace(context, organizations=count), updates, weights)


def _context(info: ComponentInfo, generator: torch.Generator) -> RoundContext:
    needs = info.needs
    adapters = _ADAPTERS if needs.adapters or needs.rewrites else ()
    shapes = {**_ADAPTED, "query.weight": (4, 5), "value.weight": (4, 5), "head.weight": (3, 4)} if adapters else _DENSE
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    target = _like(state, list(state), generator)

    def score(delta: Delta) -> float:
        missed = sum(float((d.double() - target[name].double()).pow(2).sum()) for name, d in delta.items())
        return 1.0 / (1.0 + missed)

    local = LocalSteps(0.5, 0.0, _STEPS)
    public = LinearInputs(state, torch.randn((8, 4), generator=generator, dtype=torch.float64)) if needs.public_inputs else None
    return RoundContext(round=2, seed=7, state=state, local=local, adapters=adapters, score=score, public=public)


class LinearInputs:
    """Public inputs for a model that consists of a head only: softmax regression (see `types.PublicInputs`)."""

    def __init__(self, state: Mapping[str, Tensor], inputs: Tensor) -> None:
        """inputs: (n, d) for `head.weight` (classes, d) and `head.bias` (classes,) in the state."""
        self._state = state
        self._inputs = inputs

    def predict(self, delta: Delta) -> Tensor:
        """Return the scores (n, classes) of θ + delta."""
        moved = {name: self._state[name].double() for name in ("head.weight", "head.bias")}
        moved |= {name: moved[name] + delta[name].double() for name in moved if name in delta}
        return self._inputs @ moved["head.weight"].T + moved["head.bias"]

    def distill(
        self, delta: Delta, taught: Tensor, *, temperature: float, learning_rate: float, epochs: int, batch_size: int
    ) -> Delta:
        """Take one step of gradient descent on all inputs in each epoch, for θ + delta; see `types.PublicInputs.distill`.

        Args:
            delta: Where the student starts, relative to θ.
            taught: (n, classes), the probabilities to learn.
            temperature: Of the student's softmax.
            learning_rate: Of a step.
            epochs: How many steps are taken.
            batch_size: Ignored: every step takes all inputs.
        """
        found = {name: tensor.double().clone() for name, tensor in delta.items()}
        for _ in range(epochs):
            apart = functional.softmax(self.predict(found) / temperature, dim=1) - taught
            steps = {"head.weight": apart.T @ self._inputs / len(taught), "head.bias": apart.mean(dim=0)}
            found |= {name: found[name] - learning_rate * step for name, step in steps.items() if name in found}
        return found


def _sent(info: ComponentInfo, context: RoundContext) -> list[str]:
    """Return what organizations train: both factors if the component supports it, else B only; and all other parameters."""
    both = not info.needs.adapters or "ab" in info.needs.adapters
    hidden = {a.weight for a in context.adapters} | (set() if both else {a.a for a in context.adapters})
    return [name for name in context.state if name not in hidden]


def _like(state: Mapping[str, Tensor], names: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: 0.1 * torch.randn(state[name].shape, generator=generator) for name in names}


def _update(i: int, common: Delta, context: RoundContext, info: ComponentInfo, generator: torch.Generator) -> Update:
    """Return an update that is a common delta plus one of the same size of its own."""
    own = _like(context.state, list(common), generator)
    needs = info.needs
    return Update(
        organization=f"organization-{i}",
        round=context.round,
        delta={name: common[name] + tensor for name, tensor in own.items()},
        examples=100 + 50 * i,
        steps=_STEPS - i % 2,
        disclosures={"loss": 0.5 + 0.25 * i} if "loss" in needs.sends else {},
        noise_variance=dict.fromkeys(own, 0.001 * (1 + i)) if "noise" in needs.sends else None,
        statistics=_statistics(own, info, generator),
    )


def _statistics(delta: Delta, info: ComponentInfo, generator: torch.Generator) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in delta.items():
        if "fisher" in info.needs.sends:
            found[f"fisher/{name}"] = 0.1 + torch.rand(tensor.shape, generator=generator)
        if "gram" in info.needs.sends and tensor.dim() == 2:
            inputs = torch.randn(20, tensor.shape[1], generator=generator)
            found[f"gram/{name}"] = inputs.T @ inputs
    return found

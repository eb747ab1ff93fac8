"""Which arrays a plan's strategy wants beside the deltas, by name and shape: the client makes them, the server checks them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from cotune.models.sharing import SharedModel
from cotune.plan.schema import Plan


def statistic_shapes(plan: Plan, model: SharedModel, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Array -> shape, for a round that trains `names`: "fisher/<parameter>" like the parameter, "gram/<weight>" (d, d)."""
    names, own = list(names), dict(model.parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    if "fisher" in plan.strategy.sends:
        shapes |= {f"fisher/{name}": tuple(own[name].shape) for name in names}
    if "gram" in plan.strategy.sends:
        sizes = {name: layer.in_features + with_bias for name, (layer, with_bias) in gram_layers(model, names).items()}
        shapes |= {f"gram/{name}": (size, size) for name, size in sizes.items()}
    return shapes


def gram_layers(model: SharedModel, names: Iterable[str]) -> dict[str, tuple[nn.Linear, bool]]:
    """Weight -> its linear layer, where it is trained, and whether its bias is trained with it."""
    wanted, own = set(names), {id(parameter): name for name, parameter in model.parameters()}
    linear = [layer for layer in model.module.modules() if isinstance(layer, nn.Linear)]
    trained = {own[id(layer.weight)]: layer for layer in linear if own.get(id(layer.weight)) in wanted}
    return {name: (layer, layer.bias is not None and own[id(layer.bias)] in wanted) for name, layer in trained.items()}

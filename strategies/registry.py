"""Declare the components of a strategy: name, source, needs, and parameters.

A component is a function or a frozen dataclass with one of the four decorators; its signature is the schema of its table in a
plan. Built-in components are found in the folders weightings/, fusions/, server_optimizers/ and client_terms/: adding one takes a
new file and nothing else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from cotune.errors import nearest

Kind = Literal["weighting", "fusion", "server_optimizer", "client_term"]
Payload = Literal["noise", "loss", "fisher", "gram"]  # what organizations send beside their deltas
FOLDERS: dict[Kind, str] = {
    "weighting": "weightings",
    "fusion": "fusions",
    "server_optimizer": "server_optimizers",
    "client_term": "client_terms",
}
_INJECTED = ("update", "updates", "context")  # arguments that the round supplies; all others come from the plan
_Build = TypeVar("_Build", bound=Callable[..., Any])


def get_kind_label(kind: str) -> str:
    """Return the kind of a component in words, such as "server optimizer"."""
    return kind.replace("_", " ")


class Visibility(StrEnum):
    """What the server must see of the updates."""

    SUM = "one sum"
    SUM_2PASS = "sums, in several passes"
    PER_CLIENT = "each update"


@dataclass(frozen=True)
class Needs:
    """What a component asks of a run; the compatibility checks read it.

    Attributes:
        visibility: What the server must see of the updates.
        sends: What organizations must send beside their deltas.
        receives: Whether organizations receive tensors beside the model.
        client_state: Whether organizations keep tensors between rounds.
        participation: The smallest fraction of the organizations that each round must ask.
        optimizers: The local optimizers that it assumes; empty: any.
        momentum: Whether local optimizers may have momentum.
        weights: Whether it uses the weights of the weighting.
        by_parameter: Whether it treats each entry separately, so that weights may differ between parameters.
        adapters: The values of lora.factors that it supports; empty: it does not depend on adapters.
        mixed_ranks: Whether organizations may train adapters of smaller ranks.
        rewrites: What it changes of adapters, trained or not.
        sets_state: Whether its result is a new state rather than a direction; the server optimizer must apply it unchanged.
        mean: Whether it requires the weighted mean as fusion, as client terms that keep or receive tensors always do.
        server_data: Whether it evaluates updates on the server's validation records.
        public_inputs: Whether it uses predictions on the plan's public inputs.
        client_privacy: Why client-level privacy is not supported with it; empty: it is.
    """

    visibility: Visibility = Visibility.SUM
    sends: tuple[Payload, ...] = ()
    receives: bool = False
    client_state: bool = False
    participation: float = 0.0
    optimizers: tuple[str, ...] = ()
    momentum: bool = True
    weights: bool = True
    by_parameter: bool = False
    adapters: tuple[str, ...] = ()
    mixed_ranks: bool = False
    rewrites: tuple[Literal["a", "b", "weight"], ...] = ()
    sets_state: bool = False
    mean: bool = False
    server_data: bool = False
    public_inputs: bool = False
    client_privacy: str = ""


@dataclass(frozen=True)
class ComponentInfo:
    """The declaration of a component.

    Attributes:
        kind: weighting, fusion, server optimizer or client term.
        name: What a plan calls it.
        build: A function (weighting, fusion) or a dataclass (server optimizer, client term).
        cite: Its source, such as a paper.
        needs: What it asks of a run.
        min_updates: Its parameters -> the fewest updates that a round must have.
        homogeneous: Whether a fusion of c·Δ_k for all k gives c·D.
        idempotent: Whether a fusion of identical deltas gives that delta.
    """

    kind: Kind
    name: str
    build: Callable[..., Any]
    cite: str
    needs: Needs
    min_updates: Callable[..., int] = field(default=lambda **_: 1)
    homogeneous: bool = True
    idempotent: bool = True

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.build) or "").split("\n")[0]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that a plan may give."""
        return {name: p for name, p in inspect.signature(self.build).parameters.items() if name not in _INJECTED}

    @property
    def sees_all(self) -> bool:
        """Whether a weighting looks at all updates together."""
        return "updates" in inspect.signature(self.build).parameters

    @property
    def is_mean(self) -> bool:
        """Whether a fusion gives the weighted mean of what was trained, entry by entry."""
        return self.needs.by_parameter and self.homogeneous and self.idempotent and not self.needs.sends

    @property
    def needs_context(self) -> bool:
        """Whether it takes the `RoundContext`."""
        return "context" in inspect.signature(self.build).parameters

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Validate parameters, and fill in defaults.

        Args:
            given: Parameter -> value, as in a plan.

        Returns:
            All parameters with their values.

        Raises:
            ValueError: If a parameter is unknown, missing, or outside the type or bounds in the signature.
        """
        known = self.parameters
        words = get_kind_label(self.kind)
        for key in given:
            if key not in known:
                hint = nearest(key, known) if known else ": it takes no parameters"
                raise ValueError(f'{words} "{self.name}" has no parameter "{key}"{hint}')
        try:
            return dict(self._model.model_validate(dict(given)).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "missing":
                raise ValueError(f'{words} "{self.name}" lacks its parameter {key}: expected it to be given') from None
            raise ValueError(f'{words} "{self.name}" has {key} = {first["input"]!r}: {message[0].lower()}{message[1:]}') from None

    @property
    def schema(self) -> dict[str, Any]:
        """Its parameters as JSON Schema: types, defaults, bounds, choices."""
        return dict(self._model.model_json_schema())

    @functools.cached_property
    def _model(self) -> Any:
        target = self.build.__init__ if inspect.isclass(self.build) else self.build
        hints = get_type_hints(target, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints.get(name, float), ... if p.default is inspect.Parameter.empty else p.default)
            for name, p in self.parameters.items()
        }
        return create_model("Parameters", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields)


def _decorator(
    kind: Kind, name: str, cite: str, min_updates: Callable[..., int] | None, homogeneous: bool, idempotent: bool, needs: Needs
) -> Callable[[_Build], _Build]:
    def mark(build: _Build) -> _Build:
        info = ComponentInfo(kind, name, build, cite, needs, min_updates or (lambda **_: 1), homogeneous, idempotent)
        build.component = info  # type: ignore[attr-defined]
        return build

    return mark


def weighting(name: str, *, cite: str, needs: Needs = Needs()) -> Callable[[_Build], _Build]:
    """Register `f(update, …) -> w_k`, or `f(updates, …) -> [w_1, …]` if it compares them, as a weighting.

    A weight is a number, or parameter -> number.

    Args:
        name: What plans call it.
        cite: Its source.
        needs: What it asks of a run.
    """
    return _decorator("weighting", name, cite, None, True, True, needs)


def fusion(
    name: str,
    *,
    cite: str,
    needs: Needs = Needs(),
    min_updates: Callable[..., int] | None = None,
    homogeneous: bool = True,
    idempotent: bool = True,
) -> Callable[[_Build], _Build]:
    """Register `f(updates, …) -> Delta | Aggregate`, or a generator of contributions (see `sums`), as a fusion.

    Args:
        name: What plans call it.
        cite: Its source.
        needs: What it asks of a run.
        min_updates: Its parameters -> the fewest updates that a round must have; None: 1.
        homogeneous: Whether deltas c·Δ_k for all k give c·D.
        idempotent: Whether identical deltas give that delta.
    """
    return _decorator("fusion", name, cite, min_updates, homogeneous, idempotent, needs)


def server_optimizer(name: str, *, cite: str, needs: Needs = Needs()) -> Callable[[_Build], _Build]:
    """Register a frozen dataclass derived from `ServerOptimizer`.

    Args:
        name: What plans call it.
        cite: Its source.
        needs: What it asks of a run.
    """
    return _decorator("server_optimizer", name, cite, None, True, True, needs)


def client_term(name: str, *, cite: str, needs: Needs = Needs()) -> Callable[[_Build], _Build]:
    """Register a frozen dataclass derived from `ClientTerm`.

    Args:
        name: What plans call it.
        cite: Its source.
        needs: What it asks of a run.
    """
    return _decorator("client_term", name, cite, None, True, True, needs)


def infer_component(kind: Kind, name: str, build: Callable[..., Any]) -> ComponentInfo:
    """Declare a component without a decorator: a generator sees sums, any other fusion each update.

    Args:
        kind: What the plan uses it as.
        name: What the plan calls it.
        build: The function or class.
    """
    visibility = Visibility.SUM if kind != "fusion" or inspect.isgeneratorfunction(build) else Visibility.PER_CLIENT
    return ComponentInfo(kind, name, build, "", Needs(visibility=visibility))


@functools.cache
def get_builtin_components(kind: Kind) -> Mapping[str, ComponentInfo]:
    """Return cotune's own components of a kind, by name."""
    found: dict[str, ComponentInfo] = {}
    folder = importlib.import_module(f"cotune.strategies.{FOLDERS[kind]}")
    for module_info in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
        module = importlib.import_module(module_info.name)
        for value in vars(module).values():
            info = getattr(value, "component", None)
            if isinstance(info, ComponentInfo) and info.kind == kind and info.build.__module__ == module.__name__:
                found[info.name] = info
    return dict(sorted(found.items()))

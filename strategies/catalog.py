"""Describe all components and recipes as plain data, for the command line and the documentation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cotune.errors import PlanError, nearest
from cotune.strategies.compatibility import PlanFacts, find_privacy_problem
from cotune.strategies.config import RECIPES, Component, StrategyConfig, get_recipe_components
from cotune.strategies.plugins import get_components
from cotune.strategies.registry import FOLDERS, ComponentInfo, Kind, Visibility, get_builtin_components, get_kind_label

_SENDS = {
    "noise": "how much privacy noise its delta carries",
    "loss": "the loss of the received model on its records",
    "fisher": "the mean squared gradients of its records",
    "gram": "the inner products of its layers' inputs",
}
_CHAIN: tuple[Kind, ...] = ("weighting", "fusion", "server_optimizer")


def list_components(*, installed: bool = True) -> list[dict[str, Any]]:
    """Describe every component of cotune, and those of installed packages if `installed`, by kind and name."""
    return [
        describe_component(info)
        for kind in FOLDERS
        for info in (get_components(kind) if installed else get_builtin_components(kind)).values()
    ]


def list_recipes() -> list[dict[str, Any]]:
    """Describe every recipe, by name."""
    return [describe_recipe(name) for name in sorted(RECIPES)]


def search(name: str) -> list[dict[str, Any]]:
    """Describe the recipe and all components of that name.

    Raises:
        PlanError: If there is neither.
    """
    recipe = [describe_recipe(name)] if name in RECIPES else []
    found = recipe + [describe_component(get_components(kind)[name]) for kind in FOLDERS if name in get_components(kind)]
    if not found:
        everything = {*RECIPES, *(known_name for kind in FOLDERS for known_name in get_components(kind))}
        raise PlanError(
            f'there is neither a strategy nor a part "{name}"{nearest(name, everything)}', code="plan.unknown_strategy"
        )
    return found


def describe_component(info: ComponentInfo) -> dict[str, Any]:
    """Describe a component: what it does, its parameters, what the server sees, what organizations send, and privacy."""
    return {
        "kind": info.kind,
        "name": info.name,
        "summary": info.summary,
        "description": inspect.getdoc(info.build) or "",
        "cite": info.cite,
        "parameters": _parameters(info),
        "sees": str(_visibility(info)),
        "sends": ["its delta", *(_SENDS[payload] for payload in info.needs.sends)],
        "receives": "tensors beside the model" if info.needs.receives else "",
        "state": "tensors of the model's size, from round to round" if info.needs.client_state else "",
        "record_privacy": _record_privacy(info),
        "client_privacy": _client_privacy(info),
        "needs": list(_needs(info)),
    }


def describe_recipe(name: str) -> dict[str, Any]:
    """Describe a recipe: its components, and what they mean together for visibility, disclosures and privacy."""
    given = get_recipe_components(name)
    strategy = StrategyConfig.model_validate(given)
    infos = [info for _, _, info in strategy.known_components()]
    words = {get_kind_label(kind): _call(part, given.get(kind)) for kind, part in strategy.components()}
    term = f", with {words['client term']}" if "client term" in words else ""
    return {
        "kind": "recipe",
        "name": name,
        "summary": " → ".join(words[get_kind_label(kind)] for kind in _CHAIN) + term,
        "parts": words,
        "lora": dict(RECIPES[name].get("lora", {})),
        "cite": _sources(name, strategy),
        "sees": str(max(map(_visibility, infos), key=list(Visibility).index)),
        "sends": list(dict.fromkeys(word for info in infos for word in describe_component(info)["sends"])),
        "state": next((word for info in infos if (word := describe_component(info)["state"])), ""),
        "record_privacy": max(map(_record_privacy, infos), key=_severity),
        "client_privacy": _recipe_client_privacy(infos, "weighting" in given),
    }


def _sources(name: str, strategy: StrategyConfig) -> list[str]:
    """Return the recipe's own source, or the sources of the components it names.

    The weighting's source counts only if the recipe names nothing else.
    """
    own = RECIPES[name].get("cite")
    given = get_recipe_components(name)
    telling = [kind for kind in given if kind != "weighting" or len(given) == 1] or ["fusion"]
    found = [info.cite for kind, _, info in strategy.known_components() if kind in telling and info.cite]
    return [own] if own else list(dict.fromkeys(found))


def _recipe_client_privacy(infos: Sequence[ComponentInfo], weighs: bool) -> str:
    """Describe client-level privacy with a recipe; one that names no weighting can use the one that this privacy needs."""
    worst = max((_client_privacy(info) for info in infos if weighs or info.kind != "weighting"), key=_severity)
    if not worst.startswith("yes") or all(find_privacy_problem(info, PlanFacts(client_privacy=True)) is None for info in infos):
        return worst.partition(":")[0] if worst.startswith("yes") else worst
    return 'yes: with strategy.weighting = "uniform"'


def _severity(words: str) -> int:
    return ["yes", "free", "at a price", "no"].index(words.partition(":")[0])


def _record_privacy(info: ComponentInfo) -> str:
    problem = find_privacy_problem(info, PlanFacts(record_privacy=True))
    if problem:
        return f"no: it {problem}"
    if "loss" in info.needs.sends:
        return "at a price: the loss is a release of its own, noised and charged as each organization's policy has it"
    where = "is added after clipping and noising" if info.kind == "client_term" else "works on what was noised already"
    return f"free: it {where}"


def _client_privacy(info: ComponentInfo) -> str:
    problem = find_privacy_problem(info, PlanFacts(client_privacy=True))
    if problem:
        return f"no: it {problem}"
    return "yes: it comes after the noise" if info.kind == "server_optimizer" else "yes"


def _visibility(info: ComponentInfo) -> Visibility:
    return Visibility.PER_CLIENT if info.sees_all else info.needs.visibility


def _needs(info: ComponentInfo) -> Iterator[str]:
    needs = info.needs
    if needs.participation:
        yield f"every organization must be asked at least every {1 / needs.participation:g} rounds"
    if needs.optimizers:
        yield f"organizations train with {' or '.join(needs.optimizers)}, at one learning rate"
    if not needs.momentum:
        yield "organizations train without momentum"
    if needs.adapters:
        yield f"for adapters, with lora.factors = {' or '.join(needs.adapters)}"
    if needs.rewrites:
        yield f"changes of every adapter: {', '.join(needs.rewrites)}"
    if needs.server_data:
        yield "the server holds validation records (validation_fraction)"
    if needs.public_inputs:
        yield "the server holds public inputs (public.source)"
    if needs.sets_state:
        yield "its result is a new model: the server optimizer must be sgd with lr 1"
    if needs.mean or needs.client_state:
        yield "counts on the weighted mean as fusion"
    if needs.client_state:
        yield "wants the weighting uniform where not all organizations are asked in every round"
    if info.kind == "fusion" and not needs.weights:
        yield "uses no weights"
    if needs.by_parameter and info.kind == "weighting":
        yield "weighs every parameter by itself, which the fusion must be able to follow"


def _parameters(info: ComponentInfo) -> list[dict[str, Any]]:
    schema = info.schema
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "type": _type(about),
            "default": None if name in required else about.get("default"),
            "required": name in required,
            "bounds": _bounds(about),
        }
        for name, about in schema.get("properties", {}).items()
    ]


_TYPES = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false", "null": "nothing"}


def _type(about: Mapping[str, Any]) -> str:
    choices = about.get("enum") or ([about["const"]] if "const" in about else None)
    if choices:
        return " or ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
    if "anyOf" in about:
        return " or ".join(_type(member) for member in about["anyOf"])
    return _TYPES.get(str(about.get("type")), str(about.get("type", "value")))


_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def _bounds(about: Mapping[str, Any]) -> str:
    given = [about, *about.get("anyOf", ())]
    return ", ".join(f"{word} {member[key]:g}" for member in given for key, word in _BOUNDS.items() if key in member)


def _call(part: Component, given: Any) -> str:
    """Return the component's name with the parameters that the recipe gives."""
    named = [f"{name} = {value}" for name, value in part.parameters.items() if isinstance(given, Mapping) and name in given]
    return f"{part.name} ({', '.join(named)})" if named else part.name

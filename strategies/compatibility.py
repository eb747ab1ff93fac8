"""Refuse combinations of plan and strategy that cannot work, before a run starts, with the reason and an alternative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from cotune.strategies.config import Component, StrategyConfig
from cotune.strategies.registry import ComponentInfo, Kind, Visibility, get_kind_label

_STATISTICS = {"fisher", "gram"}


@dataclass(frozen=True)
class PlanFacts:
    """What the rest of a plan demands of its strategy.

    Attributes:
        record_privacy: Whether the plan promises record-level privacy.
        client_privacy: Whether it promises client-level privacy.
        sums_only: Whether the server may see only sums of updates.
        participation: Fraction of the organizations that each round asks, in (0, 1].
        organizations: The fewest that a round asks; None if that is not known before the run.
        optimizers: The local optimizers of all stages.
        momentum: Whether local optimizers have momentum.
        one_rate: Whether all parameters have the same learning rate.
        same_steps: Whether all organizations take the same number of steps per round.
        modes: The `train` modes of all stages.
        factors: lora.factors if adapters are trained, else None.
        mixed_ranks: Whether organizations may train adapters of smaller ranks.
        personal: Whether organizations keep some of the parameters they train to themselves.
        server_data: Whether the server has validation records.
        public_inputs: Whether the plan names public inputs.
        folds_late: Whether late updates are folded into later rounds.
        several_tasks: Whether an organization sends only the heads of the tasks it has.
        plain_steps: Whether a delta is the sum of optimizer steps on (noised) gradients and nothing else.
        quantized: Whether the base model's linear layers are kept in 4 bits.
    """

    record_privacy: bool = False
    client_privacy: bool = False
    sums_only: bool = False
    participation: float = 1.0
    organizations: int | None = None
    optimizers: tuple[str, ...] = ("sgd",)
    momentum: bool = False
    one_rate: bool = True
    same_steps: bool = True
    modes: tuple[str, ...] = ("head",)
    factors: str | None = None
    mixed_ranks: bool = False
    personal: bool = False
    server_data: bool = False
    public_inputs: bool = False
    folds_late: bool = False
    several_tasks: bool = False
    plain_steps: bool = True
    quantized: bool = False


Found = Mapping[Kind, tuple[Component, ComponentInfo]]


def find_problem(strategy: StrategyConfig, facts: PlanFacts, infos: Mapping[Kind, ComponentInfo] | None = None) -> str | None:
    """Return why a plan cannot use a strategy.

    Args:
        strategy: Its components in files are not executed.
        facts: About the rest of the plan.
        infos: What is known of components in files, if they have been executed.

    Returns:
        The first problem in words; None if there is none.
    """
    found: Found = {kind: (part, info) for kind, part, info in strategy.known_components()}
    opened = {kind: (part, (infos or {})[kind]) for kind, part in strategy.components() if kind in (infos or {})}
    return next(chain(_problems({**found, **opened}, facts), _sending(strategy, facts), _modes(facts)), None)


def find_privacy_problem(info: ComponentInfo, facts: PlanFacts) -> str | None:
    """Return why a component does not support the privacy that a plan promises; None if it does."""
    return next(_privacy(info, facts), None)


def _sending(strategy: StrategyConfig, facts: PlanFacts) -> Iterator[str]:
    """Check what the plan itself asks organizations to send, which may be more than its components need."""
    statistics = sorted(_STATISTICS & set(strategy.sends))
    if facts.record_privacy and statistics:
        yield (
            f"strategy.sends asks for statistics of the records ({', '.join(statistics)}) that no noise protects: expected"
            " privacy = none, or a strategy that needs deltas alone"
        )


def _modes(facts: PlanFacts) -> Iterator[str]:
    whole = [mode for mode in facts.modes if mode in ("blocks", "full")]
    if facts.quantized and whole:
        yield (
            f"train = {whole[0]} changes weights that model.quantization keeps in 4 bits: expected train = lora or head, or"
            " model.quantization = none"
        )


def _problems(found: Found, facts: PlanFacts) -> Iterator[str]:
    yield from _between_parts(found)
    yield from _with_term(found.get("client_term"), found.get("weighting"), facts)
    for kind, (part, info) in found.items():
        for reason in _with_plan(part, info, facts):
            yield f'the {get_kind_label(kind)} "{part.name}" {reason}'


def _between_parts(found: Found) -> Iterator[str]:
    weighting = found.get("weighting")
    fusion = found.get("fusion")
    optimizer = found.get("server_optimizer")
    if weighting and fusion:
        if not fusion[1].needs.weights and weighting[0].name != "uniform":
            yield (
                f'the fusion "{fusion[0].name}" uses no weights, so the weighting "{weighting[0].name}" would do nothing:'
                ' expected weighting = "uniform"'
            )
        if weighting[1].needs.by_parameter and not fusion[1].needs.by_parameter:
            yield (
                f'the weighting "{weighting[0].name}" weighs every parameter by itself, which the fusion "{fusion[0].name}"'
                ' cannot follow: expected fusion = "mean", or a weighting such as "uniform"'
            )
    for kind, (part, info) in found.items():
        if optimizer and info.needs.sets_state and not is_plain(optimizer[0]):
            yield (
                f'the {get_kind_label(kind)} "{part.name}" gives a new model rather than a direction, which the server optimizer'
                f' "{optimizer[0].name}" would bend: expected server_optimizer = "sgd" with lr 1, no momentum and'
                " no schedule"
            )
        if fusion and _counts_on_the_mean(info) and not fusion[1].is_mean:
            yield (
                f'the {get_kind_label(kind)} "{part.name}" counts on the mean of what the organizations trained, and the fusion'
                f' "{fusion[0].name}" gives something else: expected fusion = "mean", or another {get_kind_label(kind)}'
            )


def _with_term(
    term: tuple[Component, ComponentInfo] | None, weighting: tuple[Component, ComponentInfo] | None, facts: PlanFacts
) -> Iterator[str]:
    if not term or not weighting:
        return
    name = weighting[0].name
    needs = weighting[1].needs
    if "noise" in needs.sends:
        yield (
            f'the weighting "{name}" knows the noise of plain training, which the client term "{term[0].name}"'
            ' feeds back: expected weighting = "uniform", or no client term'
        )
    if not term[1].needs.client_state or name == "uniform":
        return
    if needs.sends or needs.server_data or weighting[1].sees_all:
        yield (
            f'the client term "{term[0].name}" sums up what organizations keep, and the weighting "{name}" changes from round to'
            ' round: expected weighting = "uniform"'
        )
    if facts.participation < 1:
        yield (
            f'the client term "{term[0].name}" sums up what organizations keep, which the weighting "{name}" gets wrong where not'
            ' all of them are asked in every round: expected weighting = "uniform"'
        )


def _counts_on_the_mean(info: ComponentInfo) -> bool:
    return info.needs.mean or info.needs.client_state or info.needs.receives


def is_plain(optimizer: Component) -> bool:
    """Return whether a server optimizer adds the fused delta unchanged (sgd with lr 1 and nothing else)."""
    plain = {"lr": 1.0, "momentum": 0.0, "nesterov": False, "schedule": "constant", "warmup": 0}
    return optimizer.name == "sgd" and optimizer.parameters == plain


def _with_plan(part: Component, info: ComponentInfo, facts: PlanFacts) -> Iterator[str]:
    yield from _privacy(info, facts)
    yield from _participation(part, info, facts)
    yield from _training(info, facts)
    if facts.folds_late:
        yield from _lateness(info)
    if facts.several_tasks:
        yield from _heads(info)


def _privacy(info: ComponentInfo, facts: PlanFacts) -> Iterator[str]:
    needs = info.needs
    statistics = sorted(_STATISTICS & set(needs.sends))
    if facts.record_privacy and statistics:
        yield (
            f"needs statistics of the records ({', '.join(statistics)}) that no noise protects: expected privacy ="
            f" none, or a fusion"
            ' that needs deltas alone, such as "mean" or "ties"'
        )
    if facts.client_privacy and info.kind == "weighting" and info.name != "uniform":
        yield (
            "would undo client_privacy, which bounds what one organization changes by its clip norm: expected"
            ' strategy.weighting = "uniform"'
        )
    if facts.client_privacy and info.kind == "fusion" and info.name != "mean":
        yield 'is not supported with client_privacy, which adds noise to a sum of updates: expected strategy.fusion = "mean"'
    if facts.client_privacy and needs.client_privacy:
        yield f"is not supported with client_privacy: {needs.client_privacy}"
    if facts.sums_only and needs.visibility != Visibility.SUM:
        instead = "uniform" if info.kind == "weighting" else "mean"
        words = f"must see {needs.visibility}, and server.visibility allows one sum"
        yield f'{words}: expected a rule of one sum, such as "{instead}"'
    if facts.sums_only and info.sees_all:
        yield 'compares the updates, and server.visibility allows one sum: expected weighting = "examples" or "uniform"'


def _participation(part: Component, info: ComponentInfo, facts: PlanFacts) -> Iterator[str]:
    needs = info.needs
    least = info.min_updates(**part.parameters)
    if facts.participation < needs.participation:
        yield (
            f"needs every organization at least every {1 / needs.participation:g} rounds, and each is asked with"
            f" {facts.participation:g}: expected server.sample_rate of {needs.participation:g} or more, or a strategy"
            f" without state"
            ' at the organizations, such as "fedadam"'
        )
    if facts.organizations is not None and facts.organizations < least:
        some = facts.participation < 1
        asks = f"{'may ask as few as' if some else 'asks'} {facts.organizations} organizations"
        more = f"server.sample_size of {least} or more" if some else "more of them"
        yield f"needs {least} updates in a round, and the plan {asks}: expected {more}"


def _training(info: ComponentInfo, facts: PlanFacts) -> Iterator[str]:
    needs = info.needs
    wrong = [name for name in facts.optimizers if needs.optimizers and name not in needs.optimizers]
    if wrong:
        yield f"assumes local.optimizer = {' or '.join(needs.optimizers)}, and the plan has {wrong[0]}: change one of the two"
    if not needs.momentum and facts.momentum:
        yield "assumes plain gradient steps, and the plan has local.momentum above 0: expected 0"
    if needs.optimizers and not facts.one_rate:
        yield "assumes one learning rate, and the plan has another local.head_learning_rate: leave it out"
    if needs.client_state and not facts.same_steps:
        yield "assumes as many steps at every organization, and the plan has local.epochs: expected local.steps"
    if facts.quantized and "weight" in needs.rewrites:
        yield (
            "adds to the weights under the adapters, which model.quantization keeps in 4 bits: expected model.quantization ="
            ' none, or a fusion of the adapters alone, such as "mean"'
        )
    if needs.adapters and "lora" not in facts.modes:
        yield "is for adapters, and no stage of the plan trains any: expected train = lora"
    if needs.adapters and facts.factors is not None and facts.factors not in needs.adapters:
        yield f"is for lora.factors = {' or '.join(needs.adapters)}, and the plan has {facts.factors}: change one of the two"
    if facts.mixed_ranks and info.kind == "fusion" and not needs.mixed_ranks:
        yield 'cannot fuse adapters of different ranks: expected one rank for all, or a fusion that can, such as "mean"'
    if (
        facts.mixed_ranks
        and info.kind != "fusion"
        and (info.sees_all or needs.client_state or needs.receives or needs.server_data)
    ):
        yield "is about whole adapters, and the plan has smaller ranks: expected one rank for all, or a strategy without it"
    if facts.mixed_ranks and facts.client_privacy and info.kind == "fusion":
        yield "cannot take smaller ranks with client_privacy, which divides by a fixed number: expected one rank for all"
    if facts.personal and (needs.adapters or needs.server_data or needs.public_inputs or needs.client_state or needs.receives):
        yield "is about whole models, and the plan leaves a part of them at home: expected no lora.keep and no personal.parts"
    if "noise" in needs.sends and not facts.plain_steps:
        yield (
            "knows the noise of plain steps, and the plan adds a pull to them: expected local.base_decay = 0 and no pFedMe, or"
            ' weighting = "uniform"'
        )
    if needs.server_data and not facts.server_data:
        yield "judges updates by records of the server, and it has none: expected validation_fraction above 0"
    if needs.public_inputs and not facts.public_inputs:
        yield "looks at predictions on public inputs, and the plan names none: expected public.source"


def _heads(info: ComponentInfo) -> Iterator[str]:
    """Check for several tasks: a head is averaged over those that have it; rules on whole updates would compare unlike ones."""
    needs = info.needs
    fits = {
        "fusion": info.is_mean and needs.visibility == Visibility.SUM,
        "weighting": not info.sees_all and not needs.server_data and not needs.sends,
        "server_optimizer": not needs.mean,
        "client_term": not (needs.client_state or needs.receives),
    }
    if not fits.get(info.kind, True):
        yield (
            "is about whole updates, and with [[tasks]] an organization sends the heads of its own tasks alone: expected a rule"
            ' that takes every parameter by itself, as in "fedavg"'
        )


def _lateness(info: ComponentInfo) -> Iterator[str]:
    """Check for late updates: they are added to a running weighted sum; no other rule is known to handle them correctly."""
    needs = info.needs
    adds_up = {
        "fusion": info.is_mean and needs.visibility == Visibility.SUM,
        "weighting": not info.sees_all and not needs.server_data and not needs.sends,
        "client_term": not (needs.client_state or needs.receives),
    }
    if not adds_up.get(info.kind, True):
        yield (
            'is not supported with server.late = fold, which adds late updates to a weighted mean: expected late = "ignore", or a'
            ' strategy such as "fedavg"'
        )

"""Use Flower's strategies as fusions: `strategy = "flwr.serverapp.strategy:Krum"`, or a class derived from one.

Flower's strategies work on whole weights and keep their state in attributes. Each round, a new instance gets the arrays and
numbers that its predecessor held, configures the round, and aggregates θ + Δ_k as if organizations had sent those; its result
minus θ is the delta. Organizations train as the plan says, so a strategy that needs them to do something else is refused.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeGuard, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from cotune.errors import CotuneError, PlanError, RunError, nearest
from cotune.strategies.flower_state import equal, list_state, name_digest, restore_state
from cotune.strategies.registry import ComponentInfo, Needs, Visibility
from cotune.strategies.types import Aggregate, RoundContext, WeightedUpdate

_OURS: dict[str, Any] = {"fraction_train": 1.0, "min_train_nodes": 1, "min_available_nodes": 1}  # the plan decides whom to ask
_UNUSED = {"fraction_train", "fraction_evaluate", "min_evaluate_nodes", "arrayrecord_key", "configrecord_key", "weighted_by_key"}
_PLAIN = {bool, int, float, str, type(None)}
_PATIENCE = 5  # how often a strategy may list the organizations per round; Flower's own do it twice, or every second forever
_NAMES = "parameters"  # key in the memory: digest of the names of the round's shared parameters
_CHANNEL = "server-round"  # the only thing a strategy may send beside the model; organizations ignore it
_INSTEAD = {
    "FedProx": 'the strategy "fedprox", whose term organizations do add to their gradients',
    "QFedAvg": 'the strategy "qfedavg", for which organizations send their loss if their policy allows it',
    "DifferentialPrivacyServerSideFixedClipping": "the plan's table client_privacy, which accounts for what it promises",
    "DifferentialPrivacyClientSideFixedClipping": "the plan's table client_privacy, which accounts for what it promises",
    "DifferentialPrivacyServerSideAdaptiveClipping": "the plan's table client_privacy, which accounts for what it promises",
    "DifferentialPrivacyClientSideAdaptiveClipping": "the plan's table client_privacy, which accounts for what it promises",
    "FedXgbBagging": "a strategy for networks, as cotune trains no trees",
    "FedXgbCyclic": "a strategy for networks, as cotune trains no trees",
}


def is_flower_class(value: Any) -> TypeGuard[type[Strategy]]:
    """Return whether the value is a class derived from Flower's `Strategy`."""
    return inspect.isclass(value) and issubclass(value, Strategy)


def load_flower_strategy(name: str) -> ComponentInfo:
    """Import `flwr.module:Class` and wrap it as a fusion.

    Raises:
        PlanError: If the class does not exist, is not a strategy, or is not supported.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PlanError(
            f'"{name}" cannot be imported ({error}): expected a class such as flwr.serverapp.strategy:Krum',
            code="plan.flower_import_failed",
        ) from None
    found = getattr(module, class_name, None)
    if not is_flower_class(found):
        known = [n for n, v in vars(module).items() if is_flower_class(v) and not inspect.isabstract(v) and n not in _INSTEAD]
        raise PlanError(f'{module_name} has no strategy "{class_name}"{nearest(class_name, known)}', code="plan.unknown_strategy")
    return build_flower_component(name, found)


def build_flower_component(name: str, build: type[Strategy]) -> ComponentInfo:
    """Wrap a strategy class as a fusion, whose parameters are the plain ones (numbers, texts) of its constructor.

    Raises:
        PlanError: If the strategy needs organizations to do what they do not do for Flower's strategies.
    """
    for refused, instead in _INSTEAD.items():
        if issubclass(build, getattr(flower, refused)):
            raise PlanError(
                f"{name} wants of organizations what they do not do for a strategy of Flower's: expected {instead}",
                code="plan.flower_unsupported",
            )
    return ComponentInfo(
        "fusion",
        name,
        FlowerFusion(name, build),
        "Beutel et al., Flower, 2020, https://arxiv.org/abs/2007.14390",
        Needs(visibility=Visibility.PER_CLIENT, sets_state=True),
        min_updates=lambda min_train_nodes=1, min_available_nodes=1, **_: max(1, min_train_nodes, min_available_nodes),
        homogeneous=False,
        idempotent=False,
    )


class FlowerFusion:
    """A fusion by one of Flower's strategies. It gets the weights as "num-examples", by which Flower weights by default."""

    def __init__(self, name: str, build: type[Strategy]) -> None:
        self.name = name
        self.strategy = build
        known = _constructor(build)
        plain = {n: p for n, p in known.items() if _is_plain(p) and n not in _UNUSED}
        given = [p.replace(kind=p.KEYWORD_ONLY, default=_OURS.get(n, p.default)) for n, p in plain.items()]
        round_ = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("updates", "context")]
        self.__signature__ = inspect.Signature([*round_, *given])
        self.__annotations__ = {n: p.annotation for n, p in plain.items()}
        self.__doc__ = inspect.getdoc(build)

    def __call__(self, updates: Sequence[WeightedUpdate], context: RoundContext, **parameters: Any) -> Aggregate:
        names = sorted(updates[0].delta)  # a fixed order, as some strategies keep lists
        if any(sorted(u.delta) != names for u in updates):
            self._refuse("works on updates of the same parameters alone", "a rule of cotune's, such as median")
        arrays = {name: context.state[name].to(torch.float64).numpy() for name in names}
        strategy = self.build(parameters)
        fresh = dict(list_state(strategy))
        digest = name_digest(names)
        if torch.equal(context.memory.get(_NAMES, digest), digest):  # a stage with other parameters starts without state
            restore_state(strategy, {name: tensor for name, tensor in context.memory.items() if name != _NAMES})
        with _as_server(), self._failing(context.round):
            messages = self._configured(strategy, arrays, len(updates), context.round)
            replies = [_reply(message, arrays, update) for message, update in zip(messages, updates, strict=True)]
            result, _ = strategy.aggregate_train(context.round, replies)
        if result is None or set(result) != set(names):
            self._refuse(f"gave {'nothing' if result is None else 'other parameters'} for the round", "the shared parameters")
        delta = {n: torch.from_numpy(np.asarray(result[n].numpy(), np.float64) - arrays[n]) for n in names}
        memory = self._memory(strategy, fresh)
        return Aggregate(delta, memory={**memory, _NAMES: digest} if memory else {})

    def build(self, parameters: Mapping[str, Any]) -> Strategy:
        """Create the strategy without any state of earlier rounds.

        Raises:
            PlanError: If its constructor does not accept the parameters.
        """
        try:
            with _as_server():
                strategy = self.strategy(**parameters)
        except Exception as error:
            raise PlanError(
                f"{self.name} cannot be made ({type(error).__name__}: {error}): change its parameters",
                code="plan.flower_not_built",
            ) from error
        for name, value in _OURS.items():
            if hasattr(strategy, name):
                setattr(strategy, name, value)
        return strategy

    def rehearse(self, parameters: Mapping[str, Any]) -> None:
        """Configure a round without running it, so that an unsupported strategy is refused before the run starts.

        Raises:
            PlanError: If the strategy cannot be built, or sends what organizations do not support.
        """
        try:
            with _as_server(), self._failing(1):
                self._configured(self.build(parameters), {"x": np.zeros(1)}, 1, 1)
        except RunError as error:
            raise PlanError(str(error), code="plan.flower_unsupported") from None

    @contextmanager
    def _failing(self, round: int) -> Iterator[None]:
        try:
            yield
        except CotuneError:
            raise
        except Exception as error:
            raise RunError(
                f"{self.name} failed in round {round} ({type(error).__name__}: {error})", code="run.flower_failed"
            ) from error

    def _configured(self, strategy: Strategy, arrays: Mapping[str, Any], count: int, round: int) -> list[Message]:
        """Check what the strategy would send to organizations, and return an empty message for each of them instead."""
        record = _record(arrays)
        for message in strategy.configure_train(round, record, ConfigRecord(), _Roll(count)):
            keys = {key for config in message.content.config_records.values() for key in config} - {_CHANNEL}
            if keys:
                self._refuse(f'sends organizations "{min(keys)}", and they train as the plan says', "a client_term in the plan")
            if any(sent is not record and not _same(sent, arrays) for sent in message.content.array_records.values()):
                self._refuse("sends organizations other arrays than the model", "one that sends the model alone")
        return [Message(RecordDict(), i + 1, "train") for i in range(count)]

    def _memory(self, strategy: Strategy, fresh: Mapping[str, Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
        """Return the attributes that changed since the strategy was built, as tensors."""
        memory: dict[str, Tensor] = {}
        for name, held in list_state(strategy):
            before = fresh.get(name, {})
            if held is None and before is not None:
                self._refuse(
                    f"keeps {name} between rounds, which no checkpoint can hold", "arrays and numbers, in lists and dicts"
                )
            if held is not None and not equal(held, before):
                memory.update(held)
        return memory

    def _refuse(self, what: str, expected: str) -> NoReturn:
        raise RunError(f"{self.name} {what}: expected {expected}", code="run.flower_unsupported")


def _constructor(build: type) -> dict[str, inspect.Parameter]:
    """Return the constructor's keyword parameters with their types, including those passed to base classes by **kwargs."""
    found: dict[str, inspect.Parameter] = {}
    for base in build.__mro__:
        if "__init__" not in vars(base):
            continue
        own = vars(base)["__init__"]
        hints = _hints(own)
        parameters = list(inspect.signature(own).parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in found:
                found[p.name] = p.replace(annotation=hints.get(p.name, type(p.default)))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    for name, p in found.items():
        if p.default is p.empty and not _is_plain(p):
            raise PlanError(
                f"{build.__name__} cannot be made from a plan, as its {name} is neither a number nor a text",
                code="plan.flower_unsupported",
            )
    return found


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # names that exist only for type checkers
        return {}


def _is_plain(parameter: inspect.Parameter) -> bool:
    hint = parameter.annotation
    members = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else [hint]
    return set(members) <= _PLAIN and hint is not type(None)


@contextmanager
def _as_server() -> Iterator[None]:
    """Set what Flower expects of a process that creates messages, and silence its log of sampled nodes."""
    log = logging.getLogger("flwr")
    task = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    before = log.disabled
    log.disabled = True
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = (number or 1 for number in task)
    try:
        yield
    finally:
        log.disabled = before
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = task


class _Roll(Grid):
    """A grid of the organizations that replied, numbered from 1; a strategy may list them, but not send to them or wait."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._asked = 0

    def get_node_ids(self) -> Iterable[int]:
        self._asked += 1
        if self._asked > _PATIENCE:
            raise RunError(
                "a strategy of Flower's waits for more organizations to come: expected one that takes those that have",
                code="run.flower_unsupported",
            )
        return range(1, self._count + 1)

    def _silent(self, *_: Any, **__: Any) -> NoReturn:
        raise RunError(
            "a strategy of Flower's talks to organizations by itself: expected one that leaves this to its caller",
            code="run.flower_unsupported",
        )

    set_run = create_message = push_messages = pull_messages = send_and_receive = _silent
    run = property(_silent)


def _record(arrays: Mapping[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _same(sent: ArrayRecord, arrays: Mapping[str, Any]) -> bool:
    return set(sent) == set(arrays) and all(np.array_equal(sent[name].numpy(), array) for name, array in arrays.items())


def _reply(message: Message, arrays: Mapping[str, Any], update: WeightedUpdate) -> Message:
    weights = _record({name: array + update.delta[name].numpy() for name, array in arrays.items()})
    content = RecordDict({"arrays": weights, "metrics": MetricRecord({"num-examples": update.scalar})})
    return Message(content, reply_to=message)


# --- what a strategy holds, as tensors: the name of each says in JSON where it stands and what it was

"""Every part conforms, and for each check there is a broken part that it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

from cotune.strategies import (
    Aggregate,
    ClientTerm,
    Delta,
    Needs,
    RoundContext,
    ServerOptimizer,
    Sums,
    Visibility,
    WeightedUpdate,
    client_term,
    fusion,
    server_optimizer,
    weighted,
    weighted_mean,
    weighting,
)
from cotune.strategies.conformance import check_component
from cotune.strategies.conformance.checks import Finding
from cotune.strategies.conformance.samples import complete
from cotune.strategies.flower import load_flower_strategy
from cotune.strategies.registry import FOLDERS, ComponentInfo, get_builtin_components
from cotune.strategies.types import LocalSteps, Update

EVERY = [info for kind in FOLDERS for info in get_builtin_components(kind).values()]
PER_CLIENT = Needs(visibility=Visibility.PER_CLIENT)


def failed(build: Any, **parameters: Any) -> dict[str, str]:
    """The checks that a part does not pass, with the reason."""
    return {f.name: f.detail for f in check_component(build.component, parameters) if not f.passed}


@pytest.mark.parametrize("info", EVERY, ids=lambda info: f"{info.kind}-{info.name}")
def test_every_part_conforms(info: ComponentInfo) -> None:
    found = check_component(info)
    assert len(found) >= 5
    assert [f for f in found if not f.passed] == []


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "Krum", "MultiKrum"])
def test_strategies_of_flower_conform(name: str) -> None:
    assert [f for f in check_component(load_flower_strategy(f"flwr.serverapp.strategy:{name}")) if not f.passed] == []


def test_a_finding_has_a_reason_if_and_only_if_it_did_not_pass() -> None:
    assert all(f == Finding(f.name, True, "") for f in check_component(get_builtin_components("fusion")["mean"]))
    assert all(reason for reason in failed(silent_repair).values())


# --- fusions


def _mean(updates: Sequence[WeightedUpdate]) -> dict[str, Tensor]:
    total = sum(u.scalar for u in updates)
    return {n: sum((u.scalar / total * u.delta[n] for u in updates), torch.zeros(())) for n in updates[0].delta}


def _broken(**statements: Any) -> Callable[[Callable[..., Any]], Any]:
    return fusion("broken", cite="", **{"needs": PER_CLIENT, **statements})


@_broken()
def half(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: d.to(torch.float32) for n, d in _mean(updates).items()}


@_broken()
def first_only(updates: Sequence[WeightedUpdate]) -> Delta:
    return dict(list(_mean(updates).items())[:1])


@_broken()
def invented(updates: Sequence[WeightedUpdate]) -> Delta:
    return {**_mean(updates), "mine": torch.zeros(1, dtype=torch.float64)}


@_broken(needs=Needs())
def a_function_of_sums(updates: Sequence[WeightedUpdate]) -> Delta:
    return _mean(updates)


@_broken(needs=Needs())
def peeping() -> Sums:
    seen: list[Delta] = []

    def contribution(update: WeightedUpdate) -> Mapping[str, Tensor]:
        seen.append(update.delta)
        return weighted(update)

    sums = yield contribution
    return {name: d + 0.01 * seen[0][name] if seen else d for name, d in weighted_mean(sums).items()}


@_broken(needs=Needs())
def one_key_each() -> Sums:
    sums = yield lambda u: {**weighted(u), f"of {u.update.organization}": u.delta["head.bias"]}
    return weighted_mean({n: s for n, s in sums.items() if not n.startswith("of ")})


@_broken(needs=Needs())
def two_passes() -> Sums:
    yield weighted
    sums = yield weighted
    return weighted_mean(sums)


@_broken()
def last_wins(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: d + 0.1 * updates[-1].delta[n] for n, d in _mean(updates).items()}


@_broken(homogeneous=False, idempotent=False)
def unseeded(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: d + torch.rand(d.shape, dtype=d.dtype) for n, d in _mean(updates).items()}


@_broken()
def in_place(updates: Sequence[WeightedUpdate]) -> Delta:
    for update in updates:
        for tensor in update.update.delta.values():
            tensor *= 1.0 + 1e-3
    return _mean(updates)


@_broken()
def clipped(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: d.clamp(-0.1, 0.1) for n, d in _mean(updates).items()}


@_broken()
def doubled(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: 2 * d for n, d in _mean(updates).items()}


@_broken()
def in_single(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: d * float(torch.tensor(1.1)) / 1.1 for n, d in _mean(updates).items()}


@_broken()
def unweighted(updates: Sequence[WeightedUpdate]) -> Delta:
    return {n: torch.stack([u.delta[n] for u in updates]).mean(0) for n in updates[0].delta}


@_broken(needs=Needs(visibility=Visibility.PER_CLIENT, weights=False))
def weighted_after_all(updates: Sequence[WeightedUpdate]) -> Delta:
    return _mean(updates)


@_broken(needs=Needs(visibility=Visibility.PER_CLIENT, by_parameter=True))
def one_weight_for_all(updates: Sequence[WeightedUpdate]) -> Delta:
    return _mean(updates)


@_broken()
def same_keys(updates: Sequence[WeightedUpdate]) -> Delta:
    return _mean(updates)


@_broken(idempotent=False)
def needs_two(updates: Sequence[WeightedUpdate]) -> Delta:
    spread = torch.stack([u.delta["head.bias"] for u in updates]).std(0)
    return {n: d + (spread if n == "head.bias" else 0) for n, d in _mean(updates).items()}


@_broken(needs=Needs(visibility=Visibility.PER_CLIENT, mixed_ranks=True))
def one_rank(updates: Sequence[WeightedUpdate]) -> Delta:
    total = sum(u.scalar for u in updates)
    names = updates[0].delta
    return {n: sum((u.scalar / total * u.update.delta[n].double() for u in updates), torch.zeros(())) for n in names}


@_broken(needs=Needs(visibility=Visibility.PER_CLIENT, sends=("fisher",)), idempotent=False)
def silent_repair(updates: Sequence[WeightedUpdate]) -> Delta:
    weights = [{n: u.update.statistics[f"fisher/{n}"].double().nan_to_num(1.0) for n in u.delta} for u in updates]
    pairs = list(zip(updates, weights, strict=True))
    return {
        n: sum(u.delta[n] * w[n] * u.scalar for u, w in pairs) / sum(w[n] * u.scalar for u, w in pairs) for n in updates[0].delta
    }


@_broken()
def by_length(updates: Sequence[WeightedUpdate]) -> Delta:
    """Mean directions, times the mean length."""
    lengths = [math.sqrt(sum(float(d.double().square().sum()) for d in u.delta.values())) for u in updates]
    total = sum(u.scalar for u in updates)
    mean = sum(u.scalar * length for u, length in zip(updates, lengths, strict=True)) / total
    pairs = list(zip(updates, lengths, strict=True))
    return {
        n: sum((u.scalar / total * mean * u.delta[n].double() / length for u, length in pairs), torch.zeros(()))
        for n in updates[0].delta
    }


_rounds: list[int] = []


@_broken(homogeneous=False, idempotent=False)
def outside_memory(updates: Sequence[WeightedUpdate], context: RoundContext) -> Delta:
    _rounds.append(context.round)
    return {n: d * len(_rounds) for n, d in _mean(updates).items()}


@_broken()
def remembers_a_number(updates: Sequence[WeightedUpdate]) -> Aggregate:
    return Aggregate(_mean(updates), memory={"rounds": 3})  # type: ignore[dict-item]


@_broken()
def typed_memory(updates: Sequence[WeightedUpdate], context: RoundContext) -> Aggregate:
    delta = _mean(updates)
    if hasattr(context.memory.get("head.bias"), "momentum"):
        return Aggregate({n: 2 * d for n, d in delta.items()})
    kept = delta["head.bias"].clone()
    kept.momentum = 0.9  # type: ignore[attr-defined]
    return Aggregate(delta, memory={"head.bias": kept})


@pytest.mark.parametrize(
    ("part", "check", "words"),
    [
        (half, "gives a finite delta", "float32, expected torch.float64"),
        (first_only, "gives a finite delta", "is missing"),
        (invented, "gives a finite delta", "gave a delta of mine, which the model has not"),
        (a_function_of_sums, "sees no more", "takes the updates: expected a generator"),
        (peeping, "sees no more", "looked at single updates"),
        (one_key_each, "sees no more", "kept apart"),
        (two_passes, "sees no more", "asks for 2 sums, and says that it needs one"),
        (last_wins, "does not depend on the order", "depends on the order"),
        (unseeded, "gives the same again", "bit for bit"),
        (in_place, "leaves its inputs alone", "changes an update"),
        (clipped, "scales", "expected homogeneous=False"),
        (doubled, "keeps what all agree on", "expected idempotent=False"),
        (in_single, "keeps what all agree on", "float32"),
        (unweighted, "gives weight 0 no say", "an update of weight 0 changes the result"),
        (weighted_after_all, "uses no weights", "weights change the result"),
        (one_weight_for_all, "follows weights by parameter", "got one for each parameter"),
        (same_keys, "bears organizations with other parameters", "KeyError"),
        (needs_two, "works with the least", "not finite"),
        (by_length, "bears updates of zeros", "not finite"),
        (one_rank, "bears smaller ranks", "RuntimeError"),
        (silent_repair, "refuses what is not a number", "a statistic"),
        (outside_memory, "remembers through a checkpoint", "bit for bit"),
        (remembers_a_number, "remembers through a checkpoint", "AttributeError"),
        (typed_memory, "remembers through a checkpoint", "does not survive"),
    ],
    ids=lambda value: value.component.build.__name__ if hasattr(value, "component") else "",
)
@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_a_broken_fusion_is_found(part: Any, check: str, words: str) -> None:
    [reason] = [reason for name, reason in failed(part).items() if name.startswith(check)]
    assert words in reason


def test_a_rule_that_says_all_that_is_true_of_it_passes() -> None:
    @_broken(
        needs=Needs(weights=False, visibility=Visibility.PER_CLIENT), min_updates=lambda: 3, homogeneous=False, idempotent=False
    )
    def middle(updates: Sequence[WeightedUpdate]) -> Delta:
        """The median plus a constant, of organizations that all send the same."""
        names = set.intersection(*(set(u.delta) for u in updates))
        everything = {n: torch.stack([u.delta[n] for u in updates if n in u.delta]) for n in updates[0].delta}
        assert names
        return {n: stacked.median(0).values + 1.0 for n, stacked in everything.items()}

    assert failed(middle) == {}


# --- weightings


@weighting("broken", cite="")
def negative(update: Update) -> float:
    return 250.0 - update.examples


@weighting("broken", cite="")
def nothing(update: Update) -> float:
    return 0.0


@weighting("broken", cite="")
def too_few(updates: Sequence[Update]) -> list[float]:
    return [1.0 for _ in updates[1:]]


@weighting("broken", cite="")
def undeclared(update: Update) -> dict[str, float]:
    return dict.fromkeys(update.delta, 1.0)


@weighting("broken", cite="", needs=Needs(by_parameter=True))
def other_names(update: Update) -> dict[str, float]:
    return {"x": 1.0}


@weighting("broken", cite="")
def by_position(updates: Sequence[Update]) -> list[float]:
    return [1.0 + i for i, _ in enumerate(updates)]


_seen: list[str] = []


@weighting("broken", cite="")
def counting(update: Update) -> float:
    _seen.append(update.organization)
    return float(len(_seen))


@weighting("broken", cite="")
def zeroing(update: Update) -> float:
    for tensor in update.delta.values():
        tensor.zero_()
    return 1.0


@weighting("broken", cite="")
def compared_with_the_rest(updates: Sequence[Update]) -> list[float]:
    most = max(u.examples for u in updates)
    return [float(most - u.examples) for u in updates]


@weighting("broken", cite="", needs=Needs(sends=("loss",)))
def repaired(update: Update) -> float:
    loss = update.disclosures["loss"]
    return loss if loss == loss else 1.0


@pytest.mark.parametrize(
    ("part", "check", "words"),
    [
        (negative, "gives finite weights", "0 or more"),
        (nothing, "gives finite weights", "every weight is 0"),
        (too_few, "gives finite weights", "4 weights for 5 updates"),
        (undeclared, "weighs by parameter", "by_parameter = False is not what it does"),
        (other_names, "weighs by parameter", "weights for ['x']"),
        (by_position, "does not depend on the order", "order of the updates"),
        (counting, "gives the same again", "other weights"),
        (zeroing, "leaves its inputs alone", "changes an update"),
        (compared_with_the_rest, "gives a single update a say", "the only update"),
        (repaired, "refuses what is not a number", "expected it to be refused"),
    ],
    ids=lambda value: value.component.build.__name__ if hasattr(value, "component") else "",
)
def test_a_broken_weighting_is_found(part: Any, check: str, words: str) -> None:
    [reason] = [reason for name, reason in failed(part).items() if name.startswith(check)]
    assert words in reason


# --- server optimizers

State = Mapping[str, Tensor]
Stepped = tuple[dict[str, Tensor], dict[str, Tensor]]


def _optimizer(step: Callable[..., Stepped], serve: Callable[..., Any] | None = None) -> Any:
    """A server optimizer that takes this step."""

    @server_optimizer("broken", cite="")
    @dataclass(frozen=True)
    class Broken(ServerOptimizer):
        def step(self, state: State, fused: Aggregate, memory: State, context: RoundContext) -> Stepped:
            return step(state, fused, memory)

        def serve(self, state: State, memory: State) -> dict[str, Tensor]:
            return dict(state) if serve is None else dict(serve(state))

    return Broken


def _moved(state: State, fused: Aggregate, lr: float = 1.0) -> dict[str, Tensor]:
    return {n: (p.double() + lr * fused.delta.get(n, torch.zeros(()))).to(p.dtype) for n, p in state.items()}


def _in_place(state: State, fused: Aggregate, memory: State) -> Stepped:
    for name, d in fused.delta.items():
        state[name].add_(d.to(state[name].dtype))
    return dict(state), {}


_steps: list[int] = []


def _counted(state: State, fused: Aggregate, memory: State) -> Stepped:
    _steps.append(1)
    return _moved(state, fused, 1.0 / len(_steps)), {}


@pytest.mark.parametrize(
    ("part", "check", "words"),
    [
        (_optimizer(lambda s, f, m: ({n: p.double() for n, p in _moved(s, f).items()}, {})), "keeps names", "float64, expected"),
        (_optimizer(lambda s, f, m: ({n: _moved(s, f)[n] for n in list(s)[1:]}, {})), "keeps names", "is missing"),
        (_optimizer(lambda s, f, m: (_moved(s, f), {}), lambda s: {**s, "mean": torch.zeros(1)}), "keeps names", "nobody sent"),
        (_optimizer(lambda s, f, m: ({n: p + 0.1 for n, p in _moved(s, f).items()}, {})), "stands still", "a delta of 0 moves"),
        (_optimizer(lambda s, f, m: (_moved(s, f, -1.0), {})), "goes along", "expected it above 0"),
        (_optimizer(lambda s, f, m: ({n: 0.9 * p for n, p in _moved(s, f).items()}, {})), "moves only", "without a delta moves"),
        (_optimizer(_in_place), "leaves its inputs alone", "changes the model in place"),
        (_optimizer(_counted), "remembers", "the model is another one after a checkpoint"),
        (_optimizer(lambda s, f, m: (_moved(s, f), {"step": len(m)})), "remembers", "AttributeError"),
    ],
)
def test_a_broken_server_optimizer_is_found(part: Any, check: str, words: str) -> None:
    [reason] = [reason for name, reason in failed(part).items() if name.startswith(check)]
    assert words in reason


# --- client terms


def _term(needs: Needs = Needs(), **methods: Callable[..., Any]) -> Any:
    """A client term with these methods."""
    part = dataclass(frozen=True)(type("Broken", (ClientTerm,), {n: staticmethod(m) for n, m in methods.items()}))
    return client_term("broken", cite="", needs=needs)(part)


def _grow(fused: Aggregate, memory: State, context: RoundContext) -> tuple[Delta, State]:
    for tensor in fused.delta.values():
        tensor.mul_(2.0)
    return fused.delta, {}


_folds: list[int] = []


def _drift(fused: Aggregate, memory: State, context: RoundContext) -> tuple[Delta, State]:
    _folds.append(1)
    return {n: d * len(_folds) for n, d in fused.delta.items()}, {}


def _fixed(fused: Aggregate, memory: State, context: RoundContext) -> tuple[Delta, State]:
    held = memory or {n: torch.zeros_like(d) for n, d in fused.delta.items()}
    return {n: d + held[n] for n, d in fused.delta.items()}, dict(held)


def _keep(kept: State, delta: Delta, sent: State, local: LocalSteps) -> dict[str, Tensor]:
    return {n: d.clone() for n, d in delta.items()}


@pytest.mark.parametrize(
    ("part", "check", "words"),
    [
        (_term(correction=lambda n, p, r, k, s: 0.1 * p), "is harmless", "corrects the gradient"),
        (_term(fold=lambda f, m, c: ({n: d + 1 for n, d in f.delta.items()}, {})), "is harmless", "a delta of 0 is not 0"),
        (_term(correction=lambda n, p, r, k, s: (p - r).double()), "corrects in the shape", "float64"),
        (_term(correction=lambda n, p, r, k, s: (p - r).sum()), "corrects in the shape", "float32 ()"),
        (_term(correction=lambda n, p, r, k, s: torch.zeros(3, 2, dtype=p.dtype)), "corrects in the shape", "on cpu, expected"),
        (_term(correction=lambda n, p, r, k, s: p.sub_(r)), "leaves its inputs alone", "changes what it is computed from"),
        (_term(fold=_grow), "leaves its inputs alone", "changes what it was given"),
        (_term(keep=_keep), "keeps, sends and folds", "needs.client_state = False"),
        (_term(Needs(receives=True)), "keeps, sends and folds", "needs.receives = True"),
        (_term(fold=lambda f, m, c: ({n: d.sum() for n, d in f.delta.items()}, {})), "keeps, sends and folds", "as in the model"),
        (_term(fold=_fixed), "bears parameters that come later", "KeyError"),
        (_term(fold=_drift), "remembers", "the server's half is another one"),
        (_term(fold=lambda f, m, c: (f.delta, {"rounds": 1})), "remembers", "AttributeError"),
    ],
)
def test_a_broken_client_term_is_found(part: Any, check: str, words: str) -> None:
    [reason] = [reason for name, reason in failed(part).items() if name.startswith(check)]
    assert words in reason


def test_a_term_with_both_halves_passes() -> None:
    def fold(fused: Aggregate, memory: State, context: RoundContext) -> tuple[Delta, State]:
        held = {n: memory.get(n, torch.zeros_like(d)) + d for n, d in fused.delta.items()}
        return dict(fused.delta), {**memory, **held}

    def correction(name: str, parameter: Tensor, received: Tensor, kept: Tensor | None, sent: Tensor | None) -> Tensor:
        zero = torch.zeros_like(parameter)
        return (zero if sent is None else sent) - (zero if kept is None else kept)

    term = _term(
        Needs(client_state=True, receives=True), keep=_keep, fold=fold, correction=correction, send=lambda memory: dict(memory)
    )
    assert failed(term) == {}


# --- parameters


def test_required_parameters_get_values_that_they_allow() -> None:
    @fusion("needy", cite="", needs=PER_CLIENT)
    def needy(
        updates: Sequence[WeightedUpdate],
        *,
        norm: Annotated[float, Field(gt=0)],
        fraction: Annotated[float, Field(ge=0.2, le=0.4)],
        malicious: Annotated[int, Field(ge=1)],
        per: Literal["model", "parameter"],
        given: float = 0.5,
    ) -> Delta:
        """A rule that a plan must say everything of."""
        assert (malicious, per, given) == (1, "model", 0.5)
        return _mean(updates)

    assert complete(needy.component) == {"norm": 1.0, "fraction": pytest.approx(0.3), "malicious": 1, "per": "model"}
    assert "scales with the deltas" not in failed(needy)
    assert "AssertionError" in failed(needy, per="parameter")["scales with the deltas"]
    with pytest.raises(ValueError, match='has no parameter "nrom"'):
        check_component(needy.component, {"nrom": 1.0})


@dataclass
class Spy:
    """What a weighting got of an update."""

    losses: list[float] = field(default_factory=list)


def test_a_part_gets_what_it_asks_organizations_to_send() -> None:
    spy = Spy()

    @weighting("spy", cite="", needs=Needs(sends=("loss",)))
    def weigh(update: Update) -> float:
        spy.losses.append(update.disclosures["loss"])
        return update.disclosures["loss"]

    assert failed(weigh) == {}
    assert len(set(spy.losses)) > 5

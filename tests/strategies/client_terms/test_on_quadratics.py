"""Client terms on two organizations with unlike losses, F_k(x) = a_k/2 (x − b_k)²: where the rounds end, by hand.

Organization 1 has a = 1, b = 0 and a third of the weight, organization 2 a = 4, b = 3 and two thirds: the optimum of the weighted
loss is Σ p a b / Σ p a = 8/3.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cotune.strategies.aggregator import build_aggregator
from cotune.strategies.client_terms.base import ClientTerm
from cotune.strategies.client_terms.feddyn import FedDyn
from cotune.strategies.client_terms.proximal import Proximal
from cotune.strategies.client_terms.scaffold import Scaffold
from cotune.strategies.config import StrategyConfig
from cotune.strategies.types import LocalSteps, RoundContext, Update, apply_delta

A = (1.0, 4.0)
B = (0.0, 3.0)
EXAMPLES = (100, 200)
OPTIMUM = 8 / 3
RATE = 0.05
STEPS = 10
LOCAL = LocalSteps(RATE, 0.0, STEPS)


@dataclass
class Federation:
    """The rounds of a term over gradient descent: what organizations keep, what the server remembers, θ."""

    term: ClientTerm
    examples: tuple[int, ...] = EXAMPLES
    state: dict[str, Tensor] = field(default_factory=lambda: {"x": torch.zeros(1, dtype=torch.float64)})
    memory: dict[str, Tensor] = field(default_factory=dict)
    kept: list[dict[str, Tensor]] = field(default_factory=lambda: [{}, {}])

    def round(self, *people: int) -> float:
        context = RoundContext(organizations=2, state=self.state, local=LOCAL)
        combination = build_aggregator(StrategyConfig(), context)
        sent = self.term.send(self.memory)
        for k in people or (0, 1):
            delta = {"x": self.train(k, sent) - self.state["x"]}
            self.kept[k] = {**self.kept[k], **self.term.keep(self.kept[k], delta, sent, LOCAL)}
            combination.add(Update(f"org-{k}", 1, delta, self.examples[k], STEPS))
        delta, self.memory = self.term.fold(combination.result(), self.memory, context)  # type: ignore[arg-type]
        self.state = apply_delta(self.state, delta)
        return float(self.state["x"])

    def train(self, k: int, sent: dict[str, Tensor]) -> Tensor:
        x = received = self.state["x"]
        for _ in range(STEPS):
            more = self.term.correction("x", x, received, self.kept[k].get("x"), sent.get("x"))
            x = x - RATE * (A[k] * (x - B[k]) + (0.0 if more is None else more))
        return x

    def mean_kept(self) -> float:
        return sum(n * float(kept["x"]) for n, kept in zip(self.examples, self.kept, strict=True)) / sum(self.examples)


def end_of(term: ClientTerm, rounds: int) -> float:
    federation = Federation(term)
    return [federation.round() for _ in range(rounds)][-1]


def pulled(mu: float) -> float:
    """Where μ ends: k moves by −(1 − (1 − η(a + μ))^K) a/(a + μ) (x − b), and the weighted moves cancel out."""
    pull = [n * a / (a + mu) * (1 - (1 - RATE * (a + mu)) ** STEPS) for a, n in zip(A, EXAMPLES, strict=True)]
    return sum(p * b for p, b in zip(pull, B, strict=True)) / sum(pull)


def test_without_a_term_the_rounds_end_elsewhere() -> None:
    assert end_of(ClientTerm(), 100) == pytest.approx(pulled(0.0), abs=1e-9)
    assert abs(pulled(0.0) - OPTIMUM) > 0.1


@pytest.mark.parametrize("mu", [0.5, 4.0])
def test_proximal_ends_where_its_formula_says(mu: float) -> None:
    found = end_of(Proximal(mu=mu), 200)
    assert found == pytest.approx(pulled(mu), abs=1e-9)
    assert abs(found - OPTIMUM) < abs(pulled(0.0) - OPTIMUM)


@pytest.mark.parametrize("term", [Scaffold(), FedDyn(alpha=1.0), FedDyn(alpha=3.0)])
def test_scaffold_and_feddyn_end_at_the_optimum_of_all(term: ClientTerm) -> None:
    assert end_of(term, 300) == pytest.approx(OPTIMUM, abs=1e-5)  # SCAFFOLD's c travels in float32


@pytest.mark.parametrize("term", [Scaffold(), FedDyn(alpha=1.0)])
def test_what_is_kept_is_the_gradient_at_the_optimum(term: ClientTerm) -> None:
    """a_k (x* − b_k): 8/3 and −4/3, whose weighted mean is 0."""
    federation = Federation(term)
    for _ in range(300):
        federation.round()
    assert [float(kept["x"]) for kept in federation.kept] == pytest.approx([8 / 3, -4 / 3], abs=1e-5)


@pytest.mark.parametrize("examples", [(100, 200), (1, 1), (999, 1)])
@pytest.mark.parametrize("term", [Scaffold(), FedDyn(alpha=1.0)])
def test_the_server_holds_the_mean_of_what_is_kept(term: ClientTerm, examples: tuple[int, int]) -> None:
    federation = Federation(term, examples)
    for _ in range(8):
        federation.round()
        assert float(federation.memory["x"]) == pytest.approx(federation.mean_kept(), abs=1e-6)


@pytest.mark.parametrize("term", [Scaffold(), FedDyn(alpha=1.0)])
def test_so_it_does_with_equal_weights_when_one_takes_part(term: ClientTerm) -> None:
    federation = Federation(term, (1, 1))
    for people in [(0,), (1,), (0, 1), (1,), (1,), (0,)]:
        federation.round(*people)
        mean = sum(float(kept.get("x", torch.zeros(1))) for kept in federation.kept) / 2
        assert float(federation.memory["x"]) == pytest.approx(mean, abs=1e-6)


def test_first_rounds_by_hand() -> None:
    """D = ½, Kη = ½: SCAFFOLD's c = −1 is the mean gradient; FedDyn with α = 2: h = −1, so θ moves by ½ + ½."""
    delta = {"x": torch.tensor([0.5])}
    context = RoundContext(organizations=2, local=LOCAL)
    fused = build_aggregator(StrategyConfig(), context)
    for name in ("a", "b"):
        fused.add(Update(name, 1, delta, 1, STEPS))
    both = fused.result()
    moved, c = Scaffold().fold(both, {}, context)  # type: ignore[arg-type]
    assert (moved["x"].tolist(), c["x"].tolist()) == ([0.5], [-1.0])
    moved, h = FedDyn(alpha=2.0).fold(both, {}, context)  # type: ignore[arg-type]
    assert (moved["x"].tolist(), h["x"].tolist()) == ([1.0], [-1.0])


@pytest.mark.parametrize("term", [Scaffold(), FedDyn()])
def test_a_parameter_that_a_later_stage_adds_starts_at_nothing(term: ClientTerm) -> None:
    delta = {"new": torch.ones(2)}
    kept = {"old": torch.ones(3, dtype=torch.float64)}
    assert set(term.keep(kept, delta, {"old": torch.ones(3)}, LOCAL)) == {"new"}
    first = term.keep(kept, delta, {}, LOCAL)["new"]
    alone = term.keep({}, delta, {}, LOCAL)["new"]
    assert torch.equal(first, alone)

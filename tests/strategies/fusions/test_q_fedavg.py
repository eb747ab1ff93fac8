from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy.qfedavg import compute_delta_and_h

from cotune.strategies.types import LocalSteps, RoundContext
from tests.support.failures import fails_with


def told(*losses: float) -> list[dict[str, Any]]:
    return [{"disclosures": {"loss": loss}} for loss in losses]


def test_by_hand(fuse: Any) -> None:
    """q = 1, L = ½, F = 2, 4: (2·3 + 4·1) / (2 + ½·9 + 4 + ½·1)."""
    found = fuse("q_fedavg", [[3.0], [1.0]], q=1.0, lipschitz=0.5, changes=told(2.0, 4.0))
    assert found.tolist() == pytest.approx([10 / 11])


def test_with_q_nought_it_is_the_plain_mean(fuse: Any, rng: np.random.Generator) -> None:
    deltas = list(rng.normal(size=(3, 5)))
    found = fuse("q_fedavg", deltas, q=0.0, changes=told(0.1, 2.0, 5.0))
    assert found == pytest.approx(np.mean(deltas, axis=0), rel=1e-12)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("losses", [(0.5, 1.5, 3.0), (0.0, 1.0, 2.0)])
def test_against_flower(fuse: Any, rng: np.random.Generator, q: float, losses: tuple[float, ...]) -> None:
    """Flower's is the paper's, with whole weights instead of deltas."""
    state = rng.normal(size=6)
    deltas = rng.normal(size=(3, 6))
    rate = 0.05
    parts = [compute_delta_and_h([state], [state + delta], q, 1 / rate, loss) for delta, loss in zip(deltas, losses, strict=True)]
    expected = -sum(moves[0] for moves, _ in parts) / sum(h for _, h in parts)
    context = RoundContext(local=LocalSteps(learning_rate=rate))
    found = fuse("q_fedavg", list(deltas), q=q, context=context, changes=told(*losses))
    assert found == pytest.approx(expected, rel=1e-9)


def test_who_is_worse_off_has_more_say(fuse: Any) -> None:
    deltas = [[1.0], [-1.0]]
    losses = told(3.0, 1.0)
    found = [fuse("q_fedavg", deltas, q=q, lipschitz=0.01, changes=losses).item() for q in (0.0, 1.0, 5.0)]
    assert found[0] == 0 < found[1] < found[2]


@pytest.mark.parametrize("changes", [[{}, {}], told(1.0, math.inf), told(1.0, -0.1)])
def test_an_update_without_a_loss_is_refused(fuse: Any, changes: list[dict[str, Any]]) -> None:
    with fails_with("run.invalid_loss", "0"):
        fuse("q_fedavg", [[1.0], [1.0]], changes=changes)


def test_a_loss_beyond_all_measure_ends_in_words(fuse: Any) -> None:
    with fails_with("run.invalid_aggregate", "q_fedavg", "x"):
        fuse("q_fedavg", [[1.0], [1.0]], q=2.0, lipschitz=1.0, changes=told(1e200, 1.0))

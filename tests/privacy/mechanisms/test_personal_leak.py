"""What leaks where a personal part is trained without noise and the gradients of the shared part follow from it.

The combination is refused (`Plan._shared_part_reads_nothing_without_noise`). Models of two numbers, p personal and w shared: a
personal head or norm, w·tanh(p), and a personal adapter beside the shared one, w + p. In the loss of each record p decides the sign
of the gradient of w. One record, in a step without noise, turns p around. The steps on p come first, as in FedRep's order. Of pFedMe
w follows a copy p: without noise it goes where the copy has gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup

RECORDS = 40
SIGMA = 4.0  # of a mechanism of one or two steps on all records, C = 1
DELTA = 1e-5
RUNS = 60


class Two(nn.Module):
    """w · tanh(p), each a layer that has gradients of single records."""

    def __init__(self) -> None:
        super().__init__()
        self.personal = nn.Linear(1, 1, bias=False)
        self.shared = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.personal.weight)
        nn.init.zeros_(self.shared.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.personal(torch.ones_like(x))))


class SideBySide(Two):
    """w + p, as two adapters of one layer."""

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones_like(x)
        return self.shared(one) + self.personal(one)


def personal_loss(model: Two, votes: Tensor) -> Tensor:
    """Records vote on the sign of p."""
    return -model.personal(votes).sum(dim=1)


def shared_loss(model: Two, votes: Tensor) -> Tensor:
    """Each record pulls w along tanh(p), or along w + p."""
    told = model(votes)
    return -10 * (told.square() if isinstance(model, SideBySide) else told).sum(dim=1)


def train(votes: Tensor, method: str, *, personal_has_noise: bool, seed: int) -> float:
    """One step on p, then one of DP-SGD on w, or, of pFedMe, the way to p: return how w has moved."""
    torch.manual_seed(seed)
    model = SideBySide() if method == "adapter" else Two()
    model.shared.requires_grad_(False)
    if personal_has_noise:
        step(model, votes, model.personal, personal_loss, seed)
    else:
        total = votes.sum()  # −∇ of the personal loss at p = 0
        with torch.no_grad():
            model.personal.weight.fill_(float(3 * total))
    if method == "pfedme":
        followed = model.shared.weight + 0.5 * (model.personal.weight - model.shared.weight)
        return float(followed.detach())
    model.personal.requires_grad_(False)
    model.shared.requires_grad_(True)
    step(model, votes, model.shared, shared_loss, seed + 10_000)
    return float(model.shared.weight.detach())


def step(model: Two, votes: Tensor, trained: nn.Linear, loss: Callable[[Two, Tensor], Tensor], seed: int) -> None:
    def batches(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        yield range(len(rows)), {"x": votes[list(rows)]}

    config = DPSGDConfig(noise_multiplier=SIGMA, clip_norm=1.0, sample_rate=1.0, expected_batch=1.0, steps=1)
    setup = DPSGDSetup(
        module=model,
        optimizer=torch.optim.SGD(trained.parameters(), lr=1.0),
        loss=lambda batch: loss(model, batch["x"]),
        units=[[row] for row in range(len(votes))],
        batches=batches,
        noise_generator=np.random.default_rng(seed),
    )
    for _ in DPSGD(config).run(setup):
        pass


def rates(method: str, *, personal_has_noise: bool) -> tuple[float, float]:
    """How often w moves up, with the votes in balance but for one record, and without that record."""
    balanced = torch.cat([torch.full((RECORDS // 2, 1), 1.0), torch.full((RECORDS // 2, 1), -1.0)])
    one_up = torch.cat([balanced, torch.full((1, 1), 1.0)])
    one_down = torch.cat([balanced, torch.full((1, 1), -1.0)])
    runs = range(RUNS)
    up = [
        sum(train(votes, method, personal_has_noise=personal_has_noise, seed=seed) > 0 for seed in runs)
        for votes in (one_up, one_down)
    ]
    return up[0] / RUNS, up[1] / RUNS


def bound(steps: int) -> float:
    """e^ε of what is claimed, for two data sets that differ in one record's value: one removed, one added."""
    return math.exp(2 * epsilon([Steps(SIGMA, 1.0, steps)], DELTA))


@pytest.mark.parametrize("method", ["head or norm", "adapter", "pfedme"])
@pytest.mark.parametrize("personal_has_noise", [False, True], ids=["refused: without noise", "with noise"])
def test_record_shows_in_shared_part_unless_personal_has_noise(method: str, personal_has_noise: bool) -> None:
    high, low = rates(method, personal_has_noise=personal_has_noise)
    claimed = bound((2 if personal_has_noise else 1) if method != "pfedme" else 1)
    leaks = high > claimed * low + 0.1
    assert leaks != personal_has_noise

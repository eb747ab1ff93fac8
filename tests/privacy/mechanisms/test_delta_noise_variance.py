from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.privacy.mechanisms.delta_noise_variance import LocalOptimizer, delta_noise_variance
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.privacy.mechanisms.per_example import Batch
from tests.support.batches import in_batches

torch.set_num_threads(1)

KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
STEP = {"noise_multiplier": 2.0, "clip_norm": 0.5, "expected_batch": 8.0}  # s = 1/8


def variance(optimizer: LocalOptimizer, steps: int, **changes: float) -> float:
    return delta_noise_variance(optimizer, steps=steps, **{**STEP, **changes})  # type: ignore[arg-type]


def test_plain_sgd_is_t_times_the_square_of_a_step() -> None:
    """T (ησC/B)²."""
    assert variance(LocalOptimizer("sgd", 0.4), 1) == pytest.approx((0.4 / 8) ** 2)
    assert variance(LocalOptimizer("sgd", 0.4), 25) == pytest.approx(25 * (0.4 / 8) ** 2)


def test_momentum_by_hand() -> None:
    """μ = ½, T = 3: an impulse moves by 1, 1½, 1¾ after 1, 2, 3 steps."""
    assert variance(LocalOptimizer("sgd", 1.0, momentum=0.5), 3) == pytest.approx((1 + 1.5**2 + 1.75**2) / 64)


def test_weight_decay_by_hand() -> None:
    """θ ← θ − η(g + λθ): an impulse shrinks by 1 − ηλ = ½ in every later step."""
    assert variance(LocalOptimizer("sgd", 1.0, weight_decay=0.5), 3) == pytest.approx((1 + 0.25 + 0.0625) / 64)


def test_momentum_and_weight_decay_as_torch_has_them() -> None:
    """The response of torch's own optimizer to an impulse in each step."""
    total = 0.0
    for impulse in range(12):
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, weight_decay=0.03)
        for step in range(12):
            parameter.grad = torch.tensor([1.0 if step == impulse else 0.0], dtype=torch.float64)
            optimizer.step()
        total += float(parameter.detach()) ** 2
    found = variance(LocalOptimizer("sgd", 0.7, momentum=0.9, weight_decay=0.03), 12)
    assert found == pytest.approx(total / 64)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_does_not_see_the_size_of_the_noise(kind: Any) -> None:
    first = variance(LocalOptimizer(kind, 0.01), 20)
    assert variance(LocalOptimizer(kind, 0.01), 20, noise_multiplier=200.0) == pytest.approx(first, rel=1e-3)
    assert variance(LocalOptimizer(kind, 0.03), 20) == pytest.approx(9 * first, rel=1e-4)
    assert variance(LocalOptimizer(kind, 0.01), 1) == pytest.approx(1e-4, rel=1e-4)  # the first step is ±η


def test_the_simulated_optimizer_gives_the_same_every_time() -> None:
    from cotune.privacy.mechanisms.delta_noise_variance import _simulated

    first = variance(LocalOptimizer("adam", 0.02), 7)
    _simulated.cache_clear()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert variance(LocalOptimizer("adam", 0.02), 7) == first
    assert torch.equal(torch.get_rng_state(), state)  # and no draw is taken from anybody else's generator


# --- against the project's own DP-SGD

OPTIMIZERS = {
    "sgd": LocalOptimizer("sgd", 0.5),
    "momentum": LocalOptimizer("sgd", 2.0, momentum=0.9),
    "decay": LocalOptimizer("sgd", 0.5, momentum=0.9, weight_decay=0.1),
    "adam": LocalOptimizer("adam", 0.02),
    "adamw": LocalOptimizer("adamw", 0.02, weight_decay=0.5),
}


def trained(optimizer: LocalOptimizer, module: nn.Module, loss: Any, records: Any, collate: Any, seed: int) -> Tensor:
    """The delta of 15 steps at σ = 1.5, C = 1, q = 0.25, as one vector."""
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    settings: dict[str, Any] = {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
    settings |= {"momentum": optimizer.momentum} if optimizer.kind == "sgd" else {}
    config = DPSGDConfig(noise_multiplier=1.5, clip_norm=1.0, sample_rate=0.25, expected_batch=0.25 * len(records), steps=15)
    setup = DPSGDSetup(
        module,
        KINDS[optimizer.kind](module.parameters(), **settings),
        loss,
        units=[[i] for i in range(len(records))],
        batches=in_batches(records, 1000, collate, fill=False),
        noise_generator=np.random.default_rng(seed),
        sampling_generator=np.random.default_rng(seed + 1000),
    )
    assert len(list(DPSGD(config).run(setup))) == 15
    after = nn.utils.parameters_to_vector(module.parameters()).detach()
    return after - before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_predicted_variance_is_the_one_of_dp_sgd(name: str) -> None:
    """20,000 coordinates whose gradients are tiny: what moves them is noise. n = 40 records, B = 10."""
    module = nn.Linear(200, 100, bias=False)
    nn.init.zeros_(module.weight)
    records = [{"x": torch.randn(200, generator=torch.Generator().manual_seed(i)) * 1e-6} for i in range(40)]

    def collate(rows: list[Batch]) -> Batch:
        return {"x": torch.stack([row["x"] for row in rows])}

    delta = trained(OPTIMIZERS[name], module, lambda batch: module(batch["x"]).sum(dim=1), records, collate, 3)
    predicted = delta_noise_variance(OPTIMIZERS[name], noise_multiplier=1.5, clip_norm=1.0, expected_batch=10.0, steps=15)
    assert float(delta.double().pow(2).mean()) == pytest.approx(predicted, rel=0.04)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_curvature_and_signal_only_lower_it(name: str) -> None:
    """A head that learns: the variance between 30 repetitions stays below the prediction, and is not far from it.

    What is measured also holds the sampling of batches, which the prediction leaves out.
    """
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=rng)
    features = functional.normalize(torch.randn(200, 64, generator=rng) + 2 * torch.eye(3, 64)[labels], dim=1)

    def collate(rows: list[int]) -> Batch:
        return {"x": features[rows], "y": labels[rows]}

    deltas = []
    for seed in range(30):
        module = nn.Linear(64, 3)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)

        def loss(batch: Batch, module: nn.Module = module) -> Tensor:
            return functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")

        deltas.append(trained(OPTIMIZERS[name], module, loss, range(200), collate, seed))
    measured = float(torch.stack(deltas).double().var(dim=0).mean())
    predicted = delta_noise_variance(OPTIMIZERS[name], noise_multiplier=1.5, clip_norm=1.0, expected_batch=50.0, steps=15)
    print(f"{name}: measured / predicted = {measured / predicted:.3f}")
    assert 0.4 * predicted < measured < 1.15 * predicted

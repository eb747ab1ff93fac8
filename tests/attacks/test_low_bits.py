"""The low bits of what is released tell whether a record was sampled (Mironov, CCS 2012).

Noise was drawn, multiplied and added in float32. A plan with one step and a learning rate of a huge power of two releases
g = fl((S + fl(z·σC)) / B) to the bit, and an adversary asks of each coordinate: is there a float32 z with g = fl(fl(z·σC) / B)?
With a record in the sample, 92–94 % of the coordinates fit, without one 100 %, in 5 of 5 runs each: detection with certainty at a
claimed ε = 1.

The same question on commit a605cba, of the model of this file (full fine-tuning, 4,771 coordinates; σ = 1.3, C = .7, B = 3):
97.8–98.3 % fit with the record, 100 % without, in 5 of 5 runs each; of LoRA (563 coordinates) 97.5–98.6 % and 100 %. Now 98.015 %
and 98.010 % fit (20 runs each). Of what that commit released, 13–19 % was on today's grid; now all of it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.plan.load import parse_plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.privacy.mechanisms.grid_noise import grid_step
from tests.support.datasets import write_csv

RATE = 2.0**60  # nothing of the parameters before the step is left beside it
SIGMA = 1.3
CLIP = 0.7
BATCH = 3.0  # B
SEEDS = range(5)


@pytest.fixture
def victim(base_model: Callable[[str], Path], tmp_path: Path) -> tuple[TrainingSetup, list[nn.Parameter]]:
    """One record, at an organization that trains the whole model from an honest state."""
    plan = parse_plan(
        {
            "labels": ["bad", "good", "so"],
            "rounds": 1,
            "train": "full",
            "model": {"base": str(base_model("bert")), "max_length": 16, "precision": "float32"},
            "data": {"source": str(write_csv(tmp_path / "records.csv", [("a very happy day", "good")]))},
            "local": {"physical_batch_size": 3},
            "privacy": {"epsilon": 1.0, "delta": 1e-3},
        }
    )
    model = get_plan_model(plan, "cpu")
    stage = plan.get_stage(1)
    model.load({})
    names = model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings)
    parameters = model.train_only(names)
    records = read_records(plan.data, task=plan.task)
    dataset = Dataset(((records, np.arange(1)),), plan.labels, plan.task)
    setting = build_setup(plan, stage, model, dataset, model.state(names), "clinic", expected_batch=BATCH)
    return setting, parameters


def released(setting: TrainingSetup, parameters: list[nn.Parameter], seed: int, *, sampled: bool) -> Tensor:
    """(θ0 − θ1) / rate of a round of one step, all coordinates, as the server computes it; θ0 stays."""
    before = [p.detach().clone() for p in parameters]
    config = DPSGDConfig(noise_multiplier=SIGMA, clip_norm=CLIP, sample_rate=1.0, expected_batch=BATCH, steps=1)
    setup = DPSGDSetup(
        setting.module,
        torch.optim.SGD(parameters, lr=RATE),
        setting.loss,
        setting.units if sampled else [],
        setting.batches,
        noise_generator=np.random.default_rng(seed),
    )
    assert len(list(DPSGD(config).run(setup))) == 1
    moved = [(b - p.detach()).flatten() / RATE for b, p in zip(before, parameters, strict=True)]
    with torch.no_grad():
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
    return torch.cat(moved)


def of_noise_alone(found: Tensor) -> Tensor:
    """Which coordinates are fl(fl(z·σC) / B) for a float32 z: the audit's question."""
    scale = np.float32(SIGMA * CLIP)
    batch = np.float32(BATCH)
    g = found.numpy()
    middle = (g.astype(np.float64) * BATCH / (SIGMA * CLIP)).astype(np.float32)
    fits = np.zeros(len(g), dtype=bool)
    for direction in (-np.inf, np.inf):
        z = middle.copy()
        for _ in range(5):
            fits |= (z * scale) / batch == g
            z = np.nextafter(z, np.float32(direction))
    return torch.from_numpy(fits)


def grid_steps(found: Tensor) -> Tensor:
    """The whole numbers of grid steps nearest to what was released, float64."""
    return (found.double() * BATCH / grid_step(CLIP, SIGMA)).round_()


def of_the_grid(found: Tensor) -> Tensor:
    """Which coordinates are fl(k·step / B) for a whole number k."""
    return (grid_steps(found) * grid_step(CLIP, SIGMA) / BATCH).float() == found


def test_released_values_are_multiples_of_the_grid_step(
    victim: tuple[TrainingSetup, list[nn.Parameter]],
) -> None:
    """The values that can be reached are the same ones with and without the record: none of them excludes a world."""
    for seed in SEEDS:
        for sampled in (True, False):
            assert bool(of_the_grid(released(*victim, seed, sampled=sampled)).all())


def test_the_record_moves_what_is_released_by_whole_steps(victim: tuple[TrainingSetup, list[nn.Parameter]]) -> None:
    """Under the same noise: at most C in all, and something, or the test would be empty."""
    inside, outside = (grid_steps(released(*victim, 0, sampled=sampled)) for sampled in (True, False))
    moved = float((inside - outside).norm()) * grid_step(CLIP, SIGMA)
    assert 0.9 * CLIP < moved <= CLIP


def test_noise_alone_is_the_same_with_and_without_the_record(
    victim: tuple[TrainingSetup, list[nn.Parameter]],
) -> None:
    """The counts of independent runs differ by no more than chance: 4 standard errors of two proportions."""
    counts = {
        sampled: [int(of_noise_alone(released(*victim, 2 * seed + sampled, sampled=sampled)).sum()) for seed in SEEDS]
        for sampled in (True, False)
    }
    coordinates = len(released(*victim, 0, sampled=False))
    share = sum(map(sum, counts.values())) / (2 * len(SEEDS) * coordinates)
    error = math.sqrt(2 * share * (1 - share) * len(SEEDS) * coordinates)
    assert abs(sum(counts[True]) - sum(counts[False])) <= 4 * error

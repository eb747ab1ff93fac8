"""What an organization with several tasks trains on, and the clipped sums of its units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.record_reading import read_records
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.mechanisms.clipped_sum import ClippedSum
from cotune.privacy.mechanisms.per_example import per_example, unit_gradients


def prepared(plan: Plan) -> tuple[TrainableModel, list[nn.Parameter], TrainingSetup, Dataset]:
    """The setting of an organization with all records, and with the parameters away from where they start."""
    model = get_plan_model(plan, "cpu")
    names = model.names(plan.get_stage(1).mode)
    model.load({})
    generator = torch.Generator().manual_seed(5)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()}
    model.load(state)
    parameters = model.train_only(names)
    records = read_records(plan.data, task=plan.task)
    tasks = tuple(task.name for task in plan.tasks)
    held = Dataset(((records, np.arange(len(records))),), plan.labels, plan.task, tasks=tasks)
    held = held.bound_contributions(plan.privacy, plan.seed)
    return model, parameters, build_setup(plan, plan.get_stage(1), model, held, state, "clinic", expected_batch=4), held


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


def clipped_sum(given: TrainingSetup, units: Sequence[Sequence[int]], clip: float) -> list[Tensor]:
    with per_example(given.module, given.loss) as gradients:
        found = ClippedSum(gradients.parameters, clip, 0.0, "flat")
        for block, _ in unit_gradients(gradients, units, given.batches):
            found.add(block)
        return [tensor.clone() for tensor in found.totals()]


def check_clipped_sum(given: TrainingSetup, expected: Sequence[Sequence[Tensor]]) -> None:
    """Compare with what the gradients of single units add up to: of each unit those of all parameters, in float64."""
    norms = sorted(map(norm, expected))
    clip = norms[len(norms) // 2] * 0.99  # some are clipped and some are not
    total = [sum((g[i] * min(1.0, clip / norm(g)) for g in expected), torch.zeros(())) for i in range(len(expected[0]))]
    actual = clipped_sum(given, given.units, clip)
    assert norm([a.double() - e for a, e in zip(actual, total, strict=True)]) < 1e-5 * norm(total)

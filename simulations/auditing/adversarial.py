"""Do adversarial states make a record contribute more than it may? The attacks that once broke the claim, on a plan's own model.

For states that a malicious server could send, and for unlike records of the organization, the plan's own steps are taken with and
without one unit, from the records on: D, D without i, and i alone. The noise is drawn by the same generator each time, so that
what differs is what the records did. Three things must hold, whatever the state:

- a unit moves the sum by C at most;
- it does so by itself: S(D) − S(D∖i) = S({i}). Padding, neighbors in a batch and rounding errors that grow with other records'
  gradients show here (under bfloat16, one record once moved 63 others by 46 C). Where a sum is exact and rounded to the grid as a
  whole (`clipped_sum`), this holds to the rounding of the three sums, for which the clip norm leaves room;
- what is released lies on one grid, with and without the unit: its low bits tell nothing (Mironov, CCS 2012).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cotune.client.training.stage_setup.from_records import build_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.models.encoding import encoded_examples, encoded_features
from cotune.models.features.head import feature_head
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig
from cotune.privacy.mechanisms.grid_noise import MAX_NOISE, grid_step
from cotune.privacy.mechanisms.linear_gradients import OuterProducts
from cotune.privacy.mechanisms.per_example import per_example
from cotune.privacy.mechanisms.random_generators import derive_seed, private_generator
from cotune.simulations.auditing.released import Engine, Subject, collect_released_sums

LARGEST = 1e4  # magnitude of a parameter in a state
TOLERANCE = 1e-6  # relative to C
_UNITS = 6  # with whose rows states are tried


@dataclass(frozen=True)
class Probe:
    """What one state led to, at worst over the units that were left out.

    Attributes:
        contribution: ‖S(D) − S(D∖i)‖ / C.
        influence: ‖S(D) − S(D∖i) − S({i})‖ / C: what the unit did through others.
        rounding: What rounding sums to the grid adds to that at most; 0 where each contribution is on the grid.
        off_grid: Share of the released numbers that are not on the grid.
    """

    state: str
    contribution: float
    influence: float
    rounding: float
    off_grid: float

    @property
    def broken(self) -> bool:
        """Whether the state broke one of the three."""
        by_itself = self.influence <= TOLERANCE + self.rounding
        return not (self.contribution <= 1 + TOLERANCE and by_itself and self.off_grid == 0)


def probe_states(
    engine: Engine,
    plan: Plan,
    stage: Stage,
    model: TrainableModel,
    names: Sequence[str],
    state: State,
    dataset: Dataset,
    mechanism: DPSGDConfig,
) -> tuple[Probe, ...]:
    """Try adversarial states of the parameters that a stage trains. Leaves the model set to `state`.

    Args:
        names: The trained parameters.
        state: What the stage begins with.
    """
    few = _unlike(dataset, model)
    model.load(state)
    rounding = _rounding(build_setup(plan, stage, model, few, state, "audit", expected_batch=mechanism.expected_batch), mechanism)
    probes = []
    for name, adverse in _states(plan, stage, model, names, state, few):
        probes.append(_probe(engine, plan, stage, model, {**state, **adverse}, few, mechanism, name, rounding))
    model.load(state)
    return tuple(probes)


def _unlike(dataset: Dataset, model: TrainableModel) -> Dataset:
    """The rows of a few units: of the longest, the shortest and those between."""
    loaded = model.loaded
    examples = encoded_examples(dataset, model)
    units = sorted(dataset.units, key=lambda unit: max(loaded.task.order(examples[row]) for row in unit))
    picked = np.unique(np.linspace(0, len(units) - 1, min(_UNITS, len(units))).round().astype(int))
    return _only(dataset, [row for i in picked for row in units[i]])


def _only(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    """Dataset of these rows and nothing else: no other record is left in their files."""
    parts = []
    first = 0
    for records, own in dataset.parts:
        chosen = [int(own[row - first]) for row in sorted(rows) if first <= row < first + len(own)]
        parts.append((records.select(chosen), np.arange(len(chosen))))
        first += len(own)
    return replace(dataset, parts=tuple(part for part in parts if len(part[1])))


def _states(
    plan: Plan, stage: Stage, model: TrainableModel, names: Sequence[str], state: State, few: Dataset
) -> Iterator[tuple[str, State]]:
    """Names and parameters of the states that are tried."""
    model.load(state)
    own = model.state(names)
    generator = torch.Generator().manual_seed(derive_seed(plan.seed, "adversarial"))
    yield "as it begins", {}
    head = {name: tensor for name, tensor in own.items() if not name.startswith(model.prefix)}
    adapters = {name: tensor for name, tensor in own.items() if ".lora_" in name}
    for what, part in (("a huge head", head), ("huge adapters", adapters)):
        if part:
            yield what, {name: LARGEST * torch.randn(t.shape, generator=generator).clamp(-1, 1) for name, t in part.items()}
    norms = {name: t for name, t in own.items() if t.dim() == 1 and name.endswith("weight") and name not in head}
    if norms:
        yield "huge normalization weights", {name: torch.full_like(t, LARGEST) for name, t in norms.items()}
    if stage.mode == "head" and feature_head(model) is not None:
        features = encoded_features(few, model, state, plan.model.precision).nan_to_num()
        picked = {name: _undecided(features, t) for name, t in head.items() if t.shape == (len(plan.labels), features.shape[1])}
        if picked:
            zeros = {name: torch.zeros_like(t) for name, t in head.items()}
            yield "a head from a linear system", {**zeros, **picked}


def _undecided(features: Tensor, head: Tensor) -> Tensor:
    """A head of huge weights under which every record is undecided between two classes, as near as a linear system gets.

    There a record's gradient is most sensitive to its feature: another rounding of it, times 10⁴, decides its class.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(features.shape[1], generator=generator, dtype=torch.float64)
    seen = features.double()
    direction -= torch.linalg.pinv(seen) @ (seen @ direction)
    direction *= LARGEST / float(direction.abs().max().clamp(min=1e-300))
    found = torch.zeros(head.shape, dtype=torch.float64)
    found[0] = direction / 2
    found[1] = -direction / 2
    return found.to(head.dtype)


def _probe(
    engine: Engine,
    plan: Plan,
    stage: Stage,
    model: TrainableModel,
    state: State,
    few: Dataset,
    mechanism: DPSGDConfig,
    name: str,
    rounding: float,
) -> Probe:
    key = int(private_generator().integers(2**62))
    units = few.units
    everybody = range(len(units))
    exact = _exact(mechanism)

    def sums(present: Sequence[int], by: DPSGDConfig = exact) -> Tensor:
        """The noised sum of one step in which these units are; without units the noise alone."""
        model.load(state)
        rows = [row for number in present or [0] for row in units[number]]
        setting = build_setup(plan, stage, model, _only(few, rows), state, "audit", expected_batch=mechanism.expected_batch)
        found = collect_released_sums(
            Subject(engine, setting.module, setting.loss, setting.units if present else [], setting.batches),
            replace(by, sample_rate=1.0, steps=1),
            noise_generator=np.random.default_rng(key),
        )
        return torch.cat([total.flatten() for total in found[0]])

    noise = sums([])
    whole = sums(everybody)
    contributions = []
    influences = []
    off_grid = [_off_grid(sums(everybody, mechanism), mechanism)]
    for left_out in sorted({everybody[0], everybody[-1]}):
        others = [number for number in everybody if number != left_out]
        moved = whole - sums(others)
        contributions.append(float(moved.norm()) / mechanism.clip_norm)
        influences.append(float((moved - (sums([left_out]) - noise)).norm()) / mechanism.clip_norm)
        off_grid.append(_off_grid(sums(others, mechanism), mechanism))
    return Probe(name, max(contributions), max(influences), rounding, max(off_grid))


def _exact(mechanism: DPSGDConfig) -> DPSGDConfig:
    """The mechanism, with contributions that float32 holds: the grid follows no more noise than this, so they stay the same."""
    return replace(mechanism, noise_multiplier=min(mechanism.noise_multiplier, MAX_NOISE), expected_batch=1.0)


def _rounding(setting: TrainingSetup, mechanism: DPSGDConfig) -> float:
    """What rounding does to S(D) − S(D∖i) − S({i}), relative to C: half a step for each of three sums, in every entry.

    The form of gradients decides, and that is the same in every state.
    """
    with per_example(setting.module, setting.loss) as of:
        (_, batch) = next(iter(setting.batches(setting.units[0])))
        _, found = of.factors(batch)
    if not isinstance(found, OuterProducts):
        return 0.0
    entries = sum(parameter.numel() for parameter in of.parameters)
    return 1.5 * grid_step(mechanism.clip_norm, _exact(mechanism).noise_multiplier) * math.sqrt(entries) / mechanism.clip_norm


def _off_grid(sums: Tensor, mechanism: DPSGDConfig) -> float:
    """Share of the numbers for which no multiple k of the grid's step explains the released float32, k·step/B."""
    step = grid_step(mechanism.clip_norm, mechanism.noise_multiplier)
    batch = mechanism.expected_batch
    seen = (sums / batch).float()
    nearest = (sums / step).round() * step
    return float((seen != (nearest / batch).float()).double().mean())

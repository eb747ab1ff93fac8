"""What one batch and one step of a plan take on this machine: measured on real records sorted by length, for some two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cotune.client.training.stage_setup.from_records import build_setup, synthetic_setup
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.inputs.batching import FINE_LENGTHS, LENGTHS
from cotune.data.tasks.classes import logits
from cotune.data.tasks.text import Example
from cotune.models.encoding import encoded_examples
from cotune.models.features.cached import encode_batch
from cotune.models.features.head_fit import fit_head, head_names
from cotune.models.features.precision import FEATURE_SLOTS
from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import stage_names
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup

_BUDGET = 0.3  # seconds for each thing that is measured: there are about seven
_LONG_SECONDS = 5.0  # seconds, after which what is slow only at first does not matter
_LENGTHS = 3  # of batches that are measured; those between them are interpolated
_REPEATS = 3


@dataclass(frozen=True)
class Seconds:
    """A range: how long something takes at least, and at most, as far as measuring can tell."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.low * times, self.high * times)


Measure = Callable[[Callable[[], object]], Seconds]


def measure(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Seconds:
    """Time some work: once to warm up, then at least once more, and again until three times or the budget are over.

    What ran first is no measure, however long it took: a first private step takes ten times as long as those after it, and on a
    busy machine many times more.
    """
    first = _timed(work, clock)
    if first > _LONG_SECONDS:
        return Seconds(0.8 * first, 1.1 * first)
    times = [_timed(work, clock)]
    while len(times) < _REPEATS and first + sum(times) < _BUDGET:
        times.append(_timed(work, clock))
    return Seconds(min(times), max(times)) if len(times) > 1 else Seconds(0.8 * times[0], 1.1 * times[0])


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def rows_at_once(setting: TrainingSetup, *, private: bool) -> int:
    """Return how many records a batch of a step has; with privacy a slot is blank."""
    return setting.physical.slots - private


def by_length(costs: dict[int, Seconds], length: int) -> Seconds:
    """Return the cost of a batch of some length, between those of the lengths beside it."""
    known = sorted(costs)
    low, high = ([getattr(costs[each], bound) for each in known] for bound in ("low", "high"))
    return Seconds(float(np.interp(length, known, low)), float(np.interp(length, known, high)))


class Stopwatch:
    """Measures with one model. Nothing that it trains is kept: the model is unchanged whenever something begins.

    Args:
        plan: The plan.
        model: Its model.
        sample: Some of the records, by which lengths are known and batches are made.
        measure: Times some work.
    """

    def __init__(self, plan: Plan, model: TrainableModel, sample: Dataset, measure: Measure = measure) -> None:
        self.plan = plan
        self.model = model
        self.sample = sample
        self.measure = measure
        self.examples: list[Example] = encoded_examples(sample, model)

    def lengths(self, buckets: Sequence[int]) -> list[int]:
        """How long each record of the sample is, of those that batches come in."""
        task = self.model.loaded.task
        longest = self.model.loaded.max_length
        return [task.bucket(example, longest, buckets) for example in self.examples]

    def encoding(self) -> dict[int, Seconds]:
        """Length -> what a batch of the encoder costs, forward alone."""
        found = {}
        for length, rows in self._chosen(FINE_LENGTHS, FEATURE_SLOTS - 1):
            batch = [self.examples[row] for row in rows]
            self.model.load({})
            found[length] = self.measure(partial(encode_batch, self.model, batch, self.plan.model.precision))
        return found

    def reading(self) -> dict[int, Seconds]:
        """The same for a model whose head reads more than one vector: the whole of it, forward."""
        loaded = self.model.loaded
        collate = loaded.task.collator(self.model.module, loaded.reader, self.model.device)
        found = {}
        for length, rows in self._chosen(FINE_LENGTHS, FEATURE_SLOTS):
            batch = collate([self.examples[row] for row in rows])
            with torch.no_grad():
                found[length] = self.measure(partial(logits, self.model.module, batch))
        return found

    def on_features(self, stage: Stage, batch: int, *, private: bool) -> Seconds:
        """Measure one step of a head on the features of `batch` records."""
        setting = self._made_up(stage, max(1, batch))
        return self._step(setting, stage, range(setting.rows), private=private)

    def on_examples(self, stage: Stage, expected_batch: float, *, private: bool) -> tuple[int, dict[int, Seconds]]:
        """How many records a batch has; length -> what a batch of a step costs, forward and backward; 0 -> a step beside them."""
        self.model.load({})
        self.model.train_only(stage_names(self.plan, stage, self.model))
        plan = self.plan if private else self.plan.model_copy(update={"privacy": "none"})
        setting = build_setup(plan, stage, self.model, self.sample, {}, "sample", expected_batch=expected_batch)
        rows = rows_at_once(setting, private=private)
        nothing = self._step(setting, stage, (), private=private)
        found = {0: nothing}
        for length, chosen in self._chosen(LENGTHS, rows):
            whole = self._step(setting, stage, chosen, private=private)
            found[length] = Seconds(max(0.0, whole.low - nothing.high), max(0.0, whole.high - nothing.low))
        return rows, found

    def fit(self, records: int) -> Seconds:
        """Measure one head fitted to the features of `records` records, see `client.adaptation`."""
        self.model.load({})
        head = self.model.state(head_names(self.model))
        vectors = encode_batch(self.model, self.examples[:8], self.plan.model.precision).nan_to_num()
        features = vectors[torch.arange(records) % len(vectors)]
        noisy = features + 0.1 * features.std() * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        targets = torch.arange(records) % len(self.plan.labels)
        return self.measure(lambda: fit_head(self.model, noisy, targets, start=head, toward=head, pull=1.0 / records))

    def _chosen(self, buckets: Sequence[int], rows: int) -> list[tuple[int, list[int]]]:
        """Of the lengths that there are the shortest, the longest and one between, each with as many rows as a batch has."""
        lengths = self.lengths(buckets)
        there = sorted(set(lengths))
        places = np.unique(np.linspace(0, len(there) - 1, min(_LENGTHS, len(there))).round().astype(int))
        return [(there[place], _filled([i for i, n in enumerate(lengths) if n == there[place]], rows)) for place in places]

    def _made_up(self, stage: Stage, rows: int) -> TrainingSetup:
        self.model.load({})
        self.model.train_only(stage_names(self.plan, stage, self.model))
        return synthetic_setup(self.plan, stage, self.model, rows)

    def _step(self, setting: TrainingSetup, stage: Stage, rows: Sequence[int], *, private: bool) -> Seconds:
        names = stage_names(self.plan, stage, self.model)
        optimizer = build_optimizer(stage.local, self.model, names, self.model.train_only(names))
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # nothing moves, however often it is measured
        privacy = self.plan.privacy
        if not private or not isinstance(privacy, RecordPrivacy):
            return self.measure(lambda: _plain_step(setting, optimizer, rows))

        def step() -> None:
            units = [[row] for row in rows]
            config = DPSGDConfig(
                noise_multiplier=1.0,
                clip_norm=privacy.clip_norm,
                sample_rate=1.0,
                expected_batch=float(max(1, len(units))),
                steps=1,
                clipping_mode=privacy.clipping,
            )
            fit = setting.physical.fit
            for _ in DPSGD(config).run(DPSGDSetup(setting.module, optimizer, setting.loss, units, setting.batches, fit=fit)):
                pass

        return self.measure(step)


def _filled(rows: list[int], count: int) -> list[int]:
    """As many of the rows as a batch has; the same ones again where there are fewer."""
    return [rows[i % len(rows)] for i in range(count)]


def _plain_step(setting: TrainingSetup, optimizer: torch.optim.Optimizer, rows: Sequence[int]) -> None:
    """As without privacy."""
    optimizer.zero_grad()
    for _, batch in setting.batches(rows):
        (setting.loss(batch).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()

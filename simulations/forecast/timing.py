"""About how long a simulation will take on this machine: what is done how often, times what one of it was measured to cost.

Counted are reading and checking (as long as that has just taken), encoding, hidden states below trained layers, the steps of
every round, judging the model, the baselines, and the heads that organizations fit to themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce

import numpy as np
import torch
from scipy.stats import poisson

from cotune.client.personalization.adaptation import MANY_RECORDS
from cotune.data.dataset import Dataset
from cotune.data.inputs.batching import LENGTHS
from cotune.models.device import autocasts
from cotune.models.evaluation.test_set import ROWS_ABOVE
from cotune.models.features.cached import are_cached
from cotune.models.features.feature_batches import feature_rows, feature_slots
from cotune.models.features.head import feature_head
from cotune.models.features.kept_states import StateReader, are_kept
from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import LocalTraining, Stage
from cotune.privacy.config import RecordPrivacy
from cotune.simulations.fitted_heads import fits_alone, fits_pooled
from cotune.simulations.forecast.stopwatch import PATIENCE, Measure, Seconds, Stopwatch, by_length, measure
from cotune.simulations.prepare import Prepared

_SAMPLE = 1000  # records whose lengths are looked at, drawn by the plan's seed
_FITS = 12  # heads that an organization fits to each part of its records, half of them alone, see `client.adaptation`
_FITTED = 4000  # records from which on the time of a fit grows as they do
_EASIER = Seconds(0.4, 1.1)  # of a fit from scratch: those that begin where another has ended need fewer iterations
_BESIDE = Seconds(0.04, 0.12)  # per organization and round: messages, ledger and outbox, which wait for the disk
_TOO_MUCH = 1.3  # of the upper end: other processes, memory, warming


@dataclass(frozen=True)
class Estimate:
    """How long a simulation takes.

    Attributes:
        seconds: From, to.
        timed_records: How many records were in the batches that were measured.
        records: How many there are.
    """

    seconds: Seconds
    timed_records: int
    records: int


def estimate(
    prepared: Prepared, model: TrainableModel, spent: float, measure: Measure = measure, patience: float = PATIENCE
) -> Estimate:
    """Return the range for a whole simulation.

    Args:
        prepared: The plan, and who holds what.
        model: Of the plan.
        spent: Seconds that reading and checking have just taken, and will take again.
        measure: Times some work.
        patience: See `Stopwatch`.
    """
    work = _Work(prepared, model, Stopwatch(prepared.plan, model, draw_sample(prepared), measure, patience))
    model.load({})
    with torch.random.fork_rng(devices=[]):
        parts = [Seconds(spent, spent), *work.parts()]
    model.load({})
    whole = reduce(Seconds.__add__, parts)
    timed = len(work.stopwatch.timed)
    return Estimate(Seconds(whole.low, _TOO_MUCH * whole.high), timed, sum(map(len, prepared.records.values())))


def draw_sample(prepared: Prepared) -> Dataset:
    """Return records from all files, each as likely as any other: long ones are as frequent among them as among all."""
    sizes = [len(records) for records in prepared.records.values()]
    draw = np.random.default_rng(prepared.plan.seed)
    drawn = np.sort(draw.choice(sum(sizes), min(sum(sizes), _SAMPLE), replace=False))
    ends = np.cumsum(sizes)
    own = [drawn[(drawn >= end - size) & (drawn < end)] - (end - size) for size, end in zip(sizes, ends, strict=True)]
    parts = tuple(zip(prepared.records.values(), own, strict=True))
    return Dataset(parts, prepared.plan.labels, prepared.plan.task)


class _Work:
    """What is done how often."""

    def __init__(self, prepared: Prepared, model: TrainableModel, stopwatch: Stopwatch) -> None:
        self.prepared = prepared
        self.plan = prepared.plan
        self.model = model
        self.stopwatch = stopwatch
        self.sizes = [share.public_examples(self.plan) for share in prepared.shares]
        self.has_features = feature_head(model) is not None
        self.encoding = stopwatch.encoding() if self.has_features else {}
        self.states: dict[tuple[object, ...], Seconds] = {}  # of hidden states that are computed once for all records

    def parts(self) -> Iterator[Seconds]:
        """Each part of the run, then of the baselines, then the fits."""
        baselines = self.plan.simulation.baselines
        private = isinstance(self.plan.privacy, RecordPrivacy)
        run = self._training(self.plan.stages, private=private)
        yield from run
        yield self._judging(self.plan.stages)
        if "alone" in baselines:
            yield from run
            if private and not fits_alone(self.plan, self.model):
                yield from self._freely
            yield from self._fits()
        if "pooled" in baselines:
            records = sum(len(share.rows) for share in self.prepared.shares)
            yield from [self._pooled_fit(records)] if fits_pooled(self.plan, self.model, records) else self._freely
        if "plain" in baselines and self.plan.keeps_personal:
            yield from run
        if "single" in baselines and len(self.plan.tasks) > 1:
            yield from run * len(self.plan.tasks)
        yield self._encode(0 if self._kept() else self._distinct)
        yield from self.states.values()

    @cached_property
    def _freely(self) -> list[Seconds]:
        """Without privacy."""
        return self._training(self._without_privacy(), private=False)

    def _without_privacy(self) -> tuple[Stage, ...]:
        """As baselines without privacy are trained."""
        own = self.plan.simulation.pooled
        return self.plan.stages if own is None else tuple(stage.model_copy(update={"local": own}) for stage in self.plan.stages)

    def _training(self, stages: Sequence[Stage], *, private: bool) -> list[Seconds]:
        return [self._rounds(stages, number, private=private) for number in range(len(stages))]

    def _rounds(self, stages: Sequence[Stage], number: int, *, private: bool) -> Seconds:
        """All rounds of a stage, of all organizations one after the other."""
        stage = stages[number]
        beside = _BESIDE * (stage.rounds * len(self.sizes))
        once = [stage.local.steps_per_round(n) for n in self.sizes]
        steps = [stage.rounds * (taken + self.plan.personal.count_own_steps(taken)) for taken in once]
        if stage.mode == "head" and self.has_features:
            batch = round(sum(self._batch(stage.local, n) for n in self.sizes) / len(self.sizes))
            again = self._encode(self._distinct) if _trains_encoder(stages[:number]) else Seconds()
            return again + self.stopwatch.on_features(stage, batch, private=private) * sum(steps) + beside
        expected = max(self._batch(stage.local, n) for n in self.sizes)
        costs = self.stopwatch.on_examples(stage, expected, private=private)
        self._read_states(costs.reader, stages[:number])
        counts = [self._drawn(stage.local, n, costs.rows) for n in self.sizes]
        taken = [(_total(costs.batches, count) + costs.beside) * times for count, times in zip(counts, steps, strict=True)]
        return reduce(Seconds.__add__, taken) + beside

    def _read_states(self, reader: StateReader | None, before: Sequence[Stage]) -> None:
        """Count the hidden states of all records, once for all who read the same ones: those on disk cost nothing."""
        if reader is None:
            return
        changed = tuple(number for number, stage in enumerate(before) if _trains_below_adapters(stage))
        key = (reader.lower.first, reader.slots, reader.low_precision, changed)
        if key in self.states:
            return
        files = [records.inputs for records in self.prepared.records.values()]
        missing = sum(len(inputs) for inputs in files if changed or not are_kept(reader, inputs))
        count = self._counted(LENGTHS, missing, reader.slots - 1) if missing else {}
        self.states[key] = _total(self.stopwatch.states(reader), count) if missing else Seconds()

    @staticmethod
    def _batch(local: LocalTraining, examples: int) -> float:
        return local.sample_rate(examples) * examples

    def _judging(self, stages: Sequence[Stage]) -> Seconds:
        """The records of test and validation after each round in which the encoder has been trained: no features are kept."""
        held = sum(len(rows) for _, rows in (*self.prepared.test, *self.prepared.validation))
        trained = [number for number in range(len(stages)) if _trains_encoder(stages[: number + 1])]
        above = [number for number in trained if not any(map(_trains_below_adapters, stages[: number + 1]))]
        reader = self.stopwatch.find_judge(autocasts(self.plan.model.precision, self.model.device)) if above else None
        if reader is None:
            return self._read(held) * sum(stages[number].rounds for number in trained) if trained else Seconds()
        self._read_states(reader, ())
        judged = _total(self.stopwatch.judging(reader), self._counted(LENGTHS, held, ROWS_ABOVE - 1))
        whole = sum(stages[number].rounds for number in trained if number not in above)
        return judged * sum(stages[number].rounds for number in above) + (self._read(held) * whole if whole else Seconds())

    def _fits(self) -> Iterator[Seconds]:
        """Of each organization, on most of its records."""
        if self.plan.keeps_personal or not self.has_features:
            return
        held = [len(share.rows) for share in self.prepared.shares]
        one = self.stopwatch.fit(max(2, round(sum(held) / len(held))))
        yield _all_fits(one, sum(_FITS * self._folds(n) + 2 for n in held))
        if _trains_encoder(self.plan.stages):
            yield self._encode(sum(held))

    def _pooled_fit(self, records: int) -> Seconds:
        few = max(2, min(records, _FITTED))
        return _all_fits(self.stopwatch.fit(few) * (records / few), _FITS / 2 * self._folds(records) + 1)

    def _folds(self, records: int) -> int:
        return 1 if records >= MANY_RECORDS else self.plan.personalize.folds

    @property
    def _distinct(self) -> int:
        return sum(len(set(records.inputs)) for records in self.prepared.records.values())

    def _kept(self) -> bool:
        """Whether no features need be computed: nobody reads any, or they are on disk."""
        if not self.has_features or (self.plan.stages[0].mode != "head" and "alone" not in self.plan.simulation.baselines):
            return True
        precision = self.plan.model.precision
        return all(are_cached(self.model, records.inputs, precision) for records in self.prepared.records.values())

    def _read(self, records: int) -> Seconds:
        """Return the seconds for `records` records, sorted, forward alone."""
        if not self.encoding:  # tags: a head that reads every vector
            self.encoding = self.stopwatch.reading()
        lengths = Counter(self.stopwatch.lengths(None))
        filled = max(1.0, records / feature_slots(self.model.device)) / lengths.total()
        return _total(self.encoding, {length: n * filled for length, n in lengths.items()})

    def _encode(self, records: int) -> Seconds:
        """Return the seconds for `records` records, forward alone, in batches that their lengths alone decide."""
        if not records:
            return Seconds()
        rows = partial(feature_rows, self.model, slots=feature_slots(self.model.device))
        return _total(self.encoding, _count_batches(self.stopwatch.lengths(None), records, rows))

    def _counted(self, buckets: Sequence[int], records: float, rows: int) -> dict[int, float]:
        """Length -> how many batches `records` records are in, with the lengths of the sample."""
        return _count_batches(self.stopwatch.lengths(buckets), records, lambda _: rows)

    def _drawn(self, local: LocalTraining, examples: int, rows: int) -> dict[int, float]:
        """Length -> how many batches of a step have it in the mean; of a few drawn records, many lengths have none."""
        if local.sample_rate(examples) >= 1:
            return dict(self._counted(LENGTHS, examples, rows))
        lengths = self.stopwatch.lengths(LENGTHS)
        expected = self._batch(local, examples) / len(lengths)
        return {length: _expect_batches(expected * n, rows) for length, n in Counter(lengths).items()}


def _all_fits(one: Seconds, times: float) -> Seconds:
    return Seconds(one.low * _EASIER.low * times, one.high * _EASIER.high * times)


def _count_batches(lengths: Sequence[int], records: float, rows: Callable[[int], int]) -> dict[int, float]:
    """lengths: Of a sample of the records. rows: Length -> how many records a batch takes."""
    return {length: math.ceil(records * n / len(lengths) / rows(length)) for length, n in Counter(lengths).items()}


def _expect_batches(records: float, rows: int) -> float:
    """The mean number of batches of `rows` that a Poisson number of records fills: Σ P(N > k · rows) over k = 0, 1, …"""
    few = math.ceil(records / rows + 6 * math.sqrt(records) / rows) + 1
    return float(poisson.sf(rows * np.arange(few), records).sum())


def _trains_below_adapters(stage: Stage) -> bool:
    return stage.mode not in ("head", "lora")


def _trains_encoder(stages: Sequence[Stage]) -> bool:
    return any(stage.mode != "head" for stage in stages)


def _total(costs: Mapping[int, Seconds], counts: Mapping[int, float]) -> Seconds:
    return reduce(Seconds.__add__, (by_length(costs, length) * count for length, count in counts.items()), Seconds())

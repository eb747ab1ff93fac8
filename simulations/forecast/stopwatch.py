"""What one batch and one step of a plan take on this machine: measured on a few real records of chosen lengths, within seconds.

A batch that takes long is measured with a few rows: kernels are busy with them already, and all of its rows take as much more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cotune.client.training.stage_setup.from_records import build_setup, synthetic_setup
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.inputs.batching import LENGTHS
from cotune.data.tasks.classes import Batch
from cotune.data.tasks.text import Example
from cotune.models.encoding import encoded_examples
from cotune.models.evaluation.evaluated_rows import EvaluatedRows
from cotune.models.evaluation.test_set import ROWS_ABOVE, find_kept_layers
from cotune.models.features.cached import encode_batch
from cotune.models.features.feature_batches import feature_length, feature_slots
from cotune.models.features.head_fit import fit_head, head_names
from cotune.models.features.kept_states import StateReader, attach_states
from cotune.models.physical_batch import FEWEST_SLOTS
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
PATIENCE = 1.0  # seconds: a batch that takes longer is measured with a few rows
_FEW_SLOTS = 4  # hundreds of tokens
_MORE = 4  # times as many slots, as long as they take no longer than is patiently waited for


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


def by_length(costs: Mapping[int, Seconds], length: int) -> Seconds:
    """Return the cost of a batch of some length, between those of the lengths beside it."""
    known = sorted(costs)
    low, high = ([getattr(costs[each], bound) for each in known] for bound in ("low", "high"))
    return Seconds(float(np.interp(length, known, low)), float(np.interp(length, known, high)))


@dataclass(frozen=True)
class StepCosts:
    """What the steps of a stage cost.

    Attributes:
        rows: Records of a batch.
        batches: Length -> a batch, forward and backward.
        beside: A step without any batch.
        reader: Computes the hidden states that batches begin with; None: they begin with tokens.
    """

    rows: int
    batches: dict[int, Seconds]
    beside: Seconds
    reader: StateReader | None


class Stopwatch:
    """Measures with one model. Nothing that it trains is kept: the model is unchanged whenever something begins.

    Args:
        plan: The plan.
        model: Its model.
        sample: Some of the records, by which lengths are known and batches are made.
        measure: Times some work.
        patience: Seconds of a batch, beyond which it is measured with a few of its rows.

    Attributes:
        timed: Numbers of the sample's records that were measured so far.
    """

    def __init__(
        self, plan: Plan, model: TrainableModel, sample: Dataset, measure: Measure = measure, patience: float = PATIENCE
    ) -> None:
        self.plan = plan
        self.model = model
        self.sample = sample
        self.measure = measure
        self.patience = patience
        self.timed = set[int]()
        self.examples: list[Example] = encoded_examples(sample, model)

    def lengths(self, buckets: Sequence[int] | None) -> list[int]:
        """How long each record's row is in batches of these lengths, for the records of the sample; None: of features."""
        if buckets is None:
            return [feature_length(self.model, example) for example in self.examples]
        task = self.model.loaded.task
        longest = self.model.loaded.max_length
        return [task.bucket(example, longest, buckets) for example in self.examples]

    def encoding(self) -> dict[int, Seconds]:
        """Length -> what a batch of the encoder costs, forward alone."""
        precision = self.plan.model.precision
        self.model.load({})
        slots = feature_slots(self.model.device)
        return self._by_length(None, slots, lambda batch, _, slots: partial(encode_batch, self.model, batch, precision, slots))

    def reading(self) -> dict[int, Seconds]:
        """The same for a model whose head reads more than one vector: the whole of it, forward."""
        slots = feature_slots(self.model.device)
        return self._by_length(None, slots, lambda *batch: partial(self._score, self._collate(*batch)))

    def states(self, reader: StateReader) -> dict[int, Seconds]:
        """Length -> what a batch costs below the trained layers, forward alone."""

        def begin(batch: Sequence[Example], length: int, slots: int) -> Callable[[], object]:
            return partial(reader.read_batch, self._collate(batch, length, slots))

        return self._by_length(LENGTHS, reader.slots, begin)

    def find_judge(self, low_precision: bool) -> StateReader | None:
        """Return what computes the hidden states with which test records are judged; None: they are judged from their tokens."""
        if not EvaluatedRows.of(self.model.loaded, self.sample.inputs(), self.sample.targets).are_records:
            return None
        lower = find_kept_layers(self.model, {}, self.sample)
        if lower is None:
            return None
        rows = max(FEWEST_SLOTS, self.plan.physical_rows or ROWS_ABOVE)
        return StateReader(self.model, lower, rows, low_precision)

    def judging(self, reader: StateReader) -> dict[int, Seconds]:
        """Length -> what a batch costs above kept states, forward alone."""

        def begin(batch: Sequence[Example], length: int, slots: int) -> Callable[[], object]:
            states = _draw_states(reader, batch)
            return partial(self._score_above, reader, attach_states(self._collate(batch, length, slots), states))

        return self._by_length(LENGTHS, ROWS_ABOVE, begin)

    def on_features(self, stage: Stage, batch: int, *, private: bool) -> Seconds:
        """Measure one step of a head on the features of `batch` records."""
        setting = self._made_up(stage, max(1, batch))
        return self._step(setting, stage, range(setting.rows), private=private)

    def on_examples(self, stage: Stage, expected_batch: float, *, private: bool) -> StepCosts:
        """Measure steps on batches of records. Hidden states below the trained layers are drawn: what they hold costs nothing."""
        self.model.load({})
        self.model.train_only(stage_names(self.plan, stage, self.model))
        plan = self.plan if private else self.plan.model_copy(update={"privacy": "none"})
        readers: list[StateReader] = []

        def draw(reader: StateReader) -> list[Tensor]:
            readers.append(reader)
            return _draw_states(reader, self.examples)

        setting = build_setup(plan, stage, self.model, self.sample, {}, "sample", expected_batch=expected_batch, find_states=draw)
        slots = setting.physical.slots
        blank = bool(private or readers)
        nothing = self._step(setting, stage, (), private=private)

        def time(there: Sequence[int], few: int) -> Seconds:
            setting.physical.rows = few
            whole = self._step(setting, stage, self._filled(there, few - blank), private=private)
            return Seconds(max(0.0, whole.low - nothing.high), max(0.0, whole.high - nothing.low))

        found = {length: self._scaled(slots, partial(time, there)) for length, there in self._chosen(LENGTHS)}
        return StepCosts(slots - blank, found, nothing, readers[0] if readers else None)

    def fit(self, records: int) -> Seconds:
        """Measure one head fitted to the features of `records` records, see `client.adaptation`."""
        self.model.load({})
        head = self.model.state(head_names(self.model))
        vectors = encode_batch(self.model, self.examples[:8], self.plan.model.precision, _FEW_SLOTS).nan_to_num()
        features = vectors[torch.arange(records) % len(vectors)]
        noisy = features + 0.1 * features.std() * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        targets = torch.arange(records) % len(self.plan.labels)
        return self.measure(lambda: fit_head(self.model, noisy, targets, start=head, toward=head, pull=1.0 / records))

    def _by_length(
        self, buckets: Sequence[int] | None, slots: int, begin: Callable[[Sequence[Example], int, int], Callable[[], object]]
    ) -> dict[int, Seconds]:
        """Measure forward passes. begin: (examples, their length, slots) -> what is measured; the last slot is blank."""

        def time(length: int, there: Sequence[int], few: int) -> Seconds:
            batch = [self.examples[row] for row in self._filled(there, few - 1)]
            with torch.no_grad():
                return self.measure(begin(batch, length, few))

        return {length: self._scaled(slots, partial(time, length, there)) for length, there in self._chosen(buckets)}

    def _scaled(self, slots: int, time: Callable[[int], Seconds]) -> Seconds:
        """What a batch of `slots` costs: in proportion to one of fewer slots, where all of them would take too long.

        More and more are tried, as what a batch costs whatever it holds is most of the cost of a few slots of a small model.
        """
        few = min(slots, _FEW_SLOTS)
        found = time(few)
        while few < slots:
            more = min(slots, _MORE * few)
            if (found * (more / few)).high > self.patience:
                return found * (slots / few)
            few = more
            found = time(few)
        return found

    def _collate(self, batch: Sequence[Example], *shape: int) -> Batch:
        """shape: Length and slots, where a batch has fixed ones."""
        loaded = self.model.loaded
        return loaded.task.collator(self.model.module, loaded.reader, self.model.device)(batch, *shape)

    def _score(self, batch: Batch) -> Tensor:
        return self.model.loaded.task.scores(self.model.module, batch)

    def _score_above(self, reader: StateReader, batch: Batch) -> Tensor:
        with reader.lower.skipped(batch) as rest:
            return self._score(rest)

    def _chosen(self, buckets: Sequence[int] | None) -> list[tuple[int, list[int]]]:
        """Of the lengths that there are the shortest, the longest and one between, each with the records that have it."""
        lengths = self.lengths(buckets)
        there = sorted(set(lengths))
        places = np.unique(np.linspace(0, len(there) - 1, min(_LENGTHS, len(there))).round().astype(int))
        return [(there[place], [i for i, n in enumerate(lengths) if n == there[place]]) for place in places]

    def _filled(self, rows: Sequence[int], count: int) -> list[int]:
        """As many of the rows as a batch has; the same ones again where there are fewer."""
        chosen = [rows[i % len(rows)] for i in range(count)]
        self.timed.update(chosen)
        return chosen

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


@torch.no_grad()
def _draw_states(reader: StateReader, examples: Sequence[Example]) -> list[Tensor]:
    """Random hidden states for each example, in the form of real ones; they share their memory."""
    loaded = reader.model.loaded
    (real,) = replace(reader, slots=FEWEST_SLOTS).read(loaded.task.samples(loaded.reader)[:1])
    drawn = torch.randn(max(len(e["input_ids"]) for e in examples), real.shape[-1], generator=torch.Generator().manual_seed(0))
    return [drawn.to(real.dtype)[: len(example["input_ids"])] for example in examples]


def _plain_step(setting: TrainingSetup, optimizer: torch.optim.Optimizer, rows: Sequence[int]) -> None:
    """As without privacy."""
    optimizer.zero_grad()
    for _, batch in setting.batches(rows):
        (setting.loss(batch).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()

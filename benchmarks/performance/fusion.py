"""What does the server need to fuse N updates of a 22.7 M parameter model, in time and in memory?

All tensors of all-MiniLM-L6-v2 (91 MB in float32) from every organization, as when `train = "full"`. The updates come one after
the other, as over a network; what a rule keeps of them counts as its memory, the one that is arriving does not. cotune's
aggregator gets them as the round loop hands them over, with the checks that it makes (finite, norm, weight); Flower's FedAvg
gets the list that it wants; the bound is NumPy adding the same bytes to one running sum.

Rules that compare updates (median, TIES, Krum) keep them in a temporary file, of 4.5 GB for 50 updates: it lies where TMPDIR
says. Memory is told in multiples of the model, and time per million parameters and update.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Benchmark, Contender, Figure, Meter, Results, Row

COUNTS = (3, 10, 50)
HELD = ("median", "ties", "krum")
_LAYER = ((384, 384),) * 4 + ((384,),) * 4 + ((1536, 384), (1536,), (384, 1536), (384,)) + ((384,),) * 4
SHAPES = ((30522, 384), (512, 384), (2, 384), (384,), (384,), *_LAYER * 6, (3, 384), (3,))


def shapes_of(share: int) -> list[tuple[int, ...]]:
    """The model's tensors, each with a `share`-th of its first dimension."""
    return [(max(1, shape[0] // share), *shape[1:]) for shape in SHAPES]


def parameters_of(share: int) -> int:
    total = 0
    for shape in shapes_of(share):
        product = 1
        for side in shape:
            product *= side
        total += product
    return total


class Updates:
    """The updates of the organizations, cheap to make and different from each other.

    What they are made from, and the memory that they come in, stays until this object goes: it is measured with no contender.
    """

    def __init__(self, count: int, share: int, *, reuse: bool) -> None:
        """Make the first one.

        Args:
            count: How many there are.
            share: As of `shapes_of`.
            reuse: Whether all come in the same memory, for a rule that keeps none of them in memory; else each in its own.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        self._base = [torch.randn(shape, generator=generator) for shape in shapes_of(share)]
        self._memory = [torch.empty_like(tensor) for tensor in self._base] if reuse else [None] * len(self._base)
        self._count = count
        self.first = self._make(0)

    def _make(self, number: int) -> dict[str, Any]:
        import torch

        factor = torch.tensor(1 + number / 100)
        pairs = zip(self._base, self._memory, strict=True)
        return {f"p{i}": torch.mul(tensor, factor, out=out) for i, (tensor, out) in enumerate(pairs)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Hand each one over, the first one for the only time."""
        yield self.__dict__.pop("first")
        for number in range(1, self._count):
            yield self._make(number)


def cotune(meter: Meter, folder: Path, smoke: bool, fusion: str, count: int) -> None:
    """One round of a strategy's weighting and fusion, as the server runs it, with a folder for what is held."""
    from cotune.strategies.aggregator import build_aggregator
    from cotune.strategies.config import StrategyConfig
    from cotune.strategies.types import RoundContext, Update

    share = share_of(smoke)
    warm = build_aggregator(StrategyConfig(fusion=fusion), RoundContext())
    for number, delta in enumerate(Updates(5, 1000, reuse=False)):
        warm.add(Update(f"org-{number}", 1, delta, 100, 5))
    warm.result()
    source = Updates(count, share, reuse=fusion == "mean" or not smoke)  # small ones are kept as they are, in their memory
    state = {name: tensor.clone() for name, tensor in source.first.items()}
    with meter.measure(units=count * parameters_of(share) / 1e6, label=label(fusion, count)):
        aggregator = build_aggregator(StrategyConfig(fusion=fusion), RoundContext(state=state), folder)
        for number, delta in enumerate(source):
            aggregator.add(Update(f"org-{number}", 1, delta, 100, 5))
        aggregator.result()


def flower(meter: Meter, folder: Path, smoke: bool, count: int) -> None:
    """FedAvg's aggregation of messages, as `flwr.serverapp.strategy.FedAvg` makes it in every round."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    share = share_of(smoke)
    source = Updates(count, share, reuse=False)
    with meter.measure(units=count * parameters_of(share) / 1e6, label=label("mean", count)):
        contents = []
        for delta in source:
            arrays = ArrayRecord({name: _array(tensor) for name, tensor in delta.items()})
            contents.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 100})}))
        aggregate_arrayrecords(contents, "num-examples")


def _array(tensor: Any) -> Any:
    from flwr.app import Array

    return Array(tensor.numpy())


def numpy(meter: Meter, folder: Path, smoke: bool, count: int) -> None:
    """The least that a mean can do: one addition for every number."""
    share = share_of(smoke)
    source = Updates(count, share, reuse=True)
    with meter.measure(units=count * parameters_of(share) / 1e6, label=label("mean", count)):
        total: dict[str, Any] = {}
        for delta in source:
            for name, tensor in delta.items():
                if name in total:
                    total[name] += tensor.numpy()
                else:
                    total[name] = tensor.numpy().copy()
        for array in total.values():
            array /= count


def share_of(smoke: bool) -> int:
    return 400 if smoke else 1


def label(fusion: str, count: int) -> str:
    return f"{fusion} {count}"


def all_counts(body: Any) -> Any:
    """A contender that does `body` for every number of updates, each after the memory of the one before is gone."""

    def run(meter: Meter, folder: Path, smoke: bool) -> None:
        import gc

        for count in COUNTS if not smoke else (5,):
            body(meter, folder, smoke, count)
            gc.collect()

    return run


def held(fusion: str) -> Any:
    return all_counts(lambda meter, folder, smoke, count: cotune(meter, folder, smoke, fusion, max(count, fewest(fusion))))


def fewest(fusion: str) -> int:
    return 5 if fusion == "krum" else 3


def rows(results: Results) -> list[Row]:
    found = []
    for count in COUNTS:
        memory, time = _figures(label("mean", count))
        what = f"mean of {count} updates"
        found += [
            results.row(f"{what}, memory", "cotune", memory, against="Flower FedAvg", goal="≤ 2.5 × the model",
                        reached=lambda size, _: size <= 2.5),
            results.row(f"{what}, memory", "Flower FedAvg", memory),
            results.row(f"{what}, time", "cotune", time, against="NumPy add", goal="≤ 2 × the bound",
                        reached=lambda _, ratio: ratio <= 2),
            results.row(f"{what}, time", "Flower FedAvg", time, against="NumPy add"),
            results.row(f"{what}, time", "NumPy add", time),
        ]  # fmt: skip
    for fusion in HELD:
        for count in (fewest(fusion), *COUNTS[1:]):
            memory, time = _figures(label(fusion, count))
            what = f"{fusion} of {count} updates"
            bound = label("mean", count if count in COUNTS else COUNTS[0])
            found += [
                results.row(f"{what}, memory", f"cotune, {fusion}", memory, goal="≤ 2.5 × the model, whatever N",
                            reached=lambda size, _: size <= 2.5),
                results.row(f"{what}, time", f"cotune, {fusion}", time, against="NumPy add", against_label=bound),
            ]  # fmt: skip
    return found


def _figures(key: str) -> tuple[Figure, Figure]:
    """Memory and time."""
    memory = Figure("peak", "× model", 1 / (parameters_of(1) * 4), key)
    return memory, Figure("cpu", "ms CPU per update and 1 M parameters", 1000.0, key)


BENCHMARK = Benchmark(
    name="fusion",
    number=4,
    title="Server: fusing updates of 22.7 M parameters",
    contenders=(
        Contender("NumPy add", all_counts(numpy)),
        Contender("Flower FedAvg", all_counts(flower)),
        Contender("cotune", all_counts(lambda meter, folder, smoke, count: cotune(meter, folder, smoke, "mean", count))),
        *(Contender(f"cotune, {fusion}", held(fusion), repeats=1) for fusion in HELD),
    ),
    rows=rows,
    repeats=2,
)

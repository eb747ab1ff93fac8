"""How does the cost of a simulation grow with its clients, its parameters and its rounds?

cotune against itself: the work of a run should grow no faster than linearly with its clients, with the parameters that are
trained and with its rounds; its memory no faster than the clients and the parameters, and not with the rounds. Softmax regression
as in the benchmark `simulation`, in a short form: 10 to 10,000 clients of 20 records, of which 10 are asked in every round; 10⁵
to 10⁸ parameters, with two clients; up to 1,000 rounds, with two clients.

The picture shows whole runs, from the start to the end of the last round: CPU seconds of one thread, and peak resident memory
above the level before the run. Its axes are logarithmic, so that the slope of a line is the exponent of growth: 1 is linear.
Fixed costs flatten a line where runs are small; so goals are for the last step, where they count least.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import inputs
import psutil
from harness import Benchmark, Contender, Curve, Figure, Meter, Results, Row, peak_memory
from simulation import rounds_measured

CLIENTS = (10, 100, 1000, 10_000)
WIDTH = 2000  # of a feature, where the parameters grow
CLASSES = (50, 500, 5000, 50_000)  # as many times the width are the parameters
ROUNDS = {None: 1000, 8.0: 100}  # ε -> how many are played
MARKS = (10, 32, 100, 316, 1000)  # rounds after which the cost of the run so far is noted
LINEAR = 1.1  # most that the slope of the last step may be
FLAT = 0.1  # the same, of what should not grow
COPIES = 25  # times the model's bytes that must be free in memory before a run; it takes about 15


def run(meter: Meter, folder: Path, plan: dict[str, Any], label: str, clients: int, marks: Sequence[int] = ()) -> None:
    """One simulation, its rounds measured, and all of it; after the rounds in `marks`, what it has taken so far."""
    from cotune import load_plan, simulate

    with tempfile.TemporaryDirectory(dir=folder) as out:
        tables = {"train": "head", "keep_checkpoints": 1, "privacy": "none", "personalize": {"methods": []}, **plan}
        file = inputs.write_plan(Path(out) / "plan.toml", **tables)
        began = len(meter.samples)
        with meter.measure(label="whole"), _marked(meter, marks), rounds_measured(meter, clients):
            simulate(load_plan(file), Path(out) / "run", device="cpu")
        for number, sample in enumerate(meter.samples[began:], began):
            meter.samples[number] = sample.with_label(label if sample.label == "" else f"{label}, {sample.label}")


@contextmanager
def _marked(meter: Meter, marks: Sequence[int]) -> Iterator[None]:
    """Add a sample after some rounds: what the run has taken since the beginning of the block."""
    from cotune.server.runs.events import observe_run

    cpu = time.process_time()
    level = peak_memory()

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished" and fields["round"] in marks:
            memory = max(0.0, peak_memory() - level)
            meter.add(cpu=time.process_time() - cpu, label="so far", rounds=fields["round"], memory=memory)

    with observe_run(listener):
        yield


def model(base: Path) -> dict[str, Any]:
    return {"base": str(base), "max_length": 16, "pooling": "mean"}


def simulated(count: int) -> dict[str, Any]:
    return {"clients": count, "partition": "iid", "min_examples": 10, "baselines": []}


def clients(meter: Meter, folder: Path, smoke: bool, count: int) -> None:
    """10 clients a round out of `count`, 20 records each."""
    count = min(count, 20) if smoke else count
    records = count * 20 + 200
    plan = {
        "rounds": 4 if smoke else 12,
        "test_fraction": 200 / records,
        "model": model(inputs.write_encoder(folder / f"base-{count}", 128)),
        "data": {"source": str(inputs.write_records(folder / f"records-{count}.csv", records))},
        "local": {"learning_rate": 0.1, "batch_size": 0.5, "steps": 5},
        "server": {"sample_size": 10},
        "simulation": simulated(count),
    }
    run(meter, folder, plan, "clients", 10)


def parameters(meter: Meter, folder: Path, smoke: bool, classes: int) -> None:
    """Two clients of 40 records; of most of the classes there is no record."""
    width = WIDTH // 100 if smoke else WIDTH
    if psutil.virtual_memory().available < COPIES * 4 * width * classes:
        raise RuntimeError(f"needs {COPIES * 4e-9 * width * classes:.0f} GB of free memory")
    plan = {
        "rounds": 3,
        "test_fraction": 0.2,
        "labels": [f"c{number}" for number in range(classes)],
        "model": model(inputs.write_encoder(folder / f"wide-{classes}", width)),
        "data": {"source": str(inputs.write_records(folder / f"few-{classes}.csv", 100, 50))},
        "local": {"learning_rate": 0.1, "batch_size": 10, "steps": 2},
        "simulation": simulated(2),
    }
    run(meter, folder, plan, "parameters", 2)


def rounds(meter: Meter, folder: Path, smoke: bool, epsilon: float | None) -> None:
    """The same round again and again: the cost of the run after some rounds, and samples of the first fifth and the last."""
    plan = {
        "rounds": 32 if smoke else ROUNDS[epsilon],
        "test_fraction": 0.25,
        "privacy": "none" if epsilon is None else {"epsilon": epsilon},
        "model": model(inputs.write_encoder(folder / f"small-{epsilon}", 784)),
        "data": {"source": str(inputs.write_records(folder / "many.csv", 400))},
        "local": {"learning_rate": 0.1, "batch_size": 0.2, "steps": 5},
        "simulation": simulated(2),
    }
    run(meter, folder, plan, "rounds", 2, MARKS)
    found = [sample for sample in meter.samples if sample.label == "rounds"]
    meter.samples = [sample for sample in meter.samples if sample.label != "rounds"]
    part = max(1, len(found) // 5)
    meter.samples += [sample.with_label("early") for sample in found[:part]]
    meter.samples += [sample.with_label("late") for sample in found[-part:]]


def name_clients(count: int) -> str:
    """A contender's name."""
    return f"{count:,} clients"


def name_parameters(classes: int) -> str:
    """A contender's name."""
    return f"{classes * WIDTH:,} parameters"


def name_rounds(epsilon: float | None) -> str:
    """A contender's name."""
    return "no privacy" if epsilon is None else f"ε = {epsilon:g}"


def curves(results: Results) -> list[Curve]:
    """CPU and memory of whole runs against what grows."""
    found = []
    for what, unit, scale in (("CPU", "s", 1.0), ("peak memory", "MB", 1e-6)):
        sizes = {name_clients(count): float(count) for count in CLIENTS}
        found.append(Curve(what, unit, "clients", "", _whole(results, what, scale, sizes, "clients")))
        sizes = {name_parameters(classes): float(classes * WIDTH) for classes in CLASSES}
        found.append(Curve(what, unit, "parameters", "", _whole(results, what, scale, sizes, "parameters")))
        for epsilon in ROUNDS:
            found.append(Curve(what, unit, "rounds", name_rounds(epsilon), _so_far(results, what, scale, name_rounds(epsilon))))
    return [curve for curve in found if curve.points]


def _whole(results: Results, what: str, scale: float, sizes: dict[str, float], label: str) -> tuple[tuple[float, float], ...]:
    values = {name: results.median(name, "cpu" if what == "CPU" else "peak", f"{label}, whole") for name in sizes}
    return tuple((sizes[name], scale * value) for name, value in values.items() if value)


def _so_far(results: Results, what: str, scale: float, contender: str) -> tuple[tuple[float, float], ...]:
    samples = [each for each in results.samples.get(contender, []) if each.label == "rounds, so far"]
    values = [(each.other["rounds"], scale * (each.cpu if what == "CPU" else each.other["memory"])) for each in samples]
    return tuple((x, value) for x, value in values if value)


def rows(results: Results) -> list[Row]:
    return [*_rows_of_slopes(results), *_rows_of_clients(results), *_rows_of_parameters(results), *_rows_of_rounds(results)]


def _rows_of_slopes(results: Results) -> list[Row]:
    found = []
    for curve in curves(results):
        if len(curve.points) < 2:
            continue
        most = FLAT if (curve.what, curve.against) == ("peak memory", "rounds") else LINEAR
        reached = curve.last_slope <= most
        sizes = f"{curve.points[0][0]:,.0f} to {curve.points[-1][0]:,.0f} {curve.against}"
        name = f"{sizes}, {curve.series}" if curve.series else sizes
        note = f"of a line through all; of the last step {curve.last_slope:.2f}"
        goal = f"of the last step ≤ {most:g}"
        found.append(Row(f"{curve.what} of a run: slope", name, curve.slope, "", goal=goal, reached=reached, note=note))
    return found


def _rows_of_clients(results: Results) -> list[Row]:
    found = []
    few = name_clients(CLIENTS[0])
    for number, count in enumerate(CLIENTS):
        name = name_clients(count)
        flat = "" if not number else f"≤ 1.3 × that of {CLIENTS[0]}"
        against = few if number else ""
        reached = partial(_at_most, 1.3) if number else None
        client = Figure("cpu", "ms CPU", 1000.0, "clients")
        found.append(results.row("a client in a round", name, client, against=against, goal=flat, reached=reached))
        for what, key, unit, scale in (("CPU of the run", "cpu", "ms", 1e3), ("peak memory of the run", "peak", "kB", 1e-3)):
            whole = Figure(key, f"{unit} per client", scale / count, "clients, whole")
            found.append(results.row(what, name, whole))
    return found


def _rows_of_parameters(results: Results) -> list[Row]:
    found = []
    for before, classes in zip((None, *CLASSES), CLASSES, strict=False):
        name = name_parameters(classes)
        against = "" if before is None else name_parameters(before)
        most = 1.3 * classes / (before or classes)
        goal = f"at most linear (≤ {most:g} ×)" if before else ""
        reached = partial(_at_most, most) if before else None
        whole = Figure("cpu", "s CPU", 1.0, "parameters, whole")
        times = Figure("peak", "× the model", 1 / (4 * classes * WIDTH), "parameters, whole")
        found.append(results.row("CPU of the run", name, whole, against=against, goal=goal, reached=reached))
        found.append(results.row("peak memory of the run", name, times))
    return found


def _rows_of_rounds(results: Results) -> list[Row]:
    found = []
    for epsilon, count in ROUNDS.items():
        name = name_rounds(epsilon)
        what = f"a client in the last fifth of {count:,} rounds"
        late = Figure("cpu", "ms CPU", 1000.0, "late")
        goal = "≤ 1.2 × the first fifth"
        reached = partial(_at_most, 1.2)
        found.append(results.row(what, name, late, against=name, against_label="early", goal=goal, reached=reached))
    return found


def _at_most(most: float, _: float, ratio: float) -> bool:
    return ratio <= most


BENCHMARK = Benchmark(
    name="growth",
    number=9,
    title="Growth with clients, parameters and rounds",
    contenders=(
        *(Contender(name_clients(count), partial(clients, count=count), in_smoke=count == CLIENTS[0]) for count in CLIENTS),
        *(
            Contender(name_parameters(classes), partial(parameters, classes=classes), in_smoke=classes <= CLASSES[1])
            for classes in CLASSES
        ),
        *(Contender(name_rounds(epsilon), partial(rounds, epsilon=epsilon), in_smoke=epsilon is not None) for epsilon in ROUNDS),
    ),
    rows=rows,
    curves=curves,
    repeats=1,
)

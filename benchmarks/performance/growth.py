"""How does the cost of a simulation grow with its clients, its parameters and its rounds?

cotune against itself: the cost of one client in one round should not depend on how many clients there are beside it, nor on how
many rounds came before; and it should grow as the parameters do. Softmax regression as in the benchmark `simulation`, in a
short form: 10 to 1,000 clients of which 10 are asked in every round, 10⁵ and 10⁶ parameters, 100 rounds.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import inputs
from harness import Benchmark, Contender, Figure, Meter, Results, Row
from simulation import rounds_measured

CLIENTS = (10, 100, 1000)
WIDTH = 2000  # of a feature
CLASSES = (50, 500)  # as many times the width are the parameters
ROUNDS = 100


def run(meter: Meter, folder: Path, plan: dict[str, Any], base: Path, source: Path, label: str, clients: int) -> None:
    """One simulation, its rounds measured."""
    from cotune import load_plan, simulate

    with tempfile.TemporaryDirectory(dir=folder) as out:
        tables = {
            "train": "head",
            "keep_checkpoints": 1,
            "privacy": "none",
            "personalize": {"methods": []},
            "model": {"base": str(base), "max_length": 16, "pooling": "mean"},
            "data": {"source": str(source)},
            **plan,
        }
        file = inputs.write_plan(Path(out) / "plan.toml", **tables)
        began = len(meter.samples)
        with meter.measure(label=f"{label}, whole"), rounds_measured(meter, clients):
            simulate(load_plan(file), Path(out) / "run", device="cpu")
        found = meter.samples[began:]
        del meter.samples[began:]
        for sample in found:
            if sample.label == "":
                meter.add(cpu=sample.cpu, wall=sample.wall, units=sample.units, label=label)
            elif sample.label == "start":
                meter.add(cpu=sample.cpu, wall=sample.wall, units=plan["simulation"]["clients"], label=f"{label}, start")
            else:
                meter.add(label=sample.label, memory=sample.peak / plan["simulation"]["clients"])


def clients(meter: Meter, folder: Path, smoke: bool, count: int) -> None:
    """10 clients a round out of `count`, 60 records each."""
    count = min(count, 20) if smoke else count
    base = inputs.write_encoder(folder / f"base-{count}", 784)
    source = inputs.write_records(folder / f"records-{count}.csv", count * 60 + 200)
    plan = {
        "rounds": 4 if smoke else 12,
        "test_fraction": 200 / (count * 60 + 200),
        "local": {"learning_rate": 0.1, "batch_size": 0.2, "steps": 5},
        "server": {"sample_size": 10},
        "simulation": {"clients": count, "partition": "iid", "min_examples": 10, "baselines": []},
    }
    run(meter, folder, plan, base, source, "clients", 10)


def parameters(meter: Meter, folder: Path, smoke: bool, classes: int) -> None:
    """Two clients of 750 records with ever more classes."""
    base = inputs.write_encoder(folder / f"wide-{classes}", WIDTH // 100 if smoke else WIDTH)
    source = inputs.write_records(folder / f"few-{classes}.csv", 2000, classes)
    plan = {
        "rounds": 4 if smoke else 8,
        "test_fraction": 0.25,
        "local": {"learning_rate": 0.1, "batch_size": 12, "steps": 5},
        "simulation": {"clients": 2, "partition": "iid", "min_examples": 10, "baselines": []},
    }
    run(meter, folder, plan, base, source, "parameters", 2)


def rounds(meter: Meter, folder: Path, smoke: bool, epsilon: float | None) -> None:
    """The same round again and again: samples in their order, the first fifth and the last."""
    base = inputs.write_encoder(folder / f"small-{epsilon}", 784)
    source = inputs.write_records(folder / "many.csv", 400)
    plan = {
        "rounds": 7 if smoke else ROUNDS,
        "test_fraction": 0.25,
        "privacy": "none" if epsilon is None else {"epsilon": epsilon},
        "local": {"learning_rate": 0.1, "batch_size": 0.2, "steps": 5},
        "simulation": {"clients": 2, "partition": "iid", "min_examples": 10, "baselines": []},
    }
    began = len(meter.samples)
    run(meter, folder, plan, base, source, "rounds", 2)
    found = [sample for sample in meter.samples[began:] if sample.label == "rounds"]
    del meter.samples[began:]
    part = max(1, len(found) // 5)
    for label, chosen in (("early", found[:part]), ("late", found[-part:])):
        for sample in chosen:
            meter.add(cpu=sample.cpu, wall=sample.wall, units=sample.units, label=label)


def rows(results: Results) -> list[Row]:
    found = []
    few = f"{CLIENTS[0]} clients"
    for number, count in enumerate(CLIENTS):
        name = f"{count} clients"
        flat = "" if not number else f"≤ 1.3 × that of {CLIENTS[0]}"
        reached = (lambda _, ratio: ratio <= 1.3) if number else None
        against = few if number else ""
        client = Figure("cpu", "ms CPU", 1000.0, "clients")
        start = Figure("cpu", "ms CPU per client", 1000.0, "clients, start")
        memory = Figure("memory", "kB per client", 1e-3, "clients, whole")
        found += [
            results.row("a client in a round", name, client, against=against, goal=flat, reached=reached),
            results.row("from start to the first round", name, start, against=against),
            results.row("peak memory of the run", name, memory, against=against),
        ]
    small, large = (f"{classes * WIDTH:,} parameters" for classes in CLASSES)
    wide = Figure("cpu", "ms CPU", 1000.0, "parameters")
    most = CLASSES[1] / CLASSES[0] * 1.3
    found.append(results.row("a client in a round", small, wide))
    goal = f"at most linear (≤ {most:g} ×)"
    found.append(results.row("a client in a round", large, wide, against=small, goal=goal, reached=lambda _, x: x <= most))
    for name in ("no privacy", "ε = 8"):
        what = f"a client in the last fifth of {ROUNDS} rounds"
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
        *(Contender(f"{count} clients", partial(clients, count=count), in_smoke=count == CLIENTS[0]) for count in CLIENTS),
        *(
            Contender(f"{classes * WIDTH:,} parameters", partial(parameters, classes=classes), in_smoke=classes == CLASSES[0])
            for classes in CLASSES
        ),
        Contender("no privacy", partial(rounds, epsilon=None), in_smoke=False),
        Contender("ε = 8", partial(rounds, epsilon=8.0)),
    ),
    rows=rows,
    repeats=1,
)

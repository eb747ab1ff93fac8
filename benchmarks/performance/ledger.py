"""What does it cost to charge a round to the privacy ledger, as its log grows?

A charge is what every private round of an organization makes before it trains and after: the reservation of the worst case,
checked against the limit of the plan, and the settlement to the steps that ran, both durable when the calls return. Logs of 10
to 100,000 entries are written beforehand, as a ledger would after years of rounds; the cost at 1,000,000 entries is
extrapolated from the last two, and marked as such. The goal is that the cost does not depend on the length of the log.

How many transactions a private client-round takes is counted in a simulation with two organizations, by looking at the log's
own function that opens one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import inputs
from harness import Benchmark, Contender, Figure, Meter, Results, Row

LENGTHS = (10, 1_000, 10_000, 100_000)
CHARGES = 5
ROUNDS = 4


def charges(meter: Meter, folder: Path, smoke: bool) -> None:
    """Reservations and settlements on logs of different lengths, each length in turn."""
    from cotune import Ledger
    from cotune.privacy.accounting.composition import Steps
    from cotune.privacy.ledger.charges import Limit

    for length in LENGTHS[: 2 if smoke else None]:
        with tempfile.TemporaryDirectory(dir=folder) as site:
            file = Path(site) / "ledger.db"
            Ledger(file)
            _lengthen(file, length)
            ledger = Ledger(file)
            limits = [Limit("privacy.epsilon", 8.0, 1e-5, "plan-now")]
            for number in range(2 if smoke or length > 50_000 else CHARGES):
                began = len(meter.samples)
                with meter.measure(label=str(length)):
                    charge = ledger.reserve("plan-now", number + 1, Steps(20.0, 0.01, 5), data="", limits=limits)
                    ledger.settle(charge, 5, 0.1)
                if not number:
                    del meter.samples[began:]  # the accountant is imported, and computes what it keeps


def _lengthen(file: Path, entries: int) -> None:
    """Add reservations and settlements of other plans in one transaction."""
    from cotune.storage.database_log import DatabaseLog

    with DatabaseLog(file).transaction() as log:
        for number in range(entries // 2):
            body = {"plan_id": f"plan-{number // 100}", "plan": "", "round": number % 100 + 1, "data": "", "purpose": "training"}
            steps = {"noise_multiplier": 20.0, "sample_rate": 0.01, "count": 5, "mechanism": "gaussian"}
            charge = log.append("reserve", {**body, **steps, "collection": "", "limits": []})
            log.append("settle", {"charge": charge.id, "steps": 5, "seconds": 0.1})


def transactions(meter: Meter, folder: Path, smoke: bool) -> None:
    """Transactions of the ledgers in the rounds of a simulation, per client and round."""
    from cotune import load_plan, simulate
    from cotune.server.runs.events import observe_run

    counted: dict[str, int] = {"all": 0, "writing": 0}
    marks: list[tuple[int, int]] = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "round_finished":
            marks.append((counted["all"], counted["writing"]))

    with tempfile.TemporaryDirectory(dir=folder) as out, _counting(counted), observe_run(listener):
        simulate(load_plan(folder / "plan.toml"), Path(out) / "run", device="cpu")
    rounds = len(marks) - 1  # the first is left out: a data set is entered in it
    every = (marks[-1][0] - marks[0][0]) / rounds / 2
    writing = (marks[-1][1] - marks[0][1]) / rounds / 2
    meter.add(transactions=every, writing=writing)


@contextmanager
def _counting(counted: dict[str, int]) -> Iterator[None]:
    """Count transactions inside the block, and those that append."""
    from cotune.storage.shared_log import SharedLog

    original = SharedLog.transaction

    @contextmanager
    def transaction(self: Any) -> Iterator[Any]:
        with original(self) as log:
            before = log.count
            yield log
            counted["writing"] += log.count != before
        counted["all"] += 1

    SharedLog.transaction = transaction  # type: ignore[method-assign]
    try:
        yield
    finally:
        SharedLog.transaction = original  # type: ignore[method-assign]
    if not counted["writing"]:
        raise RuntimeError("no charge was seen in the log of a simulation: expected some; it is kept elsewhere now")


def floor(meter: Meter, folder: Path, smoke: bool) -> None:
    """Two durable transactions of bare SQLite on an open connection: what a charge cannot be cheaper than with this store."""
    import sqlite3

    with tempfile.TemporaryDirectory(dir=folder) as site:
        db = sqlite3.connect(Path(site) / "floor.db", isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, body TEXT)")
        for _ in range(1 if smoke else CHARGES * 3):
            with meter.measure():
                for _ in range(2):
                    db.execute("BEGIN IMMEDIATE")
                    db.execute("INSERT INTO entries (body) VALUES (?)", (f"{time.time()} " * 20,))
                    db.execute("COMMIT")
        db.close()


def setup(folder: Path, smoke: bool) -> None:
    base = inputs.write_encoder(folder / "base", 16)
    source = inputs.write_records(folder / "records.csv", 400)
    inputs.write_plan(
        folder / "plan.toml",
        rounds=2 if smoke else ROUNDS,
        privacy={"epsilon": 8.0},
        model={"base": str(base), "max_length": 16, "pooling": "mean"},
        data={"source": str(source)},
        local={"batch_size": 0.2, "steps": 2},
        personalize={"methods": []},
        simulation={"clients": 2, "partition": "iid", "baselines": []},
    )


def rows(results: Results) -> list[Row]:
    found = [results.row("two durable transactions", "bare SQLite", Figure(label=""))]
    short = results.median("cotune", label=str(LENGTHS[0]))
    for length in LENGTHS:
        what = f"a charge, log of {length:,} entries"
        goal = "" if length == LENGTHS[0] else f"≤ 1.5 × that of {LENGTHS[0]} entries"
        reached = (lambda ms, _: ms <= 1500 * (short or 0.0)) if goal else None
        figure = Figure(label=str(length))
        found.append(results.row(what, "cotune", figure, against="bare SQLite", against_label="", goal=goal, reached=reached))
    before, last = (results.median("cotune", label=str(length)) for length in LENGTHS[-2:])
    if before is not None and last is not None:
        seconds = last + (last - before) / (LENGTHS[-1] - LENGTHS[-2]) * (1_000_000 - LENGTHS[-1])
        note = "extrapolated, not measured"
        found.append(Row("a charge, log of 1,000,000 entries", "cotune", 1000 * seconds, "ms CPU", note=note))
    every, writing = (Figure(name, "", 1.0) for name in ("transactions", "writing"))
    what = "transactions of a private client-round"
    found.append(results.row(what, "cotune, simulated", every, goal="≤ 2", reached=lambda n, _: n <= 2))
    return [*found, results.row("of them with an entry", "cotune, simulated", writing)]


BENCHMARK = Benchmark(
    name="ledger",
    number=5,
    title="Ledger: what a charge costs",
    contenders=(
        Contender("bare SQLite", floor, repeats=2),
        Contender("cotune", charges, repeats=2),
        Contender("cotune, simulated", transactions, repeats=1),
    ),
    rows=rows,
    setup=setup,
)

"""How long is a round that trains next to nothing, with real processes, TLS and keys? TrainerProcess nodes beside Flower's own.

    python benchmarks/round_trip.py [--organizations 3] [--rounds 10] [--stock]

Prints the seconds of each round, and the median without the first, in which models are loaded.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from cotune.simulations.comparison.workers import import_all

import_all([str(Path(__file__).resolve().parents[1] / "tests" / "support" / "loopback.py")])
from loopback import federation, prepare_run, until  # noqa: E402


def measure(folder: Path, organizations: int, rounds: int, stock: bool) -> list[float]:
    run = prepare_run(folder / "run", organizations, rounds)
    with federation(folder / "loopback", organizations) as made:
        start = made.start_stock_node if stock else made.start_node
        for i, participant in enumerate(run.file.participants):
            start(i, run.path / participant.site)
        until(lambda: made.online() == organizations)
        made.submit(run.path)
        until(lambda: run.finished, 60.0 * rounds)
    return [float(entry["seconds"]) for entry in run.load().history]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--organizations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stock", action="store_true", help="Flower's own nodes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), given.organizations, given.rounds, given.stock)
    print(
        "stock" if given.stock else "resident",
        *(f"{s:.2f}" for s in seconds),
        f"median {statistics.median(seconds[1:]):.2f} s",
        sep="  ",
    )

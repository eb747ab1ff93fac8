"""What processes of their own do with a ledger; forked from the server of tests/support/processes.py, which finds them by name."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from cotune.errors import PolicyError
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.ledger.ledger import Ledger


def reserve_and_wait(path: Path, told: Connection, steps: Steps) -> None:
    """Reserve steps for the second round, tell the number of the charge, and wait to be killed."""
    told.send(Ledger(path).reserve("plan", 2, steps))
    while True:
        time.sleep(60)


def reserve_and_settle(path: Path, start: Barrier, plan: str, steps: Steps, settled: list[int]) -> None:
    """Once all are ready, reserve steps for a round for each of these numbers, and settle them to it."""
    ledger = Ledger(path)
    start.wait()
    for number, count in enumerate(settled):
        ledger.settle(ledger.reserve(plan, number, steps), count)


def reserve_to_the_limit(path: Path, start: Barrier, plan: str, steps: Steps, limit: Limit) -> None:
    """Once all are ready, reserve steps for one round after the other, until the ledger declines."""
    ledger = Ledger(path)
    start.wait()
    number = 0
    while True:
        try:
            ledger.reserve(plan, number, steps, limits=[limit])
        except PolicyError:
            return
        number += 1

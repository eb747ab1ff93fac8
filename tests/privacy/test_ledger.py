from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cotune.models.errors import PrivacyError
from cotune.privacy.accounting import Steps, epsilon
from cotune.privacy.ledger import Ledger

ROUND = Steps(1.0, 0.05, 20)
PROCESS = """
import sys
from pathlib import Path
from cotune.privacy.accounting import Steps
from cotune.privacy.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "ledger.sqlite")


def start(ledger: Ledger, code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process with the ledger open, which waits for a line before it runs `code`."""
    command = [sys.executable, "-c", PROCESS + code, str(ledger.path), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "open\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    assert ledger.spent() == []
    assert ledger.rounds("plan") == []


def test_a_reservation_counts_at_once_and_settles_to_what_ran(ledger: Ledger) -> None:
    charge = ledger.reserve("plan", 1, ROUND)
    assert Ledger(ledger.path).spent() == [ROUND]
    ledger.settle(charge, 12)
    assert Ledger(ledger.path).spent() == [Steps(1.0, 0.05, 12)]


def test_charges_of_all_plans_add_up(ledger: Ledger) -> None:
    for number, (plan, steps) in enumerate([("a", ROUND), ("b", Steps(2.0, 1.0, 3)), ("a", ROUND)], start=1):
        ledger.settle(ledger.reserve(plan, number, steps), steps.count)
    assert ledger.spent() == [ROUND, Steps(2.0, 1.0, 3), ROUND]
    assert ledger.spent("a") == [ROUND, ROUND]
    assert ledger.rounds("a") == [1, 3]
    assert epsilon(ledger.spent("a"), 1e-5) == epsilon([Steps(1.0, 0.05, 40)], 1e-5)


def test_values_come_back_exactly(ledger: Ledger) -> None:
    steps = Steps(0.1 + 0.2, 1 / 3, 7)
    ledger.reserve("plan", 1, steps)
    assert ledger.spent() == [steps]


@pytest.mark.parametrize("steps_run", [21, -1])
def test_a_settlement_outside_the_reservation_is_refused(ledger: Ledger, steps_run: int) -> None:
    charge = ledger.reserve("plan", 1, ROUND)
    with pytest.raises(PrivacyError, match=f"charge {charge} cannot be settled to {steps_run} steps"):
        ledger.settle(charge, steps_run)
    assert ledger.spent() == [ROUND]
    ledger.settle(charge, 20)  # the reservation is still open


def test_a_charge_is_settled_once(ledger: Ledger) -> None:
    charge = ledger.reserve("plan", 1, ROUND)
    ledger.settle(charge, 20)
    with pytest.raises(PrivacyError, match="cannot be settled"):
        ledger.settle(charge, 0)
    with pytest.raises(PrivacyError, match="cannot be settled"):
        ledger.settle(charge + 1, 0)
    assert ledger.spent() == [ROUND]


@pytest.mark.parametrize("steps", [Steps(0.0, 0.1, 5), Steps(1.0, 0.0, 5), Steps(1.0, 1.5, 5), Steps(1.0, 0.1, -5)])
def test_impossible_charges_are_refused(ledger: Ledger, steps: Steps) -> None:
    with pytest.raises((PrivacyError, sqlite3.IntegrityError)):
        ledger.reserve("plan", 1, steps)
    assert ledger.spent() == []


def assert_one_sentence(error: PrivacyError) -> None:
    assert "privacy ledger" in str(error)
    assert "expected" in str(error)
    assert "\n" not in str(error)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"these are no charges" * 100)
    with pytest.raises(PrivacyError) as raised:
        Ledger(path)
    assert_one_sentence(raised.value)
    assert path.read_bytes() == b"these are no charges" * 100  # left for whoever mends it


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError) as raised:
        Ledger(tmp_path)
    assert_one_sentence(raised.value)


def test_a_truncated_ledger_is_refused(ledger: Ledger) -> None:
    for number in range(100):
        ledger.reserve("plan" * 50, number, ROUND)
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content[: len(content) // 2 // 4096 * 4096])
    with pytest.raises(PrivacyError) as raised:
        Ledger(ledger.path).spent()
    assert_one_sentence(raised.value)


def test_a_ledger_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE charges (amount REAL)")
    with pytest.raises(PrivacyError) as raised:
        Ledger(path).reserve("plan", 1, ROUND)
    assert_one_sentence(raised.value)


def test_a_killed_process_leaves_its_reservation(ledger: Ledger) -> None:
    ledger.settle(ledger.reserve("plan", 1, ROUND), 20)
    code = "charge = ledger.reserve('plan', 2, Steps(1.0, 0.05, 20)); print(charge, flush=True)\nsys.stdin.read()"
    with start(ledger, code) as process:
        go(process)
        assert process.stdout
        charge = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert Ledger(ledger.path).spent() == [ROUND, ROUND]
    assert Ledger(ledger.path).rounds("plan") == [1, 2]
    Ledger(ledger.path).settle(charge, 20)  # the file is not locked by the dead


def test_processes_that_reserve_together_lose_nothing(ledger: Ledger) -> None:
    code = "for n in range(40): ledger.settle(ledger.reserve(sys.argv[2], n, Steps(1.0, 0.1, 9)), 5 if n % 2 else 9)"
    with start(ledger, code, "a") as first, start(ledger, code, "b") as second:
        go(first)
        go(second)
    assert (first.returncode, second.returncode) == (0, 0)
    for name in ("a", "b"):
        assert ledger.spent(name) == [Steps(1.0, 0.1, 9), Steps(1.0, 0.1, 5)] * 20
        assert ledger.rounds(name) == list(range(40))
    assert len(ledger.spent()) == 80

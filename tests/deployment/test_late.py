"""An update that comes after its round, between real processes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.support.deployment import deployment

pytestmark = pytest.mark.long

FOLD = {"late": "fold", "max_staleness": 1, "quorum": 0.5, "deadline_seconds": 30.0}


def test_an_update_that_is_late_is_folded_into_the_next_round(tmp_path: Path) -> None:
    """north's training stands still until round 2 has begun; it sends its update of round 1 all the same, then that of round 2."""
    with deployment(tmp_path, "north", "south", plan={"rounds": 3, "privacy": "none", "server": FOLD}) as fed:
        fed.run("--set", "server.deadline_seconds=240")
        fed.finish()  # nobody has anything to import or to read any more, which takes longer than the deadline on a busy machine
        trainer = fed.find("trainer:north")
        trainer.send_signal(signal.SIGSTOP)
        fed.run()
        fed.wait(fed.reached("round_started", 2))
        time.sleep(1.0)
        trainer.send_signal(signal.SIGCONT)
        first, second, third = fed.finish().load().history
    assert [each["organization"] for each in first["dropped"]] == ["north"]
    assert second["late"] == [{"organization": "north", "round": 1}]
    assert second["participants"] == third["participants"] == ["north", "south"]
    assert [entry["quarantined"] for entry in (first, second, third)] == [[], [], []]

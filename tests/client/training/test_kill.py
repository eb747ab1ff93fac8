"""SIGKILL at any moment: what really ran is never more than what the ledger says, and no step runs that was not reserved before.

A client process plays the rounds of a plan against its site, and writes down every step that it takes, before it takes it, from
inside of the training loop. It is killed at chosen moments; afterwards its notes are compared with the ledger.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from cotune.client.site import Site
from cotune.plan.load import dump_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps, epsilon
from tests.support.noting_client import run_client
from tests.support.processes import forked

__all__ = ["forked"]  # fixtures

ROUNDS = 6
STEPS = 4
DELTA = 1e-3
pytestmark = pytest.mark.crash


def read(notes: Path) -> list[dict[str, Any]]:
    if not notes.exists():
        return []
    found = []
    for line in notes.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            assert line == notes.read_text().splitlines()[-1], "only a killed writer's last line may be cut short"
    return found


# one round has about 15 moments: its charge, its steps, its files; those of later rounds are in reach once it is finished
@pytest.mark.parametrize(
    "moments",
    [(3, 6, 9, 12), pytest.param((*range(1, 17), 20, 25), marks=(pytest.mark.long, pytest.mark.timeout(3600)))],
    ids=["few", "every one of a round"],
)
def test_no_step_runs_that_was_not_charged_before(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., Site],
    state_for: Callable[..., Any],
    forked: Callable[..., BaseProcess],
    tmp_path: Path,
    moments: Sequence[int],
) -> None:
    plan = make_plan(
        rounds=ROUNDS,
        train="lora",
        privacy={"epsilon": 4.0, "delta": DELTA},
        local={"steps": STEPS, "batch_size": 0.2, "learning_rate": 0.01},
    )
    site = make_site()
    state = tmp_path / "state.safetensors"
    notes = tmp_path / "notes.jsonl"
    document = tmp_path / "plan.toml"
    save_file(state_for(plan), state)
    document.write_text(dump_plan(plan))
    seed = 7
    for moment in moments:
        process = forked(run_client, site.folder, state, notes, document, seed, ROUNDS, moment)
        process.join(600)
        assert process.exitcode == -signal.SIGKILL, f"it ended with {process.exitcode} before moment {moment}"
        seed = max((note["seed"] for note in read(notes) if "seed" in note), default=seed)
    found = [note for note in read(notes) if "step" in note]
    charges = site.ledger().charges()
    assert found, "no step ran"
    # never a step without a reservation that was made before it, for its σ and q, and for at least as many steps
    assert all(note["covered"] for note in found)
    # the ledger is at least what ran
    ran = [Steps(note["sigma"], note["rate"], 1) for note in found]
    for plan_id in {c.plan_id for c in charges}:
        assert epsilon(site.ledger().spent(plan_id), DELTA) <= 4.0
    assert epsilon(site.ledger().spent(), DELTA) >= epsilon(ran, DELTA) > 0
    for charge in charges:
        taken = [note["step"] for note in found if note["charge"] == charge.id]
        assert charge.steps.count >= max(taken, default=0)
        if charge.state == "settled":
            assert charge.steps.count == max(taken, default=0) == len(taken)

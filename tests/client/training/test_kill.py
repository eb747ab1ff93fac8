"""SIGKILL at any moment: what really ran is never more than what the ledger says, and no step runs that was not reserved before.

A client process plays the rounds of a plan against its site, and writes down every step that it takes, before it takes it, from
inside of the training loop. It is killed at random moments; afterwards its notes are compared with the ledger.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from cotune.client.site import Site
from cotune.plan.load import dump_plan
from cotune.plan.schema import Plan
from cotune.privacy.accounting.composition import Steps, epsilon

ROUNDS = 10
KILLS = 20
DELTA = 1e-3
# Runs in a process of its own. The only thing that is replaced is the sampler's iterator, which every step starts with.
_CLIENT = """
import json, os, sys
os.environ.update({environ!r})
import torch
torch.set_num_threads(1)
import tomllib
from pathlib import Path
from safetensors.torch import load_file
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.client.training import round as training
from cotune.errors import PrivacyError
from cotune.plan.load import parse_plan
from cotune.privacy.mechanisms import dp_sgd
from tests.support.engines import engine

site, state = Site(Path({site!r})), load_file({state!r})
notes = open({notes!r}, "a")

def note(**fields):
    notes.write(json.dumps(fields) + "\\n")
    notes.flush()
    os.fsync(notes.fileno())

def steps(config, setup):
    reserved = [c for c in site.ledger().charges() if c.state == "reserved"]
    charge = reserved[-1] if reserved else None
    class Noting(dp_sgd.PoissonSampler):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__(), start=1):
                note(charge=charge and charge.id, covered=bool(charge) and charge.steps.count >= step
                     and (charge.steps.noise_multiplier, charge.steps.sample_rate)
                     == (config.noise_multiplier, self.sample_rate),
                     sigma=config.noise_multiplier, rate=self.sample_rate, step=step)
                yield batch
    dp_sgd.PoissonSampler, before = Noting, dp_sgd.PoissonSampler
    try:
        yield from dp_sgd.DPSGD(config).run(setup)
    finally:
        dp_sgd.PoissonSampler = before

training.DPSGD = engine(steps)
table = tomllib.loads(Path({plan!r}).read_text())
for seed in range({seed}, 1000):  # a run whose budget the crashes have used up is followed by another, on the same data
    plan = parse_plan(table | {{"seed": seed}})
    try:
        for round in range(1, {rounds} + 1):
            train_round(plan, site, round, state)
            note(finished=round, seed=seed)
    except PrivacyError as error:
        note(refused=str(error), seed=seed)
        continue
    break
note(over=True)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], BaseProcess]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "cotune.cli.main", "cotune.cli.progress", "cotune.simulations.run"])
    started: list[BaseProcess] = []

    def run(code: str) -> BaseProcess:
        process = context.Process(target=exec, args=(code, {"__name__": "client"}))
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


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


def test_twenty_kills(
    make_plan: Callable[..., Plan],
    make_site: Callable[..., Site],
    state_for: Callable[..., Any],
    start: Callable[[str], BaseProcess],
    tmp_path: Path,
) -> None:
    plan = make_plan(
        rounds=ROUNDS,
        train="lora",
        privacy={"epsilon": 4.0, "delta": DELTA},
        local={"steps": 5, "batch_size": 0.2, "learning_rate": 0.01},
    )
    site = make_site()
    state = tmp_path / "state.safetensors"
    notes = tmp_path / "notes.jsonl"
    document = tmp_path / "plan.toml"
    save_file(state_for(plan), state)
    document.write_text(dump_plan(plan))
    chosen = random.SystemRandom().randrange(2**32)  # other moments in every run of the test
    print(f"moments drawn from seed {chosen}")
    rng = random.Random(chosen)
    seed = 7
    kills = 0
    alive = 0
    while kills < KILLS:
        code = _CLIENT.format(
            environ={"PYTHONWARNINGS": "ignore"}, site=str(site.folder), state=str(state), notes=str(notes), plan=str(document),
            seed=seed, rounds=ROUNDS,
        )  # fmt: skip
        before = len(read(notes))
        process = start(code)
        deadline = time.monotonic() + 600
        killed_after = before + rng.randrange(12)  # steps and rounds, so that a slow machine is killed at the same moments
        while process.exitcode is None and len(read(notes)) < killed_after:
            assert time.monotonic() < deadline, "the client does nothing"
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        last = [note for note in read(notes) if "seed" in note]
        over = any("over" in note for note in read(notes)[before:])
        seed = (last[-1]["seed"] if last else seed) + (1 if over else 0)
        kills += 1
        alive += process.exitcode == -9
    found = [note for note in read(notes) if "step" in note]
    charges = site.ledger().charges()
    assert alive >= KILLS // 2, "the processes were mostly over before they could be killed"
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

"""A client that writes down every step of training before it takes it, and kills itself at a chosen moment."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def run_client(site: Path, state: Path, notes: Path, plan: Path, seed: int, rounds: int, dies_at: int) -> None:
    """Play the rounds of a plan at a site, from inside of a process of its own.

    A moment is one before or after anything that must last: a charge in the ledger, a step of training, a file in its place.

    Args:
        seed: Of the plan. A run whose budget the crashes have used up is followed by another, on the same data.
        dies_at: The number of the moment at which the process ends itself with SIGKILL, from 1.
    """
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import load_file

    from cotune.client.site import Site
    from cotune.client.training import charged_steps as training
    from cotune.client.training.round import train_round
    from cotune.errors import PrivacyError
    from cotune.plan.load import parse_plan
    from cotune.privacy.ledger.ledger import Ledger
    from cotune.privacy.mechanisms import dp_sgd
    from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig, DPSGDSetup, StepReport
    from tests.support.engines import engine, take_steps

    own = Site(site)
    start = load_file(state)
    moments = 0
    with notes.open("a", encoding="utf-8") as stream:

        def note(**fields: Any) -> None:
            stream.write(json.dumps(fields) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

        def moment() -> None:
            nonlocal moments
            moments += 1
            if moments == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def between(act: Callable[..., Any]) -> Callable[..., Any]:
            def acts(*arguments: Any, **settings: Any) -> Any:
                moment()
                result = act(*arguments, **settings)
                moment()
                return result

            return acts

        def steps(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
            reserved = [charge for charge in own.ledger().charges() if charge.state == "reserved"]
            charge = reserved[-1] if reserved else None

            class Noting(before):  # type: ignore[misc, valid-type]
                def __iter__(self) -> Iterator[Any]:
                    claimed = config.noise_multiplier, self.sample_rate
                    for step, batch in enumerate(super().__iter__(), start=1):
                        covered = (
                            charge is not None
                            and charge.steps.count >= step
                            and (charge.steps.noise_multiplier, charge.steps.sample_rate) == claimed
                        )
                        note(charge=charge and charge.id, covered=covered, sigma=claimed[0], rate=claimed[1], step=step)
                        moment()
                        yield batch

            dp_sgd.PoissonSampler = Noting  # type: ignore[misc]
            try:
                yield from take_steps(config, setup)
            finally:
                dp_sgd.PoissonSampler = before  # type: ignore[misc]

        before = dp_sgd.PoissonSampler
        training.DPSGD = engine(steps)  # type: ignore[misc]
        for owner, name in ((Ledger, "reserve"), (Ledger, "settle"), (os, "replace")):
            setattr(owner, name, between(getattr(owner, name)))
        table = tomllib.loads(plan.read_text(encoding="utf-8"))
        while True:
            try:
                for round in range(1, rounds + 1):
                    train_round(parse_plan(table | {"seed": seed}), own, round, start)
                    note(finished=round, seed=seed)
                return
            except PrivacyError as error:
                note(refused=str(error), seed=seed)
                seed += 1

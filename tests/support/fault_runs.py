"""Runs of real processes in which one thing goes wrong, and what must have become of them at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.support.deployment import Deployment, bring_back, deployment, weights
from tests.support.faults_page import Page

# STRUCK: the round in which it happens
ROUNDS = 4
STRUCK = 2
STEPS = 40
LOCAL = {"learning_rate": 0.5, "batch_size": 0.5, "steps": STEPS}
WHAT = ("trainer:north", "north", "front", "serverapp", "superexec", "superlink", "server", "run")


@dataclass(frozen=True)
class Kind:
    """A federation whose runs are struck. undisturbed: the model without; None where noise makes each run another."""

    name: str
    fed: Deployment
    undisturbed: dict[str, bytes] | None


def play_undisturbed(folder: Path, name: str, privacy: object = "none", *, database: bool = True) -> Iterator[Kind]:
    plan = {"rounds": ROUNDS, "local": LOCAL, "privacy": privacy}
    with deployment(folder, "north", "south", plan=plan, database=database, new_workers=True) as fed:
        if privacy != "none":
            yield Kind(name, fed, None)
            return
        fed.run()
        yield Kind(name, fed, weights(fed.finish().load()))


def is_training(fed: Deployment) -> bool:
    return any(event["round"] >= STRUCK for event in fed.events("round_started"))


def is_sending(fed: Deployment) -> bool:
    """An update is finished, and on its way or about to be."""
    begun = next((e["at"] for e in fed.events("round_started") if e["round"] == STRUCK), None)
    outbox = fed.site("north") / "outbox" / "update.safetensors"
    return begun is not None and outbox.stat().st_mtime > datetime.fromisoformat(begun).timestamp()


def is_aggregating(fed: Deployment) -> bool:
    return any(event["round"] >= STRUCK for event in fed.events("update_received"))


def is_checkpointing(fed: Deployment) -> bool:
    """The checkpoint is being written, or was just now."""
    return any((fed.newest().path / "checkpoints").glob(f"*round-{STRUCK:05d}.safetensors*"))


WHEN: dict[str, Callable[[Deployment], bool]] = {
    "training": is_training,
    "sending": is_sending,
    "aggregating": is_aggregating,
    "checkpointing": is_checkpointing,
}


def strike(kind: Kind, page: Page, what: str, when: str, fault: Callable[[], None], *options: str) -> None:
    """A run with the fault in it; it must end as if nothing had been."""
    kind.fed.run(*options)
    kind.fed.wait(lambda: WHEN[when](kind.fed))
    struck = time.monotonic()
    fault()
    check_end(kind, page, what, when, struck)


def check_end(kind: Kind, page: Page, what: str, when: str, struck: float, shown: str = "–") -> None:
    run = kind.fed.finish()
    seconds = time.monotonic() - struck
    history = run.load().history
    complete = [entry["participants"] for entry in history] == [list(kind.fed.organizations)] * ROUNDS
    same = None if kind.undisturbed is None else weights(run.load()) == kind.undisturbed
    page.add(what, when, kind.name, seconds, complete, same, shown)
    assert complete
    assert same in (True, None)


def kill(kind: Kind, what: str) -> Callable[[], None]:
    def fault() -> None:
        kind.fed.kill(what)
        bring_back(kind.fed, what)

    return fault

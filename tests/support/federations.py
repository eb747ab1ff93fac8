"""A federation's folder with members, and a SuperLink that is a Python object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cotune.flower.control_client import RunState, SuperLinkUnreachable
from cotune.flower.nodes import RegisteredNode
from cotune.plan.load import parse_plan
from cotune.server.deployment.creation import create_federation
from cotune.server.deployment.federation import FederationFolder, ServerConfig
from tests.support.unreliable_grid import LINES

Step = Callable[[int], RunState | None]  # what a state call answers; it may write events, or raise


def founded(path: Path, base: Path, *names: str, test: Path | None = None, **changes: Any) -> FederationFolder:
    """A federation that trains the head of a model, with a member for each name."""
    table = {
        "name": "toy",
        "rounds": 2,
        "labels": ["bad", "good", "so"],
        "model": {"base": str(base), "max_length": 16},
        "data": {"source": "nowhere.csv"},
        "privacy": "none",
    }
    config = ServerConfig(name="toy", hosts=("127.0.0.1",), device="cpu", test=test)
    federation = create_federation(path, parse_plan({**table, **changes}), config)
    for name, line in zip(names, LINES, strict=False):
        federation.members.invite(name, line)
    return federation


@dataclass
class FakeSuperLink:
    """Plays a run as a script says: an attempt is a list of steps, one for each time its state is asked for.

    known: other runs that go on. Once the script is at its end, a run is finished.
    """

    script: Sequence[Sequence[Step]] = ()
    known: tuple[int, ...] = ()
    online: tuple[bytes, ...] = ()
    started: list[Path] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)

    def start(self, run: Path) -> int:
        self.started.append(run)
        return 100 + len(self.started)

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def state(self, run_id: int) -> RunState | None:
        number = self.asked.get(run_id, 0)
        self.asked[run_id] = number + 1
        steps = self.script[run_id - 101] if 0 <= run_id - 101 < len(self.script) else ()
        return steps[number](run_id) if number < len(steps) else RunState("finished", "failed", "lost")

    def running(self) -> tuple[int, ...]:
        return self.known

    def nodes(self) -> tuple[RegisteredNode, ...]:
        return tuple(RegisteredNode(i, key, True) for i, key in enumerate(self.online, start=1))


def away(run_id: int) -> RunState | None:
    raise SuperLinkUnreachable("the SuperLink cannot be reached: expected one that `cotune server start` keeps running")

"""The durable account of client-level privacy: one line per round whose noise was about to be drawn, on the server's disk.

A federation has one account for all its runs: the same organizations take part in them, and whoever watches them sees them all. A
line is on the disk before the noise is drawn, so that a crash in between counts as spent. Stored are accounting events (z, q,
count), never an ε. The file is replaced as a whole, fsynced, and never shortened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from cotune.models.durable import write_durably
from cotune.models.errors import PrivacyError
from cotune.privacy.accounting import Steps, epsilon
from cotune.privacy.filters import epsilon_over_runs

__all__ = ["ClientLevelAccount"]


@dataclass(frozen=True)
class ClientLevelAccount:
    """The charges of one run, in an account that several runs may share.

    Attributes:
        allowed: ε that this run's charges may reach, at δ.
        delta: δ of each run. Over several runs together it is 3δ/2: one run counts by PLD at δ, several by a filter at δ/2.
        run: The run's name among those of the account.
        total: ε that the charges of all runs may reach together; None: as much as a run alone.
    """

    path: Path
    allowed: float
    delta: float
    run: str = ""
    total: float | None = None

    def runs(self) -> dict[str, list[tuple[int, Steps]]]:
        """Return what each run was charged, as (round, steps), in the order in which it was.

        Raises:
            PrivacyError: For a file that is no account.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            found: dict[str, list[tuple[int, Steps]]] = {}
            for row in map(json.loads, lines):
                found.setdefault(str(row.get("run", "")), []).append(_charge(row))
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrivacyError(
                f"the privacy account {self.path} cannot be read ({error}): expected one JSON object per line; nothing is"
                " released without it, so restore it from a backup"
            ) from None

    def charges(self) -> list[tuple[int, Steps]]:
        """Return (round, what it cost) of this run. Raises PrivacyError for a file that is no account."""
        return self.runs().get(self.run, [])

    def spent(self) -> float:
        """Return ε of this run's charges at δ."""
        return epsilon((steps for _, steps in self.charges()), self.delta)

    def spent_in_all_runs(self) -> float:
        """Return ε of the charges of all runs; of one run alone, that of `spent`."""
        return self._of_all({name: [steps for _, steps in charged] for name, charged in self.runs().items()})

    def allows(self, steps: Steps) -> bool:
        """Return whether one more charge stays within ε, of this run and of all together."""
        runs = {name: [before for _, before in charged] for name, charged in self.runs().items()}
        runs.setdefault(self.run, []).append(steps)
        return epsilon(runs[self.run], self.delta) <= self.allowed and self._of_all(runs) <= self._most

    def charge(self, round: int, steps: Steps) -> None:
        """Charge a round, durably when this returns.

        Raises:
            PrivacyError: When ε would be exceeded; nothing is charged then.
        """
        with FileLock(f"{self.path}.lock"):  # two runs of a federation are two processes
            if not self.allows(steps):
                raise PrivacyError(
                    f"round {round} would exceed the client-level ε = {self.allowed:g} of a run, or {self._most:g} of all runs:"
                    " expected a round that fits"
                )
            before = self.path.read_bytes() if self.path.exists() else b""
            write_durably(self.path, before + json.dumps(self._line(round, steps)).encode() + b"\n")

    @property
    def _most(self) -> float:
        return self.allowed if self.total is None else self.total

    def _of_all(self, runs: dict[str, list[Steps]]) -> float:
        charged = [steps for steps in runs.values() if steps]
        return epsilon(charged[0], self.delta) if len(charged) == 1 else epsilon_over_runs(runs, self._most, self.delta)

    def _line(self, round: int, steps: Steps) -> dict[str, Any]:
        return {
            **({"run": self.run} if self.run else {}),
            "round": round,
            "noise_multiplier": steps.noise_multiplier,
            "sample_rate": steps.sample_rate,
            "count": steps.count,
        }


def _charge(row: dict[str, Any]) -> tuple[int, Steps]:
    return int(row["round"]), Steps(float(row["noise_multiplier"]), float(row["sample_rate"]), int(row["count"]))

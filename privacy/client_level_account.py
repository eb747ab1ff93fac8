"""The durable account of client-level privacy: one line per round whose noise was about to be drawn, on the server's disk.

A line is on the disk before the noise is drawn, so that a crash in between counts as spent. Stored are accounting events (z, q,
count), never an ε. The file is replaced as a whole, fsynced, and never shortened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.models.durable import write_durably
from cotune.models.errors import PrivacyError
from cotune.privacy.accounting import Steps, epsilon

__all__ = ["ClientLevelAccount"]


@dataclass(frozen=True)
class ClientLevelAccount:
    """The charges of one run. allowed, delta: the ε that charges may reach together, at δ."""

    path: Path
    allowed: float
    delta: float

    def charges(self) -> list[tuple[int, Steps]]:
        """(round, what it cost), in the order in which they were charged. Raises PrivacyError for a file that is no account."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            return [_charge(json.loads(line)) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"the privacy account {self.path} cannot be read ({error}): expected one JSON object per line; nothing is"
                " released without it, so restore it from a backup"
            ) from None

    def spent(self) -> float:
        """ε of all charges together."""
        return epsilon((steps for _, steps in self.charges()), self.delta)

    def allows(self, steps: Steps) -> bool:
        """Whether one more charge stays within ε."""
        return epsilon([*(before for _, before in self.charges()), steps], self.delta) <= self.allowed

    def charge(self, round: int, steps: Steps) -> None:
        """Durable when this returns. Raises PrivacyError, and charges nothing, when ε would be exceeded."""
        if not self.allows(steps):
            raise PrivacyError(f"round {round} would exceed the client-level ε = {self.allowed:g}: expected a round that fits")
        before = self.path.read_bytes() if self.path.exists() else b""
        line = {
            "round": round,
            "noise_multiplier": steps.noise_multiplier,
            "sample_rate": steps.sample_rate,
            "count": steps.count,
        }
        write_durably(self.path, before + json.dumps(line).encode() + b"\n")


def _charge(row: dict[str, Any]) -> tuple[int, Steps]:
    return int(row["round"]), Steps(float(row["noise_multiplier"]), float(row["sample_rate"]), int(row["count"]))

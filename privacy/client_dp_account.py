"""The account of what rounds with client-level privacy spent.

It is durable: one line per round on the server's disk, written before the noise of that round is drawn, so that a crash in
between counts as spent. It stores accounting events (z, q, count), never an ε. The file is replaced as a whole, fsynced, and
never shortened. All runs of a federation share one account, because the same organizations take part in them and an observer
sees all of them. Its first line fixes the limit for all runs and δ: the order of the Rényi filter follows from them, and a later
plan, which may have been chosen after seeing answers, must not change it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.errors import PrivacyError
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.filters import epsilon_over_runs
from cotune.storage.files import atomic_write, exclusive_lock
from cotune.storage.json_documents import parse_json


@dataclass(frozen=True)
class ClientLevelAccount:
    """The charges of one run, in an account that several runs may share.

    Attributes:
        path: The file.
        allowed: ε that this run's charges may reach, at δ.
        delta: δ of each run. Over several runs together it is 3δ/2: one run counts by PLD at δ, several by a filter at δ/2.
        run: Identifies the run in the account; "": the account belongs to this run alone and has no first line.
        total: ε that the charges of all runs may reach together, by this run's plan; None: that of one run.
    """

    path: Path
    allowed: float
    delta: float
    run: str = ""
    total: float | None = None

    def runs(self) -> dict[str, list[tuple[int, Steps]]]:
        """Return run -> its charges as (round, steps), in the order in which they were made.

        Raises:
            PrivacyError: For a file that is no account.
        """
        return self._read()[1]

    def charges(self) -> list[tuple[int, Steps]]:
        """Return (round, steps) of every charge of this run.

        Raises:
            PrivacyError: For a file that is no account.
        """
        return self.runs().get(self.run, [])

    def spent(self) -> float:
        """Return ε of this run's charges at δ."""
        return epsilon((steps for _, steps in self.charges()), self.delta)

    def spent_in_all_runs(self) -> float:
        """Return ε of the charges of all runs together."""
        return self._epsilon_of({name: [steps for _, steps in charged] for name, charged in self.runs().items()})

    def delta_of_all_runs(self) -> float:
        """Return δ at which `spent_in_all_runs` holds."""
        return self.delta if len(self.runs()) <= 1 else 1.5 * self.delta

    def check(self) -> None:
        """Check that this run's plan keeps to what the first charge of the account fixed, before any request is sent.

        Raises:
            PrivacyError: For another δ, or a larger ε for all runs.
        """
        total, delta = self._limits()
        if self.delta == delta and self._max_total <= total:
            return
        raise PrivacyError(
            f"the plan asks for client-level ε = {self._max_total:g} of all runs at δ = {self.delta:g}, and the first run of this"
            f" federation fixed ε = {total:g} at δ = {delta:g} for good: expected the same δ and no larger ε; to start over, make"
            " a new federation",
            code="privacy.federation_limits_changed",
        )

    def allows(self, steps: Steps) -> bool:
        """Return whether one more charge stays within ε, of this run and of all together."""
        runs = {name: [before for _, before in charged] for name, charged in self.runs().items()}
        runs.setdefault(self.run, []).append(steps)
        return epsilon(runs[self.run], self.delta) <= self.allowed and self._epsilon_of(runs) <= self._max_total

    def charge(self, round: int, steps: Steps) -> None:
        """Charge a round. The charge is durable when this returns.

        Raises:
            PrivacyError: When ε would be exceeded, or as `check`; nothing is charged then.
        """
        with exclusive_lock(self.path.with_name(f"{self.path.name}.lock")):  # two runs of a federation are two processes
            self.check()
            if not self.allows(steps):
                raise PrivacyError(
                    f"round {round} would exceed the client-level ε = {self.allowed:g} of a run, or {self._max_total:g} of all"
                    " runs: expected a round that fits",
                    code="privacy.client_epsilon_exceeded",
                )
            before = (self.path.read_bytes() if self.path.exists() else b"") or self._first_line()
            atomic_write(self.path, before + json.dumps(self._line(round, steps)).encode() + b"\n")

    @property
    def _max_total(self) -> float:
        return self.allowed if self.total is None else self.total

    def _epsilon_of(self, runs: dict[str, list[Steps]]) -> float:
        charged = [steps for steps in runs.values() if steps]
        return epsilon(charged[0], self.delta) if len(charged) == 1 else epsilon_over_runs(runs, *self._limits())

    def _limits(self) -> tuple[float, float]:
        """Return ε of all runs and δ as the first charge fixed them; before it, those of this run's plan."""
        return self._read()[0] or (self._max_total, self.delta)

    def _read(self) -> tuple[tuple[float, float] | None, dict[str, list[tuple[int, Steps]]]]:
        """Return what the first line fixes, where there is one, and the charges of each run."""
        try:
            rows = [parse_json(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            fixed = (float(rows[0]["epsilon_total"]), float(rows[0]["delta"])) if self.run and rows else None
            found: dict[str, list[tuple[int, Steps]]] = {}
            for row in rows[1:] if fixed else rows:
                found.setdefault(str(row.get("run", "")), []).append(_charge(row))
            return fixed, found
        except FileNotFoundError:
            return None, {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrivacyError(
                f"the privacy account {self.path} cannot be read ({error}): expected one JSON object per line; nothing is"
                " released without it, so restore it from a backup",
                code="privacy.account_unreadable",
            ) from None

    def _first_line(self) -> bytes:
        """Return the line with what the first charge of a federation fixes; the account of a single run has none."""
        fixed = {"epsilon_total": self._max_total, "delta": self.delta}
        return json.dumps(fixed).encode() + b"\n" if self.run else b""

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

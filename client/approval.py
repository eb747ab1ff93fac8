"""Which plans an organisation has approved: nothing of it is touched for any other, unless its policy says so.

plans/<plan id>.json   in the site: the plans that came, approved or not, as canonical JSON
approved.jsonl         which were approved, when, and by which command
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from cotune.client.site import Site
from cotune.models.durable import write_durably
from cotune.models.errors import Declined, RunError
from cotune.models.nested import json_of
from cotune.plan.load import parse_plan
from cotune.plan.schema import Plan
from cotune.privacy.policy import Policy

_MOST_PENDING = 20  # plans that nobody here has asked for: a server must not fill the disk with them
_MOST_CHARACTERS = 1_000_000


class Approvals:
    """Of one site. Read anew by every call: they are given by one process and asked for by another."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._plans, self._approved = site.folder / "plans", site.folder / "approved.jsonl"

    def check(self, plan: Plan, policy: Policy) -> None:
        """Raises Declined for a plan that nobody here has approved, and keeps it to be looked at.

        At a simulated organisation there is nobody to ask: whoever simulates it has chosen the plan.
        """
        if self.site.file.simulated or policy.training.approval == "none" or plan.plan_id in self.ids():
            return
        self._keep_pending(plan)
        command = f"cotune client approve {self.site.folder} {plan.plan_id[:12]}"
        raise Declined("training.approval", f"nobody has approved the plan {plan.name}; look at it and approve it by `{command}`")

    def approve(self, plan: Plan, how: str) -> None:
        """Durable when this returns. how: the command that approves. An approved plan is not approved again."""
        with FileLock(self.site.folder / ".approved.lock", mode=0o600):
            if plan.plan_id in self.ids():
                return
            write_durably(self._file(plan.plan_id), plan.canonical().encode())
            line = {"plan_id": plan.plan_id, "plan": plan.name, "at": datetime.now(UTC).isoformat(timespec="seconds"), "how": how}
            before = self._approved.read_bytes() if self._approved.exists() else b""
            write_durably(self._approved, before + json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def ids(self) -> list[str]:
        """Of the plans that were approved, in that order. Raises RunError for a damaged file."""
        try:
            lines = self._approved.read_text(encoding="utf-8").splitlines()
            return [str(json_of(line)["plan_id"]) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._approved} is damaged ({type(error).__name__}): expected one JSON object with a plan_id in each line;"
                " remove it, and approve the plans again"
            ) from None

    def pending(self) -> list[Plan]:
        """The plans that came and were not approved, in the order of their ids."""
        approved = set(self.ids())
        return [self._read(file) for file in sorted(self._plans.glob("*.json")) if file.stem not in approved]

    def last(self) -> Plan | None:
        """The plan that was approved last, if it is still here."""
        ids = self.ids()
        return self._read(self._file(ids[-1])) if ids and self._file(ids[-1]).exists() else None

    def find(self, prefix: str = "") -> Plan:
        """The plan whose id begins so; without a prefix, the only pending one. Raises RunError where that is none, or several."""
        approved = set(self.ids())
        wanted = [
            f for f in sorted(self._plans.glob("*.json")) if (f.stem.startswith(prefix) if prefix else f.stem not in approved)
        ]
        if len(wanted) == 1:
            return self._read(wanted[0])
        if not wanted and not prefix:
            raise RunError("no plan waits for approval: one does once it was asked for, or join with its federation.toml")
        known = ", ".join(f"{plan.plan_id[:12]} ({plan.name})" for plan in self.pending()) or "none"
        what = f"{len(wanted)} plans begin with {prefix[:64]!r}" if prefix else f"{len(wanted)} plans wait for approval"
        raise RunError(f"{what}: expected the id of one; waiting: {known}")

    def _keep_pending(self, plan: Plan) -> None:
        waiting = sum(file.stem not in set(self.ids()) for file in self._plans.glob("*.json"))
        content = plan.canonical()
        if not self._file(plan.plan_id).exists() and waiting < _MOST_PENDING and len(content) <= _MOST_CHARACTERS:
            write_durably(self._file(plan.plan_id), content.encode())

    def _file(self, plan_id: str) -> Path:
        return self._plans / f"{plan_id}.json"

    def _read(self, file: Path) -> Plan:
        try:
            plan = parse_plan(json_of(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read ({type(error).__name__}): remove it; the plan comes again") from None
        if plan.plan_id != file.stem:
            raise RunError(f"{file} is not the plan that came under this id: somebody has changed it; remove it")
        return plan

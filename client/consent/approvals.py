"""The plans that a site has approved, and those that await the approval of a person.

A plan is stored as canonical JSON, plans/<plan id>.json in the site; approved.jsonl records which were approved, when, and by
which command.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from cotune.client.site import Site
from cotune.errors import PolicyError, RunError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy
from cotune.storage.files import atomic_write, exclusive_lock
from cotune.storage.json_documents import parse_json

_MAX_PENDING = 20  # pending plans, so that a server cannot fill the disk with them
_MAX_CHARACTERS = 1_000_000


class Approvals:
    """The plans that a site has approved, and those that await approval.

    Every call reads the files, as one process approves plans and another one checks them.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._plans = site.plans
        self._approved = site.approved_plans

    def check(self, plan: Plan, policy: Policy) -> None:
        """Check that a person has approved the plan; if not, store it for inspection.

        A simulated organization needs no approval: the person who simulates it has chosen the plan.

        Raises:
            PolicyError: If the plan is not approved.
        """
        if self.site.file.simulated or policy.training.approval == "none" or plan.plan_id in self.ids():
            return
        self._keep_pending(plan)
        command = f"cotune client approve {self.site.folder} {plan.plan_id[:12]}"
        raise PolicyError(
            "training.approval", f"nobody has approved the plan {plan.name}; look at it and approve it by `{command}`"
        )

    def approve(self, plan: Plan, how: str) -> None:
        """Approve a plan durably; approving it again changes nothing.

        Args:
            plan: The plan.
            how: The command that approves it, for the record.
        """
        with exclusive_lock(self.site.approval_lock):
            if plan.plan_id in self.ids():
                return
            atomic_write(self._file(plan.plan_id), plan.canonical().encode())
            line = {"plan_id": plan.plan_id, "plan": plan.name, "at": datetime.now(UTC).isoformat(timespec="seconds"), "how": how}
            before = self._approved.read_bytes() if self._approved.exists() else b""
            atomic_write(self._approved, before + json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def ids(self) -> list[str]:
        """Return the ids of the approved plans in the order of their approval; raises RunError if the file is damaged."""
        try:
            lines = self._approved.read_text(encoding="utf-8").splitlines()
            return [str(parse_json(line)["plan_id"]) for line in lines]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._approved} is damaged ({type(error).__name__}): expected one JSON object with a plan_id in each line;"
                " remove it, and approve the plans again",
                code="run.damaged_document",
            ) from None

    def pending(self) -> list[Plan]:
        """Return the plans that await approval, in the order of their ids."""
        approved = set(self.ids())
        return [self._read(file) for file in sorted(self._plans.glob("*.json")) if file.stem not in approved]

    def last(self) -> Plan | None:
        """Return the plan that was approved last; None if there is none, or its file was removed."""
        ids = self.ids()
        return self._read(self._file(ids[-1])) if ids and self._file(ids[-1]).exists() else None

    def find(self, prefix: str = "") -> Plan:
        """Return the plan whose id begins with a prefix; without a prefix, the only pending plan.

        Raises:
            RunError: If there is none, or more than one.
        """
        approved = set(self.ids())
        wanted = [
            f for f in sorted(self._plans.glob("*.json")) if (f.stem.startswith(prefix) if prefix else f.stem not in approved)
        ]
        if len(wanted) == 1:
            return self._read(wanted[0])
        if not wanted and not prefix:
            raise RunError(
                "no plan waits for approval: one does once it was asked for, or join with its federation.toml",
                code="run.no_such_plan",
            )
        known = ", ".join(f"{plan.plan_id[:12]} ({plan.name})" for plan in self.pending()) or "none"
        what = f"{len(wanted)} plans begin with {prefix[:64]!r}" if prefix else f"{len(wanted)} plans wait for approval"
        raise RunError(f"{what}: expected the id of one; waiting: {known}", code="run.no_such_plan")

    def _keep_pending(self, plan: Plan) -> None:
        waiting = sum(file.stem not in set(self.ids()) for file in self._plans.glob("*.json"))
        content = plan.canonical()
        if not self._file(plan.plan_id).exists() and waiting < _MAX_PENDING and len(content) <= _MAX_CHARACTERS:
            atomic_write(self._file(plan.plan_id), content.encode())

    def _file(self, plan_id: str) -> Path:
        return self._plans / f"{plan_id}.json"

    def _read(self, file: Path) -> Plan:
        try:
            plan = parse_plan(parse_json(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{file} cannot be read ({type(error).__name__}): remove it; the plan comes again", code="run.damaged_document"
            ) from None
        if plan.plan_id != file.stem:
            raise RunError(
                f"{file} is not the plan that was received under this id: somebody has changed it; remove it",
                code="run.changed_plan",
            )
        return plan

"""Open an organization's site: its records, its ledger, and the tensors that it stores between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cotune.client.site_ledger import SiteWithLedger
from cotune.data.dataset import Dataset, DatasetManifest
from cotune.errors import RunError
from cotune.plan.plan import Plan
from cotune.protocol.update_file import read_update, round_of, update_bytes
from cotune.storage.files import atomic_write, remove_parts
from cotune.strategies.types import Update


class Site(SiteWithLedger):
    """A site with its records, its ledger, and stored tensors."""

    def dataset(self, labels: tuple[str, ...]) -> Dataset:
        """Read the organization's records; raises DataError if they cannot be read."""
        return DatasetManifest.read(self.records, labels, lenient=not self.file.simulated)

    def counted_dataset(self, plan: Plan) -> Dataset:
        """Read the records that the plan's promise covers: of the right collection, and no more per unit than allowed."""
        held = self.dataset(plan.labels)
        if held.collection and self.has_ledger:
            held = held.apart(self.ledger().find_charged_elsewhere, plan.privacy)
        return held.bound_contributions(plan.privacy, plan.seed)

    def store_update(self, update: Update, plan_id: str) -> None:
        """Store a finished update in the outbox, replacing the previous one, as durably as the ledger (see `ledger`)."""
        content = update_bytes(update, plan_id=plan_id)
        remove_parts(self.outbox)
        atomic_write(self.outbox, content, durable=not self.file.simulated)

    def store_state(self, plan_id: str, round: int, tensors: Mapping[str, Tensor], what: str = "", *, since: int = 0) -> None:
        """Store a run's tensors after a round, as durably as the ledger (see `ledger`).

        Args:
            plan_id: Of the run.
            round: The round that they belong to.
            tensors: Name -> tensor.
            what: Their folder; see `SitePaths.kept_folder`.
            since: The round on whose tensors they are based.
        """
        folder = self.kept_folder(plan_id, what)
        # safetensors refuses tensors that share memory
        copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        atomic_write(folder / _file_of(round), save(copies, metadata={"since": str(since)}), durable=not self.file.simulated)

    def load_state(self, plan_id: str, round: int, what: str = "") -> dict[str, Tensor]:
        """Return the tensors that were stored after a round, and remove those of rounds on which it is not based.

        A server that has lost its last checkpoint requests the previous round again, but no older one.

        Args:
            plan_id: Of the run.
            round: The round.
            what: Their folder; see `SitePaths.kept_folder`.

        Raises:
            RunError: If they cannot be read (`run.lost_state`).
        """
        folder = self.kept_folder(plan_id, what)
        found, since = _load_kept(folder / _file_of(round))
        for older in folder.glob("round-*.safetensors"):
            if older.name < _file_of(since):
                older.unlink(missing_ok=True)
        return found

    def load_newest_state(self, plan_id: str, what: str = "") -> dict[str, Tensor]:
        """Return the tensors that were stored last, whether or not their round was accepted; empty if there are none."""
        files = sorted(self.kept_folder(plan_id, what).glob("round-*.safetensors"))
        return _load_kept(files[-1])[0] if files else {}

    def finished_update(self, plan_id: str, round: int, received: str) -> Update | None:
        """Return the update that answers exactly this request, if it was finished before; else None.

        Args:
            plan_id: Of the request.
            round: Of the request.
            received: Digest of the request's arrays.

        Raises:
            RunError: If the outbox is damaged.
        """
        file = self.outbox
        try:
            return read_update(file, plan_id=plan_id, round=round, received=received)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _damaged(file, error) from None

    def last_finished_round(self, plan_id: str) -> int | None:
        """Return the round of the update in the outbox, None if it belongs to another plan; raises RunError if it is damaged."""
        try:
            return round_of(self.outbox, plan_id)
        except ValueError as error:
            raise _damaged(self.outbox, error) from None


def _damaged(file: Path, error: ValueError) -> RunError:
    return RunError(
        f"the outbox file {file} is damaged ({error}): remove it to go on with the next round", code="run.damaged_document"
    )


def _file_of(round: int) -> str:
    return f"round-{round:05d}.safetensors"


def _load_kept(file: Path) -> tuple[dict[str, Tensor], int]:
    """Return (the tensors, the round on whose tensors they are based)."""
    try:
        with safe_open(file, framework="pt") as kept:
            return {name: kept.get_tensor(name) for name in kept.keys()}, int(kept.metadata()["since"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        round = int(file.stem.removeprefix("round-"))
        raise RunError(
            f"what was kept after round {round} cannot be read from {file} ({error}): expected it to be there, as the server"
            " counts on it; restore the site from a backup, or start a new run",
            code="run.lost_state",
        ) from None

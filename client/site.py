"""An organisation's site: one folder with its description, its ledger, and the last update it sent.

site.json         name, device, and whether it is a simulated one
data.json         which records it holds (see models/holdings.py)
policy.toml       what it allows; without one, the strict defaults
ledger.sqlite     the privacy it has spent
outbox/           the last finished update, so that a crash after training costs nothing
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cotune.models.durable import write_durably
from cotune.models.errors import DataError, RunError
from cotune.models.holdings import Holdings, HoldingsFile
from cotune.privacy.ledger import Ledger
from cotune.privacy.policy import Policy, read_policy
from cotune.strategies.updates import Update

__all__ = ["Site", "SiteFile"]


class SiteFile(BaseModel):
    """site.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organisation: str
    simulated: bool = False
    device: str = "auto"


class Site:
    """The folder, opened. Raises DataError when it is not a site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.file = SiteFile.model_validate_json((folder / "site.json").read_bytes())
        except (OSError, ValidationError):
            raise DataError(f"{folder} is not a site: expected a folder with a site.json") from None

    @property
    def organisation(self) -> str:
        return self.file.organisation

    def holdings(self, labels: tuple[str, ...]) -> Holdings:
        """The organisation's own records."""
        return HoldingsFile.read(self.folder / "data.json", labels, lenient=not self.file.simulated)

    def policy(self) -> Policy:
        """policy.toml. Without one, a simulated organisation allows everything, a real one nothing but the strict defaults."""
        file = self.folder / "policy.toml"
        if file.exists():
            return read_policy(file)
        return Policy.permissive() if self.file.simulated else Policy()

    @property
    def ledger_file(self) -> Path:
        return self.folder / "ledger.sqlite"

    def ledger(self) -> Ledger:
        return Ledger(self.ledger_file)

    def keep(self, update: Update, plan_id: str, state_digest: str) -> None:
        """Puts a finished update into the outbox, durably, in place of the one before."""
        about = {k: v for k, v in asdict(update).items() if k != "delta"} | {"plan_id": plan_id, "state": state_digest}
        content = save({n: t.contiguous() for n, t in update.delta.items()}, metadata={"update": json.dumps(about)})
        write_durably(self.folder / "outbox" / "update.safetensors", content)

    def kept(self, plan_id: str, round: int, state_digest: str) -> Update | None:
        """The update that answers exactly this request, if it was finished before."""
        file = self.folder / "outbox" / "update.safetensors"
        try:
            with safe_open(file, framework="pt") as tensors:
                about = json.loads(tensors.metadata()["update"])
                if (about.pop("plan_id"), about["round"], about.pop("state")) != (plan_id, round, state_digest):
                    return None
                return Update(delta={name: tensors.get_tensor(name) for name in tensors.keys()}, **about)  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"the outbox file {file} is damaged ({error}): remove it to train the round again") from None

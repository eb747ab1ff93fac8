"""An organization's site: one folder with its description, its ledger, and the last update it sent.

site.json         name, device, where its copy of the base model is, and whether it is a simulated one
data.json         which records it holds (see data/dataset.py)
policy.toml       what it allows; without one, the strict defaults
node.key .pub     by which a server knows it
plans/            the plans that came, and in approved.jsonl those that it has approved (policy_check.py)
ledger.sqlite     the privacy it has spent
ledger.key        the secret by which the ledger knows records
audit.jsonl       what it has sent (audit_log.py)
node/             what its node keeps while it works (node/node.py)
outbox/           the last finished update, so that a crash after training costs nothing
models/<plan>/    the finished model of a plan, as a Hugging Face folder
kept/<plan>/      what is kept from round to round, by the round after which it was kept: tensors of a plan's client term, and in
                  personal/ the parameters that are not shared
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cotune.errors import DataError, RunError
from cotune.privacy.policy import Policy, read_policy
from cotune.storage.documents import JsonDocument


class SiteFile(BaseModel):
    """site.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organization: str
    simulated: bool = False
    device: str = "auto"
    base: Path | None = None  # a folder with the base model, where a plan names one that is not to be found here


class SiteFolder:
    """The folder, opened, with its description and its policy. Raises DataError when it is not a site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            found = JsonDocument(folder / "site.json", SiteFile).read()
        except RunError:
            found = None
        if found is None:
            raise DataError(
                f"{folder} is not a site: expected a folder with a site.json, as `cotune client init` makes it",
                code="data.not_a_site",
            )
        self.file = found

    @property
    def organization(self) -> str:
        return self.file.organization

    def policy(self) -> Policy:
        """policy.toml. Without one, a simulated organization allows everything, a real one nothing but the strict defaults."""
        file = self.folder / "policy.toml"
        if file.exists():
            return read_policy(file)
        return Policy.permissive() if self.file.simulated else Policy()

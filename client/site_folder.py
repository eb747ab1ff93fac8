"""An organization's site: one folder with its description, its ledger, and the last update it sent.

The names of its files and folders are here and nowhere else.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cotune.errors import DataError, RunError
from cotune.privacy.policy import Policy, read_policy
from cotune.storage.json_documents import JsonDocument


class NodePaths:
    """What a site's node keeps while it works (see `client.node`): the folder node/ of a site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "lock"  # held by the process that serves the site
        self.id = folder / "id"  # the node's number at the server, while it is connected
        self.request = folder / "request.pb"  # the request that is being answered
        self.trust = folder / "trust.json"  # whom the site takes requests from
        self.certificates = folder / "ca.crt"  # the authorities of its server, as it joined
        self.next_key = folder / "next.key"  # the private key that is to follow
        self.former_keys = folder / "former.pub"  # the public keys that were replaced, one a line

    def create(self) -> None:
        """Create the folder, for its owner alone, where it is missing."""
        self.folder.mkdir(mode=0o700, exist_ok=True)

    @property
    def trust_lock(self) -> Path:
        return self.folder / ".trust.lock"

    @property
    def keys_lock(self) -> Path:
        return self.folder / ".keys.lock"


class SitePaths:
    """Where everything of a site is. Nothing is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = folder / "site.json"  # name, device, where its copy of the base model is
        self.records = folder / "data.json"  # which records it holds (see data/dataset.py)
        self.policy_file = folder / "policy.toml"  # what it allows; without one, the strict defaults
        self.private_key = folder / "node.key"  # by which a server knows it
        self.public_key = folder / "node.pub"
        self.key_renewal = folder / "node-renewal.json"  # the statement by which a coordinator learns of a new key
        self.plans = folder / "plans"  # the plans that came
        self.approved_plans = folder / "approved.jsonl"  # those that it has approved
        self.ledger_file = folder / "ledger.sqlite"  # the privacy it has spent; beside it the secret by which it knows records
        self.audit_log = folder / "audit.jsonl"  # what it was asked for and has sent
        self.outbox = folder / "outbox" / "update.safetensors"  # the last finished update: a crash after training costs nothing
        self.models = folder / "models"  # finished models, a Hugging Face folder each
        self.adapted_models = folder / "adapted"  # the same, adapted to its own records
        self.node = NodePaths(folder / "node")

    @property
    def approval_lock(self) -> Path:
        return self.folder / ".approved.lock"

    def kept_folder(self, plan_id: str, what: str = "") -> Path:
        """Return the folder of what is kept from round to round: "": of a client term; "personal": what is not shared."""
        return self.folder / "kept" / plan_id[:32] / what


class SiteFile(BaseModel):
    """site.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organization: str
    simulated: bool = False
    device: str = "auto"
    base: Path | None = None  # a folder with the base model, where a plan names one that is not to be found here
    own_base: str | None = None  # the base model to train where only predictions are shared; None: the plan's
    public: Path | None = None  # the plan's public inputs, where predictions for them are shared


class SiteFolder(SitePaths):
    """A site, opened: with its description and its policy.

    Raises:
        DataError: The folder is not a site (`data.not_a_site`).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            found = JsonDocument(self.description, SiteFile).read()
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
        """Its name in the federation."""
        return self.file.organization

    def policy(self) -> Policy:
        """Read policy.toml. Without one, a simulated organization allows everything, a real one only the strict defaults."""
        if self.policy_file.exists():
            return read_policy(self.policy_file)
        return Policy.permissive() if self.file.simulated else Policy()

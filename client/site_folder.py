"""The folder of an organization's site, with its description, ledger, and last update.

Only this module spells the names of its files and folders.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from cotune.errors import DataError, RunError
from cotune.privacy.policy import Policy, read_policy
from cotune.storage.json_documents import JsonDocument


class NodePaths:
    """The files of a site's node (see `client.node`): the folder node/ of a site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = folder / "lock"  # held by the process that serves the site
        self.id = folder / "id"  # the node's number at the server, while it is connected
        self.request = folder / "request.pb"  # the request that is being answered
        self.trust = folder / "trust.json"  # whose requests the site accepts
        self.certificates = folder / "ca.crt"  # the authorities of its server, as it joined
        self.next_key = folder / "next.key"  # the next private key
        self.former_keys = folder / "former.pub"  # the public keys that were replaced, one per line

    def create(self) -> None:
        """Create the folder, accessible only to its owner, if it is missing."""
        self.folder.mkdir(mode=0o700, exist_ok=True)

    @property
    def trust_lock(self) -> Path:
        """The lock for changes of trust.json."""
        return self.folder / ".trust.lock"

    @property
    def keys_lock(self) -> Path:
        """The lock for changes of keys."""
        return self.folder / ".keys.lock"


class SitePaths:
    """The paths of a site's files. Nothing is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = folder / "site.json"  # name, device, path of the base model
        self.records = folder / "data.json"  # description of its records (see data/dataset.py)
        self.policy_file = folder / "policy.toml"  # the policy; if missing, the strict defaults apply
        self.private_key = folder / "node.key"  # by which servers identify it
        self.public_key = folder / "node.pub"
        self.key_renewal = folder / "node-renewal.json"  # the statement of a new key, for the coordinator
        self.plans = folder / "plans"  # the plans that were received
        self.approved_plans = folder / "approved.jsonl"  # the approvals of plans
        self.ledger_file = folder / "ledger.sqlite"  # spent privacy; beside it the secret key for fingerprints of records
        self.audit_log = folder / "audit.jsonl"  # requests and replies
        self.outbox = folder / "outbox" / "update.safetensors"  # the last finished update, sent again after a crash
        self.models = folder / "models"  # final models, one Hugging Face folder each
        self.adapted_models = folder / "adapted"  # the same, adapted to its own records
        self.node = NodePaths(folder / "node")

    @property
    def approval_lock(self) -> Path:
        """The lock for changes of approvals."""
        return self.folder / ".approved.lock"

    def kept_folder(self, plan_id: str, what: str = "") -> Path:
        """Return the folder of tensors that are stored between rounds.

        Args:
            plan_id: Of the run.
            what: "": state of the client term; "personal": parameters that are not shared.
        """
        return self.folder / "kept" / plan_id[:32] / what


class SiteFile(BaseModel):
    """site.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    organization: str
    simulated: bool = False
    device: str = "auto"
    base: Path | None = None  # folder of the base model, if this machine does not find it by the plan's name
    own_base: str | None = None  # the base model to train where only predictions are shared; None: the plan's
    public: Path | None = None  # the plan's public inputs, if predictions for them are shared
    run_ledger: Path | None = None  # the ledgers of all organizations of a simulated run, relative to the folder; None: its own

    @model_validator(mode="after")
    def _check_ledger(self) -> Self:
        if self.run_ledger is not None and not self.simulated:
            raise ValueError("expected a ledger of its own at an organization that is not simulated")
        return self


class SiteFolder(SitePaths):
    """An open site with its description and its policy.

    Raises:
        DataError: If the folder is not a site (`data.not_a_site`).
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
        if found.run_ledger is not None:
            self.ledger_file = _real_path(folder / found.run_ledger)

    @property
    def organization(self) -> str:
        """Its name in the federation."""
        return self.file.organization

    def policy(self) -> Policy:
        """Read policy.toml. Without one, a simulated organization allows everything, a real one only the strict defaults."""
        if self.policy_file.exists():
            return read_policy(self.policy_file)
        return Policy.permissive() if self.file.simulated else Policy()


@lru_cache(maxsize=4096)
def _real_path(path: Path) -> Path:
    """Return a path as all sites of a run name it, so that they share a connection."""
    return path.resolve()

"""The files of a federation's folder; only this module spells their names.

server.toml            configuration of the server
plan.toml              the plan of the federation's runs, fully resolved; beside it the files of its components
federation.toml        the invitation for organizations, and JOIN.md, how to use it
members.json           the invited organizations
server-renewals.jsonl  statements of rotated server keys, for organizations that were not reached by a request in the meantime
certificates/          the authority, the server's certificate, and the keys that sign requests: `CertificateFiles`
superlink/             data and logs of Flower's processes, and a record of those that run: `SuperLinkFiles`
runs/<run>/            one folder per run (server/runs/run_folder.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FederationFiles:
    """The files in a federation's folder.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The server's configuration."""
        return self.path / "server.toml"

    @property
    def plan(self) -> Path:
        """The plan of the federation's runs."""
        return self.path / "plan.toml"

    @property
    def invitation(self) -> Path:
        """The invitation that organizations receive."""
        return self.path / "federation.toml"

    @property
    def join_page(self) -> Path:
        """The instructions for joining."""
        return self.path / "JOIN.md"

    @property
    def members(self) -> Path:
        """The invited organizations."""
        return self.path / "members.json"

    @property
    def server_renewals(self) -> Path:
        """The statements of rotated server keys."""
        return self.path / "server-renewals.jsonl"

    @property
    def certificates(self) -> CertificateFiles:
        """The folder of certificates and keys."""
        return CertificateFiles(self.path / "certificates")

    @property
    def superlink(self) -> SuperLinkFiles:
        """The folder of Flower's processes."""
        return SuperLinkFiles(self.path / "superlink")

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.path / "runs"


@dataclass(frozen=True)
class CertificateFiles:
    """The files in the folder certificates/, in PEM unless stated otherwise.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate, which every organization receives; the previous authority may follow it."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """The authority's private key."""
        return self.path / "ca.key"

    @property
    def server(self) -> Path:
        """The server's certificate."""
        return self.path / "server.crt"

    @property
    def server_key(self) -> Path:
        """The server's private key."""
        return self.path / "server.key"

    @property
    def signing_key(self) -> Path:
        """The Ed25519 key that signs requests."""
        return self.path / "signing.key"

    @property
    def former_signing_keys(self) -> Path:
        """The public halves of replaced signing keys, as hex, one per line."""
        return self.path / "signing-former.pub"

    @property
    def serial(self) -> Path:
        """The serial number of the last request."""
        return self.path / "serial"

    @property
    def next(self) -> CertificateFiles:
        """The folder of announced keys: created atomically, and removed once they are active."""
        return CertificateFiles(self.path / "next")

    @property
    def renewal(self) -> Path:
        """In `next`: the statement of the announced keys."""
        return self.path / "renewal.json"

    @property
    def used_renewals(self) -> Path:
        """The statements of all keys that were activated, one per line, the oldest first."""
        return self.path / "renewals.jsonl"


@dataclass(frozen=True)
class SuperLinkFiles:
    """The files in the folder superlink/.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def processes(self) -> Path:
        """The running processes, for the successor of a supervisor that was killed."""
        return self.path / "processes.json"

    @property
    def database(self) -> Path:
        """The database of messages in transfer, unless they are kept in memory; it is emptied at every start."""
        return self.path / "state.sqlite"

    @property
    def front_config(self) -> Path:
        """The configuration of the front."""
        return self.path / "front.toml"

    @property
    def flower_home(self) -> Path:
        """Flower's other files."""
        return self.path / "flwr"

    @property
    def refusals(self) -> Path:
        """The front's refusals, by sender."""
        return self.path / "refused.json"

    def get_log(self, process: str) -> Path:
        """Return the log of a process, such as "front"."""
        return self.path / f"{process.lower()}.log"

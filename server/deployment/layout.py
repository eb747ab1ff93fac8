"""The files of a federation's folder: their names are spelled here alone.

server.toml            where it listens, and what it evaluates with
plan.toml              the plan that runs follow, with nothing left open; beside it the files of its own rules
federation.toml        what organizations are given, and JOIN.md, what they do with it
members.json           who was invited
server-renewals.jsonl  statements of renewed server keys, for organizations that no request reaches meanwhile
certificates/          the authority, what the server shows, and the keys that sign requests: `CertificateFiles`
superlink/             what Flower's processes keep, their logs, and which of them run: `SuperLinkFiles`
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
        return self.path / "server.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.toml"

    @property
    def invitation(self) -> Path:
        return self.path / "federation.toml"

    @property
    def join_page(self) -> Path:
        return self.path / "JOIN.md"

    @property
    def members(self) -> Path:
        return self.path / "members.json"

    @property
    def server_renewals(self) -> Path:
        return self.path / "server-renewals.jsonl"

    @property
    def certificates(self) -> CertificateFiles:
        return CertificateFiles(self.path / "certificates")

    @property
    def superlink(self) -> SuperLinkFiles:
        return SuperLinkFiles(self.path / "superlink")

    @property
    def runs(self) -> Path:
        return self.path / "runs"


@dataclass(frozen=True)
class CertificateFiles:
    """The files in the folder certificates/: PEM, unless said otherwise.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def authority(self) -> Path:
        """The present authority's certificate, which goes to every organization; the one before it may be second."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        return self.path / "ca.key"

    @property
    def server(self) -> Path:
        """The certificate that the server shows."""
        return self.path / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.path / "server.key"

    @property
    def signing_key(self) -> Path:
        """The Ed25519 key that signs requests."""
        return self.path / "signing.key"

    @property
    def former_signing_keys(self) -> Path:
        """The public halves of signing keys that were replaced, as hex, one a line."""
        return self.path / "signing-former.pub"

    @property
    def serial(self) -> Path:
        """The last number that was given to a request."""
        return self.path / "serial"

    @property
    def next(self) -> CertificateFiles:
        """The announced keys: whole or not at all, and gone once they are in use."""
        return CertificateFiles(self.path / "next")

    @property
    def renewal(self) -> Path:
        """In `next`: the statement of the announced keys."""
        return self.path / "renewal.json"

    @property
    def used_renewals(self) -> Path:
        """The statements of all keys that were put into use, one a line, the oldest first."""
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
        """What runs, for anyone who comes after a supervisor that was killed."""
        return self.path / "processes.json"

    @property
    def database(self) -> Path:
        """Messages on their way, unless they are kept in memory; restarted with every start."""
        return self.path / "state.sqlite"

    @property
    def front_config(self) -> Path:
        return self.path / "front.toml"

    @property
    def flower_home(self) -> Path:
        """What else Flower keeps."""
        return self.path / "flwr"

    @property
    def refusals(self) -> Path:
        """Whose announcements the front has refused."""
        return self.path / "refused.json"

    def get_log(self, process: str) -> Path:
        """Return the log of a process, such as "front"."""
        return self.path / f"{process.lower()}.log"

"""Whom a site takes requests from: the federation that it has joined, its signing keys, and the authorities of its server.

node/trust.json    in the site; written when it joins
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from cotune.models.durable import write_durably
from cotune.models.errors import RunError
from cotune.plan.invitation import Invitation

__all__ = ["Trust", "TrustedServer"]


class TrustedServer(BaseModel):
    """One generation of a server's keys. until: the last day (UTC) on which it is accepted; None: no end is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    signing_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    certificates: str
    until: date | None = None

    def is_accepted(self, today: date) -> bool:
        return self.until is None or today <= self.until


class Trust(BaseModel):
    """trust.json. generations: the oldest first; those that have ended stay, so that an old federation.toml is known as such."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    federation: str
    name: str
    generations: tuple[TrustedServer, ...] = Field(min_length=1)

    @classmethod
    def read(cls, site: Path) -> Trust:
        """Raises RunError."""
        file = _file(site)
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise RunError(
                f"{site} does not know by which key its server signs: run `cotune client join` with the federation.toml of a"
                " coordinator whose cotune signs its requests"
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{file} is damaged ({type(error).__name__}): remove it, and join with the federation.toml") from None

    @classmethod
    def join(cls, site: Path, invitation: Invitation) -> Trust:
        """Trusts the server of an invitation, durably. An invitation of keys that were replaced since takes nothing back."""
        offered = TrustedServer(signing_key=invitation.signing_key, certificates=invitation.certificates.decode())
        trust = cls(federation=invitation.id, name=invitation.name, generations=(offered,))
        if _file(site).exists():
            known = cls.read(site)
            if known.federation == invitation.id and known.find(invitation.signing_key):
                trust = known
        return trust.write(site)

    def write(self, site: Path) -> Trust:
        write_durably(_file(site), self.model_dump_json(indent=1).encode())
        return self

    def find(self, signing_key: str) -> TrustedServer | None:
        return next((each for each in self.generations if each.signing_key == signing_key), None)

    @property
    def newest(self) -> TrustedServer:
        return self.generations[-1]

    def accepted(self, now: datetime | None = None) -> tuple[TrustedServer, ...]:
        """Those that have not ended."""
        today = (now or datetime.now(UTC)).date()
        return tuple(each for each in self.generations if each.is_accepted(today))

    def certificates(self, now: datetime | None = None) -> bytes:
        """PEM: the authorities that vouch for the server."""
        return "".join(dict.fromkeys(each.certificates for each in self.accepted(now))).encode()


def _file(site: Path) -> Path:
    return site / "node" / "trust.json"

"""Whom a site takes requests from: the federation that it has joined, its signing keys, and the authorities of its server.

node/trust.json    in the site; written when it joins, and when the server's keys are renewed

A server's new keys are believed by a statement of the newest that is trusted, and of no other: not of one that was replaced, so
that anyone who has stolen that cannot lead a site astray. Both are accepted until the server uses the new ones; from then on the
former signs nothing any more, and its authority is believed for another month, as a server's certificate takes a restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from cotune.client.audit_log import AuditLog
from cotune.client.site_folder import SitePaths
from cotune.errors import RunError
from cotune.protocol.federation_file import Invitation
from cotune.protocol.key_renewal import ServerRenewal
from cotune.storage.documents import JsonDocument
from cotune.storage.files import exclusive_lock

_MOST_GENERATIONS = 256  # a server that renews its keys without end must not fill the disk with them
AUTHORITY_DAYS = 30  # that a former authority is believed after the new keys were used


class TrustedServer(BaseModel):
    """One generation of a server's keys.

    until: the last day (UTC) on which its authority is believed, where it was replaced; from then on it signs no requests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    signing_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    certificates: str
    until: date | None = None

    def is_accepted(self, today: date) -> bool:
        return self.until is None or today <= self.until

    def replaced(self, until: date) -> TrustedServer:
        """One that was replaced already keeps its own end."""
        return self if self.until is not None else self.model_copy(update={"until": until})


class Trust(BaseModel):
    """trust.json. generations: the oldest first; those that have ended stay, so that an old federation.toml is known as such, and
    what they have signed can be verified.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    federation: str
    name: str
    generations: tuple[TrustedServer, ...] = Field(min_length=1)

    @classmethod
    def read(cls, site: Path) -> Trust:
        """Raises RunError."""
        found = _document(site).read()
        if found is None:
            raise RunError(
                f"{site} does not know by which key its server signs: run `cotune client join` with the federation.toml of a"
                " coordinator whose cotune signs its requests",
                code="run.not_joined",
            )
        return found

    @classmethod
    def join(cls, site: Path, invitation: Invitation) -> Trust:
        """Trusts the server of an invitation, durably. An invitation of keys that were replaced since takes nothing back; one of
        other keys, which somebody here has chosen to believe, ends those before.
        """
        offered = TrustedServer(signing_key=invitation.signing_key, certificates=invitation.certificates.decode())
        trust = cls(federation=invitation.id, name=invitation.name, generations=(offered,))
        with _changing(site):
            known = _document(site).read()
            if known is not None and known.federation == invitation.id:
                trust = known if known.find(invitation.signing_key) else known._ending_before(offered)
            return trust.write(site)

    def _ending_before(self, newest: TrustedServer) -> Self:
        yesterday = datetime.now(UTC).date() - timedelta(days=1)
        ended = [each.model_copy(update={"until": yesterday}) for each in self.generations]
        return self.model_copy(update={"generations": (*ended, newest)})

    def write(self, site: Path) -> Trust:
        _document(site).write(self)
        return self

    def find(self, signing_key: str) -> TrustedServer | None:
        return next((each for each in self.generations if each.signing_key == signing_key), None)

    @property
    def newest(self) -> TrustedServer:
        return self.generations[-1]

    def signing_keys(self) -> list[str]:
        """Those that may sign a request."""
        return [each.signing_key for each in self.generations if each.until is None]

    def certificates(self, now: datetime | None = None) -> bytes:
        """PEM: the authorities that vouch for the server."""
        today = (now or datetime.now(UTC)).date()
        accepted = [each.certificates for each in self.generations if each.is_accepted(today)]
        return "".join(dict.fromkeys(accepted)).encode()

    def following(self, renewals: Iterable[ServerRenewal]) -> Trust:
        """The same with the keys that the statements add, one after the other; those of keys that are known change nothing.

        Raises RunError for a statement in the name of the newest key that is not its own, or is of another federation, and for
        more keys than a server ever has.
        """
        trust = self
        for renewal in renewals:
            about = renewal.about
            if about.old != trust.newest.signing_key or trust.find(about.new):
                continue
            if len(trust.generations) >= _MOST_GENERATIONS:
                raise RunError(
                    f"the server of {trust.name} has renewed its keys {len(trust.generations)} times: expected fewer; ask the"
                    " coordinator why, remove node/trust.json of the site, and join with a new federation.toml"
                )
            renewal.check()
            if about.federation != trust.federation:
                raise RunError(f"the statement is of federation {about.federation[:12]}: expected {trust.federation[:12]}")
            added = TrustedServer(signing_key=about.new, certificates=renewal.certificates)
            trust = trust.model_copy(update={"generations": (*trust.generations, added)})
        return trust

    def using(self, signing_key: str, now: datetime | None = None) -> Trust:
        """The same once the server was seen to use a key: those before it are replaced."""
        until = (now or datetime.now(UTC)).date() + timedelta(days=AUTHORITY_DAYS)
        keys = [each.signing_key for each in self.generations]
        first = keys.index(signing_key)
        changed = (*(each.replaced(until) for each in self.generations[:first]), *self.generations[first:])
        return self.model_copy(update={"generations": changed})


def record_renewals(site: Path, renewals: Sequence[ServerRenewal]) -> tuple[ServerRenewal, ...]:
    """Believes a server's new keys, durably, and enters that in the site's log. Returns the statements that were new.

    Raises RunError as `Trust.following` does, and for files that cannot be written.
    """
    if not _unknown(Trust.read(site), renewals):
        return ()
    with _changing(site):
        before = Trust.read(site)
        after = before.following(renewals)
        new = tuple(each for each in _unknown(before, renewals) if after.find(each.about.new))
        for each in new:
            about = {"statement": each.statement, "signature": each.signature}
            AuditLog(site).append("keys", reason="the server's new keys, signed by its old one", **about)
        if new:
            after.write(site)
    return new


def _unknown(trust: Trust, renewals: Iterable[ServerRenewal]) -> list[ServerRenewal]:
    return [each for each in renewals if not trust.find(each.about.new)]


def record_use(site: Path, signing_key: str, now: datetime | None = None) -> None:
    """The server has signed with a key that the site accepts: what it has replaced is at its end."""
    with _changing(site):
        before = Trust.read(site)
        after = before.using(signing_key, now)
        if after != before:
            after.write(site)


def _document(site: Path) -> JsonDocument[Trust]:
    return JsonDocument(SitePaths(site).node.trust, Trust, advice="remove it, and join with the federation.toml")


def _changing(site: Path) -> AbstractContextManager[None]:
    node = SitePaths(site).node
    node.create()
    return exclusive_lock(node.trust_lock)

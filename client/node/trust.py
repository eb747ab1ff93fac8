"""Whose requests a site accepts: the federation that it has joined, its signing keys, and the authorities of its server.

node/trust.json    in the site; written when it joins, and when the server's keys are renewed

New keys of a server are accepted only with a statement by the newest trusted key: a stolen key that was replaced cannot introduce
another one. Both keys are accepted until the server uses the new one. From then on, signatures of the old key are refused; its
authority is trusted for another month, as the new server certificate takes effect only after a restart.
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
from cotune.storage.files import exclusive_lock
from cotune.storage.json_documents import JsonDocument

_MAX_GENERATIONS = 256  # so that a server cannot fill the disk by renewing its keys
AUTHORITY_DAYS = 30  # for which a former authority is trusted after the new keys were first used


class TrustedServer(BaseModel):
    """One generation of a server's keys.

    Attributes:
        signing_key: Ed25519, as hex.
        certificates: Of its authorities, in PEM.
        until: The last day (UTC) on which its authorities are trusted, where it was replaced; a replaced key signs no requests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    signing_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    certificates: str
    until: date | None = None

    def is_accepted(self, today: date) -> bool:
        """Return whether its authorities are trusted on a day."""
        return self.until is None or today <= self.until

    def replaced(self, until: date) -> TrustedServer:
        """Return it marked as replaced; one that was already replaced keeps its date."""
        return self if self.until is not None else self.model_copy(update={"until": until})


class Trust(BaseModel):
    """trust.json.

    Attributes:
        federation: Its id.
        name: Its name.
        generations: Of the server's keys, the oldest first. Expired ones are kept, so that an old federation.toml is recognized,
            and old signatures can be verified.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    federation: str
    name: str
    generations: tuple[TrustedServer, ...] = Field(min_length=1)

    @classmethod
    def read(cls, site: Path) -> Trust:
        """Read a site's trust; raises RunError if it has joined no federation, or the file is damaged."""
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
        """Trust the server of an invitation, durably.

        An invitation with keys that were replaced since then changes nothing; one with unknown keys, which a person has chosen to
        trust by joining, replaces the existing ones.
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
        """Write it to the site, durably."""
        _document(site).write(self)
        return self

    def find(self, signing_key: str) -> TrustedServer | None:
        """Return the generation with a signing key; None if there is none."""
        return next((each for each in self.generations if each.signing_key == signing_key), None)

    @property
    def newest(self) -> TrustedServer:
        """The newest generation, whose statements introduce the next."""
        return self.generations[-1]

    def signing_keys(self) -> list[str]:
        """Return the keys that may sign a request."""
        return [each.signing_key for each in self.generations if each.until is None]

    def certificates(self, now: datetime | None = None) -> bytes:
        """Return the trusted authorities of the server, in PEM."""
        today = (now or datetime.now(UTC)).date()
        accepted = [each.certificates for each in self.generations if each.is_accepted(today)]
        return "".join(dict.fromkeys(accepted)).encode()

    def following(self, renewals: Iterable[ServerRenewal]) -> Trust:
        """Return the trust extended by the keys in statements, one after the other; known keys change nothing.

        Raises:
            RunError: If a statement in the name of the newest key is not signed by it, or is for another federation; or if there
                are implausibly many keys.
        """
        trust = self
        for renewal in renewals:
            about = renewal.about
            if about.old != trust.newest.signing_key or trust.find(about.new):
                continue
            if len(trust.generations) >= _MAX_GENERATIONS:
                raise RunError(
                    f"the server of {trust.name} has renewed its keys {len(trust.generations)} times: expected fewer; ask the"
                    " coordinator why, remove node/trust.json of the site, and join with a new federation.toml",
                    code="run.too_many_renewals",
                )
            renewal.check()
            if about.federation != trust.federation:
                raise RunError(
                    f"the statement is of federation {about.federation[:12]}: expected {trust.federation[:12]}",
                    code="run.wrong_federation",
                )
            added = TrustedServer(signing_key=about.new, certificates=renewal.certificates)
            trust = trust.model_copy(update={"generations": (*trust.generations, added)})
        return trust

    def using(self, signing_key: str, now: datetime | None = None) -> Trust:
        """Return the trust after the server has used a key: earlier keys are replaced."""
        until = (now or datetime.now(UTC)).date() + timedelta(days=AUTHORITY_DAYS)
        keys = [each.signing_key for each in self.generations]
        first = keys.index(signing_key)
        changed = (*(each.replaced(until) for each in self.generations[:first]), *self.generations[first:])
        return self.model_copy(update={"generations": changed})


def record_renewals(site: Path, renewals: Sequence[ServerRenewal]) -> tuple[ServerRenewal, ...]:
    """Trust a server's new keys durably, and enter them in the site's audit log.

    Returns:
        The statements that were new.

    Raises:
        RunError: If a statement is not valid (see `Trust.following`), or a file cannot be written.
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
    """Record that the server has signed with a key that the site accepts; earlier keys are replaced.

    Args:
        site: Folder of the site.
        signing_key: As hex.
        now: The current time; None: read the clock.
    """
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

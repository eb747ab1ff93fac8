"""Whom a site believes when a server's keys are renewed; hostile statements are in tests/attacks/test_forged_renewals.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cotune.client.audit_log import AuditLog
from cotune.client.node.trust import AUTHORITY_DAYS, Trust, TrustedServer, record_renewals, record_use
from cotune.errors import RunError
from cotune.protocol.key_renewal import ServerRenewal
from cotune.server.deployment.keys.certificates import create_next_authority, read_authority_pem
from tests.support.kills import killed_before_each_change

FED = 32 * "a"
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in range(1, 5)]
HEX = [key.public_key().public_bytes_raw().hex() for key in KEYS]


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [tmp_path_factory.mktemp("authority") for _ in KEYS]
    for folder in folders:
        create_next_authority(folder)
    return [read_authority_pem(folder) for folder in folders]


@pytest.fixture
def chain(authorities: list[str]) -> list[ServerRenewal]:
    """From the first key to the second, and so on."""
    return [ServerRenewal.make(FED, old, new, pem) for old, new, pem in zip(KEYS[:-1], KEYS[1:], authorities[1:], strict=True)]


@pytest.fixture
def site(tmp_path: Path, authorities: list[str]) -> Path:
    """One that trusts the first."""
    Trust(federation=FED, name="fed", generations=(TrustedServer(signing_key=HEX[0], certificates=authorities[0]),)).write(
        tmp_path
    )
    return tmp_path


def test_new_keys_are_learned_one_after_the_other_and_once(
    site: Path, chain: list[ServerRenewal], authorities: list[str]
) -> None:
    assert record_renewals(site, chain[:1]) == tuple(chain[:1])
    assert record_renewals(site, chain) == tuple(chain[1:])
    assert record_renewals(site, chain) == ()
    assert Trust.read(site).signing_keys() == HEX
    assert Trust.read(site).certificates().decode() == "".join(authorities)
    entries = AuditLog(site).entries()
    assert [(entry["what"], entry["statement"]) for entry in entries] == [("keys", each.statement) for each in chain]


def test_anyone_who_joined_in_between_takes_what_follows_it(tmp_path: Path, chain: list[ServerRenewal]) -> None:
    for number, key in enumerate(HEX):
        start = Trust(federation=FED, name="fed", generations=(TrustedServer(signing_key=key, certificates=""),))
        assert start.following(chain).signing_keys() == HEX[number:]


def test_key_ends_when_the_next_is_used_and_its_authority_later(
    site: Path, chain: list[ServerRenewal], authorities: list[str]
) -> None:
    record_renewals(site, chain[:1])
    now = datetime.now(UTC)
    record_use(site, HEX[0], now)
    assert Trust.read(site).signing_keys() == HEX[:2]
    record_use(site, HEX[1], now)
    trust = Trust.read(site)
    assert trust.signing_keys() == HEX[1:2]
    assert trust.certificates(now + timedelta(days=AUTHORITY_DAYS)).decode() == authorities[0] + authorities[1]
    assert trust.certificates(now + timedelta(days=AUTHORITY_DAYS + 1)).decode() == authorities[1]
    record_use(site, HEX[1], now + timedelta(days=9))
    assert Trust.read(site) == trust


def test_a_kill_leaves_the_trust_before_or_after(site: Path, chain: list[ServerRenewal], monkeypatch: pytest.MonkeyPatch) -> None:
    before = Trust.read(site)
    after = before.following(chain)
    seen = set[bool]()
    for _ in killed_before_each_change(monkeypatch, lambda: record_renewals(site, chain)):
        assert Trust.read(site) in (before, after)
        seen.add(Trust.read(site) == after)
    assert seen == {False, True}


def test_nothing_is_believed_that_cannot_be_entered_in_the_log(site: Path, chain: list[ServerRenewal]) -> None:
    (site / "audit.jsonl").mkdir()
    with pytest.raises(RunError):
        record_renewals(site, chain)
    assert Trust.read(site).signing_keys() == HEX[:1]

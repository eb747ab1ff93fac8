"""An organization renews the key of its node, and may be killed at any moment of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from cotune.client.node.connector import Connector
from cotune.client.node.keys import activate_next_key, read_next_key, read_public_keys, renew_key
from cotune.client.node.trust import Trust, TrustedServer
from cotune.client.site import Site
from cotune.client.site_setup import get_key_fingerprint, make_site, read_private_key
from cotune.errors import RunError
from cotune.flower.fleet_errors import FleetError, NodeRejected
from cotune.protocol.key_renewal import fingerprint, read_node_renewal
from cotune.server.deployment.members import Members, read_public_key
from tests.support.kills import killed_before_each_change
from tests.support.signing import FEDERATION


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """One that has joined."""
    made = make_site(tmp_path / "site", "hospital-a", device="cpu")
    Trust(federation=FEDERATION, name="fed", generations=(TrustedServer(signing_key=64 * "0", certificates=""),)).write(
        made.folder
    )
    return made


@pytest.fixture
def members(tmp_path: Path, site: Site) -> Members:
    """The coordinator's list, with the site's key."""
    made = Members(tmp_path / "members.json")
    made.invite("hospital-a", read_public_key(site.folder / "node.pub"), (10, 20))
    return made


def accept(members: Members, site: Site) -> None:
    members.renew(read_node_renewal(site.folder / "node-renewal.json"), FEDERATION)


class Server:
    """Lets in whose keys are those of active members."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self.entered = list[str]()
        self.down = False

    @contextmanager
    def connect(self, address: str, certificates: bytes | None, key: EllipticCurvePrivateKey, *known: Any) -> Iterator[Any]:
        if self.down:
            raise FleetError("it cannot be reached")
        shown = fingerprint(key.public_key())
        if shown not in {member.fingerprint for member in self._members.active()}:
            raise NodeRejected("it is no member's key")
        self.entered.append(shown)
        yield "fleet"


def entrance(site: Site, server: Server) -> Connector:
    return Connector(site.folder, "localhost:1", None, site.folder / "node.key", server.connect)


def enter(site: Site, server: Server) -> None:
    with entrance(site, server)(None, False):
        pass


def test_the_node_changes_over_once_the_coordinator_has_accepted(site: Site, members: Members) -> None:
    old = get_key_fingerprint(site)
    server = Server(members)
    _, new = renew_key(site)
    enter(site, server)
    assert get_key_fingerprint(site) == old  # nobody has accepted it yet
    accept(members, site)
    enter(site, server)
    assert server.entered == [old, new]
    assert get_key_fingerprint(site) == new
    assert read_public_key(site.folder / "node.pub") == members.active()[0].public_key
    assert (site.folder / "node.pub").read_text().split()[2:] == ["hospital-a"]
    assert read_next_key(site.folder) is None
    assert [fingerprint(key) for key in read_public_keys(site.folder)] == [new, old]
    assert (site.folder / "node.key").stat().st_mode & 0o777 == 0o600
    enter(site, server)
    assert server.entered[-1] == new


def test_renewal_shuts_the_old_key_out(site: Site, members: Members) -> None:
    before = members.active()[0]
    other = make_site(site.folder.parent / "other", "hospital-b", device="cpu")
    members.invite("hospital-b", read_public_key(other.folder / "node.pub"))
    renew_key(site)
    accept(members, site)
    accept(members, site)  # the same again
    former, present, later = members.all()
    assert former.revoked
    assert (former.fingerprint, present.name, present.examples) == (before.fingerprint, "hospital-a", (10, 20))
    assert members.active() == (present, later)  # in the order of the invitations, as before
    with pytest.raises(RunError):
        members.invite("hospital-a", before.public_key)


def test_the_same_renewal_again_is_one_key_and_one_statement(site: Site) -> None:
    file, new = renew_key(site)
    written = file.read_bytes()
    assert renew_key(site) == (file, new)
    assert file.read_bytes() == written


def test_a_second_renewal_follows_the_first(site: Site, members: Members) -> None:
    server = Server(members)
    for count in (2, 3):
        renew_key(site)
        accept(members, site)
        enter(site, server)
        assert len(read_public_keys(site.folder)) == count
    assert len(set(server.entered)) == 2


def test_where_neither_key_is_known_nothing_is_taken(site: Site, members: Members) -> None:
    renew_key(site)
    members.revoke("hospital-a")
    with pytest.raises(NodeRejected):
        enter(site, Server(members))
    assert read_next_key(site.folder) is not None


def test_a_server_that_is_away_is_no_reason_for_another_key(site: Site, members: Members) -> None:
    server = Server(members)
    renew_key(site)
    accept(members, site)
    server.down = True
    with pytest.raises(FleetError):
        enter(site, server)
    assert read_next_key(site.folder) is not None


def test_a_site_that_has_joined_nobody_has_nothing_to_renew(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        renew_key(make_site(tmp_path / "other", "b", device="cpu"))


def test_a_kill_while_the_key_is_made_leaves_a_node_that_gets_in(
    site: Site, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in killed_before_each_change(monkeypatch, lambda: renew_key(site)):
        enter(site, Server(members))
    accept(members, site)
    enter(site, Server(members))


def test_node_gets_in_after_a_kill_while_it_takes_its_key(
    site: Site, members: Members, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, (_, new) = get_key_fingerprint(site), renew_key(site)
    accept(members, site)
    following = read_next_key(site.folder)
    copy = tmp_path / "copy"
    assert following is not None
    shutil.copytree(site.folder, copy)
    counts = []
    for made in killed_before_each_change(monkeypatch, lambda: activate_next_key(site.folder, following)):
        counts.append(made)
        enter(site, Server(members))
        assert fingerprint(read_private_key(site.folder / "node.key").public_key()) == new
        assert {fingerprint(key) for key in read_public_keys(site.folder)} == {old, new}
        assert read_public_key(site.folder / "node.pub") == members.active()[0].public_key
        shutil.rmtree(site.folder)
        shutil.copytree(copy, site.folder)
    assert counts == [0, 1, 2, 3]


def test_coordinator_keeps_one_key_after_a_kill(site: Site, members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    _, new = renew_key(site)
    for _ in killed_before_each_change(monkeypatch, lambda: accept(members, site)):
        assert len(members.active()) == 1
        enter(site, Server(members))
    assert members.active()[0].fingerprint == new


def test_only_the_sites_own_key_is_ever_replaced(site: Site, members: Members, tmp_path: Path) -> None:
    shutil.copy2(site.folder / "node.key", tmp_path / "elsewhere.key")
    renew_key(site)
    accept(members, site)
    with (
        pytest.raises(NodeRejected),
        Connector(site.folder, "localhost:1", None, tmp_path / "elsewhere.key", Server(members).connect)(None, False),
    ):
        pass

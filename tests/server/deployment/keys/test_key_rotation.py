"""The federation's own keys are renewed: announced, learned, put into use; and a kill at any moment of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.audit_log import AuditLog
from cotune.client.node.keys import activate_next_key, read_next_key, renew_key
from cotune.client.node.keys import read_public_keys as node_public_keys
from cotune.client.node.requests import countersign, verify_request
from cotune.client.node.trust import Trust, record_renewals, record_use
from cotune.client.site_setup import make_site
from cotune.errors import RunError
from cotune.plan.load import parse_plan
from cotune.protocol.key_renewal import read_node_renewal, read_server_renewals
from cotune.protocol.messages import Recipient, encode_requests
from cotune.protocol.signatures import content_digest
from cotune.protocol.statements import TRAIN, UPDATE
from cotune.protocol.trail_comparison import compare_ends, read_coordinator_end, read_organization_end
from cotune.server.deployment.creation import create_federation, renew_server
from cotune.server.deployment.federation import FederationFolder, ServerConfig
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.keys import key_rotation as rotation
from cotune.server.deployment.keys.signing import public_hex, public_keys, read_signing_key
from cotune.server.deployment.members import read_public_key
from cotune.server.deployment.signed_trail import SignedTrail, read_trail, read_verification_keys
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder
from tests.support.kills import killed_before_each_change


@pytest.fixture
def fed(base_model: Callable[[str], Path], tmp_path: Path) -> FederationFolder:
    table = {"model": {"base": str(base_model("bert"))}, "data": {"source": "x.csv"}, "labels": ["a", "b"], "privacy": "none"}
    config = ServerConfig(name="toy", hosts=("fed.example.org",), device="cpu")
    return create_federation(tmp_path / "fed", parse_plan(table), config)


@pytest.fixture
def site(fed: FederationFolder, tmp_path: Path) -> Path:
    """One that has joined before."""
    (tmp_path / "site").mkdir()
    Trust.join(tmp_path / "site", fed.invitation)
    return tmp_path / "site"


def signing_key(fed: FederationFolder) -> str:
    return public_hex(read_signing_key(fed.certificates))


def believes(site: Path, fed: FederationFolder) -> bool:
    """Whether a site takes the certificate that the server would show now, and the key that it signs with."""
    server = x509.load_pem_x509_certificate((fed.certificates / "server.crt").read_bytes())
    trust = Trust.read(site)
    vouched = False
    for authority in x509.load_pem_x509_certificates(trust.certificates()):
        try:
            server.verify_directly_issued_by(authority)
            vouched = True
        except (ValueError, InvalidSignature):
            continue
    return vouched and signing_key(fed) in trust.signing_keys()


def test_keys_are_announced_learned_and_put_into_use(fed: FederationFolder, site: Path) -> None:
    old = signing_key(fed)
    authority = certificates.read_authority_pem(fed.certificates)
    renewal = rotation.announce_keys(fed)
    assert rotation.announce_keys(fed) == renewal
    assert signing_key(fed) == old
    assert rotation.read_renewals(fed.certificates) == read_server_renewals(fed.files.server_renewals) == [renewal]
    record_renewals(site, rotation.read_renewals(fed.certificates))
    assert believes(site, fed)
    rotation.activate_keys(fed)
    assert signing_key(fed) == renewal.about.new != old
    assert public_keys(fed.certificates) == [renewal.about.new, old]
    assert certificates.read_authority_pem(fed.certificates) == renewal.certificates != authority
    for host in ("fed.example.org", "localhost"):
        certificates.check_certificate(fed.certificates, host)
    assert believes(site, fed)
    record_use(site, signing_key(fed))
    assert believes(site, fed)
    assert rotation.read_announced(fed.certificates) is None
    assert rotation.read_renewals(fed.certificates) == [renewal]
    assert (fed.invitation.signing_key, fed.invitation.certificates.decode()) == (renewal.about.new, renewal.certificates)
    assert {path.stat().st_mode & 0o077 for path in fed.path.rglob("*")} == {0}


def test_anyone_who_was_away_for_two_renewals_learns_both(fed: FederationFolder, site: Path) -> None:
    for _ in range(2):
        rotation.announce_keys(fed)
        rotation.activate_keys(fed)
    assert len(public_keys(fed.certificates)) == 3
    assert not believes(site, fed)
    record_renewals(site, rotation.read_renewals(fed.certificates))
    assert believes(site, fed)


def test_a_certificate_can_be_renewed_afterwards(fed: FederationFolder) -> None:
    rotation.announce_keys(fed)
    renew_server(fed)
    rotation.activate_keys(fed)
    before = (fed.certificates / "server.crt").read_bytes()
    assert renew_server(fed) is False
    assert (fed.certificates / "server.crt").read_bytes() != before
    certificates.check_certificate(fed.certificates, "fed.example.org")


def test_the_old_authority_is_not_needed(fed: FederationFolder) -> None:
    """Its key may be kept elsewhere."""
    (fed.certificates / "ca.key").unlink()
    rotation.announce_keys(fed)
    rotation.activate_keys(fed)
    certificates.check_certificate(fed.certificates, "fed.example.org")


def test_what_was_not_announced_cannot_be_used(fed: FederationFolder) -> None:
    for act in (rotation.activate_keys, rotation.list_members_without_keys):
        with pytest.raises(RunError):
            act(fed)


def test_a_kill_while_they_are_made_leaves_the_old_ones(
    fed: FederationFolder, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = signing_key(fed)
    for _ in killed_before_each_change(monkeypatch, lambda: rotation.announce_keys(fed)):
        assert signing_key(fed) == old
        record_renewals(site, rotation.read_renewals(fed.certificates))
        assert believes(site, fed)
    assert len(Trust.read(site).generations) == 2
    assert [path.name for path in fed.certificates.glob(".next*")] == []


def test_kill_while_switching_leaves_working_keys(
    fed: FederationFolder, site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether a site has learned them beside a request or not: before the first change nothing is used."""
    old = signing_key(fed)
    new = rotation.announce_keys(fed).about.new
    record_renewals(site, rotation.read_renewals(fed.certificates))
    shutil.copytree(fed.path, tmp_path / "copy")
    used = list[bool]()
    for made in killed_before_each_change(monkeypatch, lambda: rotation.activate_keys(fed)):
        used.append(signing_key(fed) == new)
        assert signing_key(fed) in (old, new)
        assert believes(site, fed)
        assert set(public_keys(fed.certificates)) >= ({old, new} if used[-1] else {old})
        certificates.check_certificate(
            fed.certificates, "localhost"
        )  # the processes here believe each other, whichever they have loaded
        assert [each.about.new for each in rotation.read_renewals(fed.certificates)] == [new]
        assert fed.invitation.signing_key in (old, new)
        rotation.finish_activation(fed)
        assert signing_key(fed) == (old if made == 0 else new)
        assert (rotation.read_announced(fed.certificates) is None) == (made > 0)
        assert renew_server(fed) is False
        shutil.rmtree(fed.path)
        shutil.copytree(tmp_path / "copy", fed.path)
    assert used == sorted(used)
    assert {False, True} == set(used)
    assert len(used) > 6


def test_trail_ends_agree_over_the_renewal_of_every_key(fed: FederationFolder, tmp_path: Path) -> None:
    """Two rounds, between which the organization's key, the server's and the authority are renewed; site and server as they are."""
    site = make_site(tmp_path / "north", "north", device="cpu")
    Trust.join(site.folder, fed.invitation)
    fed.members.invite("north", read_public_key(site.folder / "node.pub"))
    people = (Participant(name="north"),)
    file = RunFile(run="1" * 32, created="now", engine="superlink", device="cpu", participants=people, federation=str(fed.path))
    folder = RunFolder.create(fed.path / "runs" / "1", fed.plan, file)
    trail = SignedTrail(folder)
    log = AuditLog(site.folder)
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1

    def play(round: int) -> None:
        """A request there, and an answer back."""
        [content] = encode_requests(fed.plan.canonical(), round, {}, [Recipient("north")])
        trail.sign(TRAIN, round, {"north": content}, [Recipient("north")], "", ["north"])
        _, requested = verify_request(content, site.folder)
        log.append("request", **requested.entry())
        answer = RecordDict({"update": ConfigRecord({"round": round})})
        digest = content_digest(answer)
        log.append("update", sha256=digest, **countersign(answer, UPDATE, digest, requested, site.folder))
        assert trail.accept(Message(answer, 1, "train"), UPDATE, round, "north") == ""

    play(1)
    renew_key(site)
    fed.members.renew(read_node_renewal(site.folder / "node-renewal.json"), fed.config.id)
    following = read_next_key(site.folder)
    assert following is not None
    activate_next_key(site.folder, following)
    rotation.announce_keys(fed)
    assert rotation.list_members_without_keys(fed) == ["north"]
    play(2)
    assert rotation.list_members_without_keys(fed) == []
    rotation.activate_keys(fed)
    play(3)
    server, nodes = read_verification_keys(folder)
    assert (len(server), len(nodes["north"])) == (2, 2)
    own = [each.signing_key for each in Trust.read(site.folder).generations]
    for server_keys, node_keys in ((server, nodes["north"]), (own, node_public_keys(site.folder))):
        here = read_coordinator_end(read_trail(folder.path), "north", server_keys, node_keys)
        found = compare_ends(here, read_organization_end(log.entries(), server_keys, node_keys))
        assert (found.requests, found.replies, found.contradictions, found.one_sided) == (3, 3, (), ())
    newest = read_organization_end(log.entries(), server[:1], nodes["north"][-1:])
    assert len(newest.wrong) == 3  # what former keys have signed would not hold without them

"""Anyone who can put a message or a file before a site or a coordinator offers keys of its own as renewed ones: none is believed.

On commit a605cba there were no keys to renew and no statements: a stolen or lost key meant a new invitation to everybody, sent over
a channel that nobody checked. Tried here: 10 requests to a site (0 of 10 answered with an update, 0 keys believed, 0 records charged)
and 15 statements to a coordinator (0 of 15 accepted), statements that were honest once among both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from cotune.client.app import app
from cotune.client.audit_log import AuditLog
from cotune.client.node.trust import Trust
from cotune.client.site import Site
from cotune.errors import RunError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.protocol.key_renewal import NodeRenewal, ServerRenewal
from cotune.protocol.messages import Recipient, encode_requests
from cotune.protocol.statements import ReplyStatement
from cotune.server.deployment.keys.certificates import create_next_authority, read_authority_pem
from cotune.server.deployment.members import Members
from cotune.server.proxy_process import MemberKeys
from tests.support.calls import new_key, public
from tests.support.signing import FEDERATION, SERVER_KEY, sign_request

SECOND, THIRD, EVIL = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (2, 3, 66))


def hexed(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


# --- a site


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("authority")
    create_next_authority(folder)
    return read_authority_pem(folder)


@pytest.fixture
def ask(plan: Plan, site: Site, state_for: Callable[..., State]) -> Callable[..., Message]:
    """A request of round 1 that a key has signed, with statements beside it -> the site's answer."""
    state = state_for(plan)

    def asked(key: Ed25519PrivateKey, *renewals: ServerRenewal) -> Message:
        (content,) = encode_requests(plan.canonical(), 1, state, [Recipient("clinic")])
        sign_request(content, key=key)
        record = content["signed"]
        assert isinstance(record, ConfigRecord)
        record["renewals"] = ServerRenewal.join(renewals)
        return answer(content, site)

    return asked


def answer(content: RecordDict, site: Site) -> Message:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    message = Message(content, 2, MessageType.TRAIN, group_id="1")
    message.metadata.__dict__["_message_id"] = "7"
    config = UserConfig({"site": str(site.folder)})
    return app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config=UserConfig()))


Forge = Callable[[str], ServerRenewal]


def by_a_stranger(authority: str) -> ServerRenewal:
    """In the name of the server's key."""
    honest = ServerRenewal.make(FEDERATION, SERVER_KEY, EVIL, authority)
    return honest.model_copy(update={"signature": ServerRenewal.make(FEDERATION, EVIL, EVIL, authority).signature})


def of_another_federation(authority: str) -> ServerRenewal:
    return ServerRenewal.make(32 * "0", SERVER_KEY, EVIL, authority)


def with_another_authority(authority: str) -> ServerRenewal:
    return ServerRenewal.make(FEDERATION, SERVER_KEY, EVIL, "none").model_copy(update={"certificates": authority})


def of_a_key_that_the_site_does_not_know(authority: str) -> ServerRenewal:
    return ServerRenewal.make(FEDERATION, THIRD, EVIL, authority)


def of_a_key_that_nobody_has(authority: str) -> ServerRenewal:
    """The old key signs, and no one can show that it has the new one."""
    honest = ServerRenewal.make(FEDERATION, SERVER_KEY, EVIL, authority)
    return honest.model_copy(update={"confirmation": honest.signature})


@pytest.mark.parametrize(
    "forge",
    [
        by_a_stranger,
        of_another_federation,
        with_another_authority,
        of_a_key_that_the_site_does_not_know,
        of_a_key_that_nobody_has,
    ],
)
def test_a_forged_statement_teaches_a_site_nothing(site: Site, ask: Callable[..., Message], authority: str, forge: Forge) -> None:
    before = Trust.read(site.folder)
    assert ask(EVIL, forge(authority)).has_error()
    assert Trust.read(site.folder) == before
    assert not site.ledger_file.exists()
    assert [entry["what"] for entry in AuditLog(site.folder).entries()] == ["refusal"]


def test_site_learns_new_key_by_request_and_names_it_in_reply(site: Site, ask: Callable[..., Message], authority: str) -> None:
    """So that the cases above fail for what they change."""
    reply = ask(SECOND, ServerRenewal.make(FEDERATION, SERVER_KEY, SECOND, authority))
    assert not reply.has_error()
    record = reply.content["signed"]
    assert isinstance(record, ConfigRecord)
    assert ReplyStatement.parse(str(record["statement"])).trusts == hexed(SECOND)
    assert [entry["what"] for entry in AuditLog(site.folder).entries()] == ["keys", "request", "update"]
    assert len(site.ledger().spent()) == 1


def test_a_key_that_was_replaced_leads_nobody_astray(site: Site, ask: Callable[..., Message], authority: str) -> None:
    """Somebody finds the first key when the second is known: its statements for others, old and new, and its requests."""
    honest = ServerRenewal.make(FEDERATION, SERVER_KEY, SECOND, authority)
    assert not ask(SECOND, honest).has_error()
    known = Trust.read(site.folder)
    spent = len(site.ledger().spent())
    stolen = ServerRenewal.make(FEDERATION, SERVER_KEY, EVIL, authority)
    for key, renewals in ((EVIL, [stolen]), (EVIL, [honest, stolen]), (SERVER_KEY, []), (SERVER_KEY, [honest])):
        assert ask(key, *renewals).has_error()
        assert Trust.read(site.folder) == known
    assert len(site.ledger().spent()) == spent


def test_an_old_statement_takes_nothing_back(site: Site, ask: Callable[..., Message], authority: str) -> None:
    chain = [
        ServerRenewal.make(FEDERATION, SERVER_KEY, SECOND, authority),
        ServerRenewal.make(FEDERATION, SECOND, THIRD, authority),
    ]
    assert not ask(THIRD, *chain).has_error()
    known = Trust.read(site.folder)
    assert ask(SECOND, *chain[:1]).has_error()
    assert Trust.read(site.folder) == known
    assert known.signing_keys() == [hexed(THIRD)]


# --- a coordinator

KEYS = [new_key() for _ in range(4)]
OWN, NEXT, LATER, OTHERS = KEYS


def line(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def members(tmp_path: Path) -> Members:
    made = Members(tmp_path / "members.json")
    made.invite("north", line(OWN))
    made.invite("south", line(OTHERS))
    return made


def make(
    old: ec.EllipticCurvePrivateKey, new: ec.EllipticCurvePrivateKey, name: str = "north", fed: str = FEDERATION
) -> NodeRenewal:
    return NodeRenewal.make(fed, name, old, new)


def in_the_name_of_north() -> NodeRenewal:
    return make(OWN, NEXT).model_copy(update={"signature": make(NEXT, NEXT).signature})


def anothers_key_as_its_own() -> NodeRenewal:
    """South's public key, which everybody may know: north cannot sign with it."""
    honest = make(OWN, OTHERS)
    return honest.model_copy(update={"confirmation": honest.signature})


@pytest.mark.parametrize(
    "forged",
    [
        in_the_name_of_north(),
        anothers_key_as_its_own(),
        make(OWN, OTHERS),
        make(NEXT, LATER),
        make(OWN, NEXT, name="south"),
        make(OWN, NEXT, fed=32 * "0"),
        make(OWN, OWN),
    ],
    ids=["unsigned", "not-had", "a-members", "a-strangers", "anothers-name", "another-federation", "the-same"],
)
def test_a_forged_statement_gives_nobody_a_key(members: Members, forged: NodeRenewal) -> None:
    before = members.all()
    with pytest.raises(RunError):
        members.renew(forged, FEDERATION)
    assert members.all() == before


def test_an_old_statement_does_not_bring_an_old_key_back(members: Members) -> None:
    """That of the first renewal after the second; the other way round; and after a revocation."""
    first = make(OWN, NEXT)
    second = make(NEXT, LATER)
    members.renew(first, FEDERATION)
    members.renew(second, FEDERATION)
    known = members.all()
    for replayed in (first, make(NEXT, OWN), make(LATER, OWN), make(LATER, NEXT), make(OWN, new_key())):
        with pytest.raises(RunError):
            members.renew(replayed, FEDERATION)
    assert members.all() == known
    members.revoke("north")
    for replayed in (first, second, make(LATER, new_key())):
        with pytest.raises(RunError):
            members.renew(replayed, FEDERATION)
    assert [member.name for member in members.active()] == ["south"]


def test_the_front_knows_the_old_key_no_more(members: Members, tmp_path: Path) -> None:
    keys = MemberKeys(tmp_path / "members.json")
    assert (keys(public(OWN)), keys(public(NEXT))) == ("north", None)
    members.renew(make(OWN, NEXT), FEDERATION)
    assert (keys(public(OWN)), keys(public(NEXT))) == (None, "north")
    assert keys(public(OTHERS)) == "south"

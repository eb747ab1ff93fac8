from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import RunError
from cotune.protocol.key_renewal import (
    MAX_SERVER_RENEWALS,
    NodeRenewal,
    ServerRenewal,
    fingerprint,
    read_node_renewal,
    read_server_renewals,
)
from cotune.server.deployment.keys.certificates import create_next_authority, read_authority_pem

FED = 32 * "a"
OLD, NEW, OTHER = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
SIGNING, NEXT, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in (1, 2, 3))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("authority")
    create_next_authority(folder)
    return read_authority_pem(folder)


def test_node_renewal_round_trips_and_names_the_new_key() -> None:
    renewal = NodeRenewal.make(FED, "hospital-a", OLD, NEW)
    again = NodeRenewal.parse(renewal.text())
    again.check(OLD.public_key())
    assert (again, again.new_key()) == (renewal, NEW.public_key())
    assert (again.about.organization, again.about.old) == ("hospital-a", fingerprint(OLD.public_key()))


@pytest.mark.parametrize("field", ["statement", "signature", "confirmation"])
def test_node_renewal_with_a_foreign_part_is_refused(field: str) -> None:
    honest = NodeRenewal.make(FED, "hospital-a", OLD, NEW)
    other = NodeRenewal.make(FED, "hospital-a", OTHER, OLD)
    with pytest.raises(RunError):
        honest.model_copy(update={field: getattr(other, field)}).check(OLD.public_key())


def test_a_node_renewal_needs_the_old_key_and_the_new_one() -> None:
    """Else somebody could take another's public key for its own."""
    honest = NodeRenewal.make(FED, "hospital-a", OLD, NEW)
    with pytest.raises(RunError):
        honest.check(OTHER.public_key())
    with pytest.raises(RunError):
        honest.check("no key")
    with pytest.raises(RunError):
        honest.model_copy(update={"confirmation": honest.signature}).check(OLD.public_key())


def test_a_server_renewal_holds_with_its_authority_alone(authority: str, tmp_path: Path) -> None:
    renewal = ServerRenewal.make(FED, SIGNING, NEXT, authority)
    renewal.check()
    create_next_authority(tmp_path)
    other = ServerRenewal.make(FED, STRANGER, NEXT, authority)
    changes = {
        "certificates": (read_authority_pem(tmp_path), authority + authority, "", authority + "\n"),
        "signature": (other.signature, "", "zz", renewal.confirmation),
        "confirmation": (renewal.signature, ""),
        "statement": (other.statement,),
    }
    for field, values in changes.items():
        for value in values:
            with pytest.raises(RunError):
                renewal.model_copy(update={field: value}).check()


def test_a_signed_authority_that_is_two_or_none_is_refused(authority: str) -> None:
    for certificates in ("", "nothing", authority + authority):
        with pytest.raises(RunError):
            ServerRenewal.make(FED, SIGNING, NEXT, certificates).check()


def test_statements_travel_as_lines_and_only_the_last_ones(authority: str, tmp_path: Path) -> None:
    one = ServerRenewal.make(FED, SIGNING, NEXT, authority)
    two = ServerRenewal.make(FED, NEXT, STRANGER, authority)
    assert ServerRenewal.parse_all(ServerRenewal.join([one, two])) == [one, two]
    assert ServerRenewal.parse_all("") == []
    many = ServerRenewal.join([one] * 30 + [two])
    assert ServerRenewal.parse_all(many)[-1] == two
    assert len(ServerRenewal.parse_all(many)) == MAX_SERVER_RENEWALS
    with pytest.raises(RunError):
        ServerRenewal.parse_all(many + one.text())
    (tmp_path / "file").write_text(many)
    assert len(read_server_renewals(tmp_path / "file")) == MAX_SERVER_RENEWALS


@given(
    st.text(max_size=300)
    | st.fixed_dictionaries(dict.fromkeys(("statement", "signature", "confirmation"), st.text())).map(json.dumps)
)
def test_any_text_is_a_sentence_at_most(text: str) -> None:
    for act in (
        lambda: NodeRenewal.parse(text).check(OLD.public_key()),
        lambda: [r.check() for r in ServerRenewal.parse_all(text)],
    ):
        try:
            act()
        except RunError:
            continue
        assert not text.strip()


def test_a_file_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    for read in (read_node_renewal, read_server_renewals):
        with pytest.raises(RunError):
            read(tmp_path / "nowhere")
    (tmp_path / "large").write_bytes(b"\xff" * 100)
    with pytest.raises(RunError):
        read_node_renewal(tmp_path / "large")

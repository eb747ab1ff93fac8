from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cotune.errors import PlanError
from cotune.plan.load import load_plan, preset_names
from cotune.protocol.federation_file import Invitation, read_invitation
from cotune.protocol.version import PROTOCOL
from tests.support.failures import fails_with


def authority() -> str:
    """A certificate that signs itself, in PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(7)
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


CA = authority()
SIGNS = {"id": 32 * "a", "signing_key": 64 * "b"}


def invitation(address: str = "fed.example.org:9092", plan: str = "text", *overrides: str) -> Invitation:
    return Invitation("tumors", address, CA, load_plan(plan, overrides), **SIGNS)


@pytest.mark.parametrize("preset", preset_names())
def test_it_comes_through_a_file(tmp_path: Path, preset: str) -> None:
    sent = invitation(plan=preset)
    (tmp_path / "federation.toml").write_text(sent.to_toml(), encoding="utf-8")
    got = read_invitation(tmp_path / "federation.toml")
    assert (got.name, got.address, got.certificates) == ("tumors", "fed.example.org:9092", CA.encode())
    assert got.plan == sent.plan
    assert got.plan.plan_id == sent.plan.plan_id
    assert got.fingerprint == sent.fingerprint


def test_stages_are_tables_below_the_plan() -> None:
    sent = invitation("h:1", "text", 'train=[{mode="head", rounds=2}, {mode="lora", rounds=3}]')
    assert [stage.mode for stage in Invitation.from_toml(sent.to_toml()).plan.stages] == ["head", "lora"]


def test_another_server_authority_or_plan_is_another_fingerprint() -> None:
    own = invitation()
    others = [
        invitation("fed.example.com:9092"),
        invitation("fed.example.org:9092", "text", "rounds=3"),
        Invitation("tumors", own.address, authority(), own.plan, **SIGNS),
        Invitation("lungs", own.address, CA, own.plan, **SIGNS),
        Invitation("tumors", own.address, CA, own.plan, **{**SIGNS, "id": 32 * "0"}),
        Invitation("tumors", own.address, CA, own.plan, **{**SIGNS, "signing_key": 64 * "0"}),
    ]
    assert len({own.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert invitation().fingerprint == own.fingerprint


@pytest.mark.parametrize("address", ["fed.example.org:9092", "10.0.0.7:1", "localhost:65535", "[::1]:9092", "[2001:db8::7]:443"])
def test_addresses(address: str) -> None:
    assert Invitation.from_toml(invitation(address).to_toml()).address == address


@pytest.mark.parametrize(
    "address",
    ["", "fed", "fed:", ":1", "fed:0", "fed:65536", "https://fed:1", "fed:1/x", "fed:1 ", "a b:1", "::1:9", "-a:1", "fed:９"],
)
def test_what_is_no_address(address: str) -> None:
    with fails_with("plan.invalid_invitation", "server.address"):
        invitation(address)


def test_what_is_no_certificate() -> None:
    for wrong in ("", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "ca"):
        with fails_with("plan.invalid_invitation"):
            Invitation("x", "h:1", wrong, load_plan("text"), **SIGNS)


def test_another_protocol_is_told_before_anything_else() -> None:
    text = invitation().to_toml().replace(f"protocol = {PROTOCOL}", f"protocol = {PROTOCOL + 1}").replace("[server]", "[servers]")
    with fails_with("plan.other_protocol", str(PROTOCOL + 1), str(PROTOCOL)):
        Invitation.from_toml(text)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("format = 1", "format = 2", "has the format 2, expected 1"),
        ("format = 1", "", 'lacks "format"'),
        ('name = "tumors"', "", 'lacks "name"'),
        ('name = "tumors"', 'name = "tumors\\u001b[2J"', "expected printable characters only"),
        ('name = "tumors"', f'name = "{101 * "x"}"', "at most 100 characters"),
        ("[server]", "[server]\ntoken = 3", 'unknown key "server.token"'),
        ("[plan]", "[plan]\nrunds = 3", "unknown key"),
        ("[plan]", "[[plan]]", "has no plan"),
        ("[server]", "[server", "is not valid TOML"),
    ],
)
def test_a_document_that_is_not_one(old: str, new: str, sentence: str) -> None:
    text = invitation().to_toml().replace(old, new, 1)
    with pytest.raises(PlanError, match=sentence) as caught:
        Invitation.from_toml(text)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for file in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with fails_with("run.not_readable", "federation.toml"):
            read_invitation(file)

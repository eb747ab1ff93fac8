from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cotune.client.site_setup import read_certificates, read_private_key
from tests.support.failures import fails_with


def write_key(file: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, mode: int = 0o600) -> Path:
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    file.chmod(mode)
    return file


def test_a_key_as_ssh_keygen_makes_it(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    assert read_private_key(write_key(tmp_path / "key", key)).private_numbers() == key.private_numbers()


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    file = write_key(tmp_path / "key", ec.generate_private_key(ec.SECP384R1()), 0o640)
    with fails_with("run.exposed_key", "600"):
        read_private_key(file)


def test_what_is_no_key_for_a_node(tmp_path: Path) -> None:
    other = write_key(tmp_path / "other", ed25519.Ed25519PrivateKey.generate())
    (text := tmp_path / "text").write_text("no key")
    for file in (other, text, tmp_path / "gone"):
        with fails_with("run.wrong_key_file"):
            read_private_key(file)


def test_certificates_that_are_none(tmp_path: Path) -> None:
    (text := tmp_path / "text").write_text("no certificate")
    for file in (text, tmp_path / "gone"):
        with fails_with("run.wrong_certificates"):
            read_certificates(file)
    assert read_certificates(None) is None

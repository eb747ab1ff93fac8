"""The certificates by real TLS handshakes, as an organization's client would make them."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from cotune.server.deployment.keys.certificates import check_certificate, create_authority, renew_certificate
from tests.support.failures import fails_with

NOW = datetime.now(UTC)


def handshake(folder: Path, host: str, authority: Path | None = None) -> None:
    """A client that knows ca.crt connects to a server that shows server.crt. Raises ssl.SSLError as the client sees it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            context.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    server = threading.Thread(target=answer)
    server.start()
    client = ssl.create_default_context(cafile=str(authority or folder / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    try:
        client.wrap_socket(ours, server_hostname=host).close()
    finally:
        ours.close()
        server.join(600)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_authority(tmp_path / "certificates", ["fed.example.org", "192.0.2.7"])
    return tmp_path / "certificates"


@pytest.mark.parametrize("host", ["fed.example.org", "192.0.2.7", "localhost", "127.0.0.1", "::1"])
def test_clients_accept_the_server_under_each_of_its_hosts(folder: Path, host: str) -> None:
    handshake(folder, host)
    expiry = check_certificate(folder, host)
    assert timedelta(days=364) < expiry - NOW < timedelta(days=366)


@pytest.mark.parametrize("host", ["example.org", "www.fed.example.org", "192.0.2.8"])
def test_another_host_is_refused_by_client_and_check_alike(folder: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch|not valid for"):
        handshake(folder, host)
    with fails_with("run.certificate_of_other_host", "fed.example.org", "192.0.2.7"):
        check_certificate(folder, host)


def test_expired_certificate_is_refused_until_renewed(tmp_path: Path) -> None:
    create_authority(tmp_path, ["fed.example.org"], now=NOW - timedelta(days=366))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path, "fed.example.org")
    with fails_with("run.certificate_expired", "server.crt"):
        check_certificate(tmp_path, "fed.example.org")
    handed_out = (tmp_path / "ca.crt").read_bytes()
    key = (tmp_path / "server.key").read_bytes()
    assert renew_certificate(tmp_path) == check_certificate(tmp_path, "fed.example.org")
    handshake(tmp_path, "fed.example.org")
    assert ((tmp_path / "ca.crt").read_bytes(), (tmp_path / "server.key").read_bytes()) == (handed_out, key)


def test_a_certificate_of_tomorrow_is_refused(tmp_path: Path) -> None:
    create_authority(tmp_path, ["fed.example.org"], now=NOW + timedelta(days=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        handshake(tmp_path, "fed.example.org")
    with fails_with("run.certificate_not_yet_valid"):
        check_certificate(tmp_path, "fed.example.org")


def test_an_authority_whose_time_is_over_cannot_renew(tmp_path: Path) -> None:
    create_authority(tmp_path, [], now=NOW - timedelta(days=3651))
    for act in (renew_certificate, check_certificate):
        with fails_with("run.certificate_expired", "ca.crt"):
            act(tmp_path)


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    create_authority(tmp_path, [], now=NOW - timedelta(days=3600))
    assert timedelta(days=49) < renew_certificate(tmp_path) - NOW < timedelta(days=51)


def test_renewal_may_change_the_hosts(folder: Path) -> None:
    renew_certificate(folder, ["new.example.org"])
    handshake(folder, "new.example.org")
    with fails_with("run.certificate_of_other_host"):
        check_certificate(folder, "fed.example.org")


def test_another_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", ["fed.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(folder, "fed.example.org", authority=tmp_path / "other" / "ca.crt")
    (folder / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with fails_with("run.certificate_of_other_authority"):
        check_certificate(folder, "fed.example.org")
    with fails_with("run.key_of_other_certificate", "ca.key", "ca.crt"):
        renew_certificate(folder)


def test_the_key_of_another_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", [])
    (folder / "server.key").write_bytes((tmp_path / "other" / "server.key").read_bytes())
    with fails_with("run.key_of_other_certificate", "server.key", "server.crt"):
        check_certificate(folder)


@pytest.mark.parametrize("name", ["ca.crt", "server.crt", "server.key"])
def test_missing_and_broken_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"-----BEGIN NOTHING-----")
    with fails_with("run.invalid_key" if name.endswith(".key") else "run.invalid_certificate", name):
        check_certificate(folder)
    (folder / name).unlink()
    with fails_with("run.not_readable", name):
        check_certificate(folder)


def test_keys_are_for_their_owner_alone(folder: Path) -> None:
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "server.crt", "server.key"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with fails_with("run.folder_exists", name):
        create_authority(tmp_path, ["fed.example.org"])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "host", ["", "fed.example.org:9092", "https://fed.example.org", "*.example.org", "-a.org", "münchen.de", "a..b", "a b"]
)
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with fails_with("run.invalid_host"):
        create_authority(tmp_path / "certificates", [host])
    assert not (tmp_path / "certificates").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with fails_with("run.not_writable", "ca.key"):
        create_authority(tmp_path / "file" / "certificates", [])


def test_the_authority_signs_servers_only_and_the_server_nothing(folder: Path) -> None:
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert server.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    assert [use.dotted_string for use in server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] == [
        "1.3.6.1.5.5.7.3.1"
    ]

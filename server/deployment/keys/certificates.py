"""The coordinator's certificate authority and its server certificate, by which organizations authenticate the server.

After the authority was replaced (key_rotation.py), ca.crt contains the previous one, too, in second place: a process with a
certificate of that authority is trusted on this machine until it is restarted. Organizations receive only the first
(`read_authority_pem`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cotune.errors import RunError
from cotune.server.deployment.keys.x509_building import (
    _parse_host,
    build_alternatives,
    build_authority,
    build_server,
    is_issuer,
    list_alternatives,
)
from cotune.server.deployment.layout import CertificateFiles
from cotune.storage.files import atomic_write

_NEW_AUTHORITY = "make a new authority, and give its ca.crt to every organization"  # advice if it has expired


def create_authority(folder: Path, hosts: Sequence[str], *, now: datetime | None = None) -> None:
    """Create a certificate authority (10 years) and a server certificate (1 year); keys have the mode 0600.

    Args:
        folder: The folder of certificates.
        hosts: Names or IP addresses of the server; those of the loopback interface are added.
        now: The current time; None: read the clock.

    Raises:
        RunError: If a host is not valid, a file exists already, or the folder cannot be written.
    """
    files = CertificateFiles(folder)
    alternatives = build_alternatives(hosts)
    present = [file.name for file in (files.authority, files.authority_key, files.server, files.server_key) if file.exists()]
    if present:
        raise RunError(
            f"{folder} holds {', '.join(present)} already: choose an empty folder, or renew the certificate there",
            code="run.folder_exists",
        )
    now = now or datetime.now(UTC)
    authority, authority_key = _write_authority(files, now)
    server_key = ec.generate_private_key(ec.SECP384R1())
    _write(files.server_key, _key_bytes(server_key))
    server = build_server(server_key.public_key(), alternatives, authority, authority_key, now)
    _write(files.server, _certificate_bytes(server))


def renew_certificate(folder: Path, hosts: Sequence[str] | None = None, *, now: datetime | None = None) -> datetime:
    """Renew the server's certificate for the same key, with one atomic write. Organizations keep their ca.crt.

    Args:
        folder: The folder of certificates.
        hosts: Names or IP addresses of the server; by default those of the current certificate.
        now: The current time; None: read the clock.

    Returns:
        When the new certificate expires. Running processes use it after a restart.

    Raises:
        RunError: If a host is not valid, a file cannot be read, or the authority has expired.
    """
    files = CertificateFiles(folder)
    now = now or datetime.now(UTC)
    authority = _read_certificate(files.authority)
    old = _read_certificate(files.server)
    _check_lifetime(authority, files.authority, now, _NEW_AUTHORITY)
    authority_key = _read_key(files.authority_key)
    server_key = _read_key(files.server_key)
    _check_pair(authority_key, authority, folder, "ca")
    alternatives = x509.SubjectAlternativeName(list_alternatives(old)) if hosts is None else build_alternatives(hosts)
    fresh = build_server(server_key.public_key(), alternatives, authority, authority_key, now)
    _write(files.server, _certificate_bytes(fresh))
    return fresh.not_valid_after_utc


def create_next_authority(folder: Path, *, now: datetime | None = None) -> None:
    """Create only an authority, which is to replace the current one later.

    Args:
        folder: The folder that its certificate and key are written to.
        now: The current time; None: read the clock.

    Raises:
        RunError: If the folder cannot be written.
    """
    _write_authority(CertificateFiles(folder), now or datetime.now(UTC))


def replace_authority(folder: Path, following: Path, *, now: datetime | None = None) -> None:
    """Replace the authority; the server's key and hosts stay.

    A process that is killed between any two writes leaves certificates that are trusted on this machine; calling it again
    finishes the replacement.

    Args:
        folder: The folder of certificates.
        following: The folder with the new authority, as `create_next_authority` created it.
        now: The current time; None: read the clock.

    Raises:
        RunError: If a file cannot be read or written.
    """
    files = CertificateFiles(folder)
    now = now or datetime.now(UTC)
    authority = _read_certificate(CertificateFiles(following).authority)
    key = _read_key(CertificateFiles(following).authority_key)
    _check_pair(key, authority, following, "ca")
    former = [each for each in _read_certificates(files.authority) if each != authority][:1]
    server_key = _read_key(files.server_key)
    alternatives = list_alternatives(_read_certificate(files.server))
    _write(files.authority, b"".join(_certificate_bytes(each) for each in (authority, *former)))
    _write(files.authority_key, _key_bytes(key))
    fresh = build_server(server_key.public_key(), x509.SubjectAlternativeName(alternatives), authority, key, now)
    _write(files.server, _certificate_bytes(fresh))


def read_authority_pem(folder: Path) -> str:
    """Return the authority's certificate that organizations receive; raises RunError if it cannot be read."""
    return _certificate_bytes(_read_certificate(CertificateFiles(folder).authority)).decode("ascii")


def check_certificate(folder: Path, host: str = "localhost", *, now: datetime | None = None) -> datetime:
    """Check that a client with this ca.crt would accept the server.

    Args:
        folder: The folder of certificates.
        host: The name or IP address that the client connects to.
        now: The current time; None: read the clock.

    Returns:
        When the certificate, or the authority, expires.

    Raises:
        RunError: If a file is missing or unreadable, the key does not belong to the certificate, or the certificate is from
            another authority, for another host, expired, or not valid yet.
    """
    files = CertificateFiles(folder)
    now = now or datetime.now(UTC)
    authorities = _read_certificates(files.authority)
    server = _read_certificate(files.server)
    authority = next((each for each in authorities if is_issuer(each, server)), authorities[0])
    _check_lifetime(authority, files.authority, now, _NEW_AUTHORITY)
    _check_lifetime(server, files.server, now, "renew it")
    _check_pair(_read_key(files.server_key), server, folder, "server")
    subject = _parse_host(host)
    if subject not in list_alternatives(server):
        names = ", ".join(str(name.value) for name in list_alternatives(server))
        raise RunError(
            f"{files.server} is for {names}, expected {host}: renew it with that host", code="run.certificate_of_other_host"
        )
    try:
        PolicyBuilder().store(Store(authorities)).time(now).build_server_verifier(subject).verify(server, [])
    except VerificationError as error:
        raise RunError(
            f"{files.server} was not issued by the authority in {files.authority} ({error}): renew it",
            code="run.certificate_of_other_authority",
        ) from None
    return min(server.not_valid_after_utc, authority.not_valid_after_utc)


def _write_authority(files: CertificateFiles, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    authority = build_authority(key, now)
    _write(files.authority_key, _key_bytes(key))
    _write(files.authority, _certificate_bytes(authority))
    return authority, key


def _check_lifetime(certificate: x509.Certificate, path: Path, now: datetime, remedy: str) -> None:
    first = certificate.not_valid_before_utc
    last = certificate.not_valid_after_utc
    if now > last:
        raise RunError(
            f"{path} expired on {last:%Y-%m-%d}, and today is {now:%Y-%m-%d}: {remedy}", code="run.certificate_expired"
        )
    if now < first:
        raise RunError(
            f"{path} is valid from {first:%Y-%m-%d %H:%M} UTC, and now is {now:%Y-%m-%d %H:%M}: check the clock",
            code="run.certificate_not_yet_valid",
        )


def _check_pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, folder: Path, name: str) -> None:
    if key.public_key() != certificate.public_key():
        raise RunError(
            f"{folder / name}.key is not the key of {name}.crt: put back the file that was written with it",
            code="run.key_of_other_certificate",
        )


def _read_certificate(path: Path) -> x509.Certificate:
    return _read_certificates(path)[0]


def _read_certificates(path: Path) -> list[x509.Certificate]:
    content = _read(path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise RunError(
            f"{path} is not a certificate in PEM form: put back the file, or make a new authority", code="run.invalid_certificate"
        ) from None


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    content = _read(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):  # TypeError: it needs a password
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(
            f"{path} is not an unencrypted elliptic-curve key in PEM form: put back the file that was written there",
            code="run.invalid_key",
        )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}): expected the folder of a server's certificates", code="run.not_readable"
        ) from None


def _write(path: Path, content: bytes) -> None:
    try:
        atomic_write(path, content)  # with mode 0600
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): check the permissions and the space of its folder",
            code="run.not_writable",
        ) from None


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _certificate_bytes(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

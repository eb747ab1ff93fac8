"""The coordinator's own certificate authority and its server certificate, so that organizations know whom they talk to.

ca.crt          goes to every organization        ca.key        signs; may be kept elsewhere between renewals
server.crt      what the server shows             server.key    stays on the server

Where the authority was replaced (key_rotation.py), ca.crt holds the one before it too, second: whatever still shows a certificate
of
that one is believed on this machine until it is restarted. Organizations are given the first (`read_authority_pem`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cotune.errors import RunError
from cotune.storage.files import atomic_write

AUTHORITY_LIFETIME = timedelta(days=3650)
SERVER_LIFETIME = timedelta(days=365)
CLOCK_TOLERANCE = timedelta(hours=1)  # a certificate is valid a little earlier, for sites whose clock is behind
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the SuperLink behind the front shows the same certificate
FILES = ("ca.crt", "ca.key", "server.crt", "server.key")

_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.ASCII | re.IGNORECASE)


def create_authority(folder: Path, hosts: Sequence[str], *, now: datetime | None = None) -> None:
    """Writes a new authority and a certificate for the hosts (names or IP addresses; loopback is added), keys with mode 0600.

    The authority lives for 10 years, the certificate for 1. Raises RunError for what is no host, for files that are there
    already, and for a folder that cannot be written.
    """
    alternatives = _alternatives(hosts)
    present = [name for name in FILES if (folder / name).exists()]
    if present:
        raise RunError(f"{folder} holds {', '.join(present)} already: choose an empty folder, or renew the certificate there")
    now = now or datetime.now(UTC)
    authority, authority_key = _write_authority(folder, now)
    server_key = ec.generate_private_key(ec.SECP384R1())
    _write(folder / "server.key", _key_bytes(server_key))
    _write(
        folder / "server.crt", _certificate_bytes(_server(server_key.public_key(), alternatives, authority, authority_key, now))
    )


def renew_certificate(folder: Path, hosts: Sequence[str] | None = None, *, now: datetime | None = None) -> datetime:
    """A fresh certificate for the same key, and for other hosts if they are given; returns when it expires.

    Organizations keep their ca.crt. It is one atomic write; programs that run show it after a restart. Raises RunError for
    what is no host, for unreadable files, and for an authority that has expired.
    """
    now = now or datetime.now(UTC)
    authority = _certificate(folder / "ca.crt")
    old = _certificate(folder / "server.crt")
    _check_lifetime(authority, folder / "ca.crt", now, "make a new authority, and give its ca.crt to every organization")
    authority_key = _key(folder / "ca.key")
    server_key = _key(folder / "server.key")
    _check_pair(authority_key, authority, folder, "ca")
    alternatives = x509.SubjectAlternativeName(_alternatives_of(old)) if hosts is None else _alternatives(hosts)
    fresh = _server(server_key.public_key(), alternatives, authority, authority_key, now)
    _write(folder / "server.crt", _certificate_bytes(fresh))
    return fresh.not_valid_after_utc


def create_next_authority(folder: Path, *, now: datetime | None = None) -> None:
    """Writes a new authority alone. Raises RunError for a folder that cannot be written."""
    _write_authority(folder, now or datetime.now(UTC))


def replace_authority(folder: Path, following: Path, *, now: datetime | None = None) -> None:
    """Puts the authority in `following` in the place of the one in `folder`; the server's key and hosts stay.

    Killed between any two of its writes it leaves certificates that are believed here, and the same again finishes it. Raises
    RunError for files that cannot be read or written.
    """
    now = now or datetime.now(UTC)
    authority = _certificate(following / "ca.crt")
    key = _key(following / "ca.key")
    _check_pair(key, authority, following, "ca")
    former = [each for each in _certificates(folder / "ca.crt") if each != authority][:1]
    server_key = _key(folder / "server.key")
    alternatives = _alternatives_of(_certificate(folder / "server.crt"))
    _write(folder / "ca.crt", b"".join(_certificate_bytes(each) for each in (authority, *former)))
    _write(folder / "ca.key", _key_bytes(key))
    fresh = _server(server_key.public_key(), x509.SubjectAlternativeName(alternatives), authority, key, now)
    _write(folder / "server.crt", _certificate_bytes(fresh))


def read_authority_pem(folder: Path) -> str:
    """The authority that organizations are given. Raises RunError."""
    return _certificate_bytes(_certificate(folder / "ca.crt")).decode("ascii")


def check_certificate(folder: Path, host: str = "localhost", *, now: datetime | None = None) -> datetime:
    """When the certificate for a host (a name or an IP address) expires.

    Raises RunError when a client with this ca.crt would refuse the server: a file that is missing or unreadable, a key of
    another certificate, another authority, another host, expired, not yet valid.
    """
    now = now or datetime.now(UTC)
    authorities = _certificates(folder / "ca.crt")
    server = _certificate(folder / "server.crt")
    authority = next((each for each in authorities if _has_signed(each, server)), authorities[0])
    _check_lifetime(authority, folder / "ca.crt", now, "make a new authority, and give its ca.crt to every organization")
    _check_lifetime(server, folder / "server.crt", now, "renew it")
    _check_pair(_key(folder / "server.key"), server, folder, "server")
    subject = _alternative(host)
    if subject not in _alternatives_of(server):
        names = ", ".join(str(name.value) for name in _alternatives_of(server))
        raise RunError(f"{folder / 'server.crt'} is for {names}, expected {host}: renew it with that host")
    try:
        PolicyBuilder().store(Store(authorities)).time(now).build_server_verifier(subject).verify(server, [])
    except VerificationError as error:
        raise RunError(f"{folder / 'server.crt'} is not one that {folder / 'ca.crt'} vouches for ({error}): renew it") from None
    return min(server.not_valid_after_utc, authority.not_valid_after_utc)


def _write_authority(folder: Path, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    authority = _authority(key, now)
    _write(folder / "ca.key", _key_bytes(key))
    _write(folder / "ca.crt", _certificate_bytes(authority))
    return authority, key


def _has_signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cotune authority")])
    return (
        _certificate_of(key.public_key(), name, name, now, now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    public_key: ec.EllipticCurvePublicKey,
    alternatives: x509.SubjectAlternativeName,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cotune server")])
    until = min(now + SERVER_LIFETIME, authority.not_valid_after_utc)
    return (
        _certificate_of(public_key, name, authority.subject, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _certificate_of(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys((*hosts, *LOOPBACK))])


def _alternative(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not _NAME.fullmatch(host):
            example = "expected a name such as fed.example.org or an IP address, without a port"
            raise RunError(f"{host[:80]!r} is no host: {example}") from None
        return x509.DNSName(host.lower())


def _alternatives_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _check_lifetime(certificate: x509.Certificate, path: Path, now: datetime, remedy: str) -> None:
    first = certificate.not_valid_before_utc
    last = certificate.not_valid_after_utc
    if now > last:
        raise RunError(f"{path} expired on {last:%Y-%m-%d}, and today is {now:%Y-%m-%d}: {remedy}")
    if now < first:
        raise RunError(f"{path} is valid from {first:%Y-%m-%d %H:%M} UTC, and now is {now:%Y-%m-%d %H:%M}: check the clock")


def _check_pair(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, folder: Path, name: str) -> None:
    if key.public_key() != certificate.public_key():
        raise RunError(f"{folder / name}.key is not the key of {name}.crt: put back the file that was written with it")


def _certificate(path: Path) -> x509.Certificate:
    return _certificates(path)[0]


def _certificates(path: Path) -> list[x509.Certificate]:
    content = _read(path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise RunError(f"{path} is not a certificate in PEM form: put back the file, or make a new authority") from None


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    content = _read(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):  # TypeError: it wants a password
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(f"{path} is not an unencrypted elliptic-curve key in PEM form: put back the file that was written there")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): expected the folder of a server's certificates") from None


def _write(path: Path, content: bytes) -> None:
    try:
        atomic_write(path, content)  # with mode 0600
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): check the permissions and the space of its folder"
        ) from None


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _certificate_bytes(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

"""Build X.509 certificates of an authority and of a server that it signs, without file access."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cotune.errors import RunError

AUTHORITY_LIFETIME = timedelta(days=3650)
SERVER_LIFETIME = timedelta(days=365)
CLOCK_TOLERANCE = timedelta(hours=1)  # a certificate is valid that much earlier, for sites whose clock is slow
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the SuperLink behind the front uses the same certificate
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.ASCII | re.IGNORECASE)


def is_issuer(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Return whether the authority has signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def build_authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """Build a self-signed authority that may sign only server certificates, not other authorities."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cotune authority")])
    return (
        _build_certificate(key.public_key(), name, name, now, now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_build_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def build_server(
    public_key: ec.EllipticCurvePublicKey,
    alternatives: x509.SubjectAlternativeName,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> x509.Certificate:
    """Build a TLS server certificate, which expires no later than its authority.

    Args:
        public_key: Of the server.
        alternatives: Hosts that the certificate is valid for.
        authority: The issuer's certificate.
        authority_key: The issuer's key.
        now: Start of the validity, less a tolerance for clocks.
    """
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cotune server")])
    until = min(now + SERVER_LIFETIME, authority.not_valid_after_utc)
    return (
        _build_certificate(public_key, name, authority.subject, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_build_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _build_certificate(
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


def _build_key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
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


def build_alternatives(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """Build the list of hosts of a certificate, including the loopback interface; raises RunError for an invalid host."""
    return x509.SubjectAlternativeName([_parse_host(host) for host in dict.fromkeys((*hosts, *LOOPBACK))])


def _parse_host(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not _HOST.fullmatch(host):
            example = "expected a name such as fed.example.org or an IP address, without a port"
            raise RunError(f"{host[:80]!r} is no host: {example}", code="run.invalid_host") from None
        return x509.DNSName(host.lower())


def list_alternatives(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Return the hosts that a certificate is valid for; empty if it names none."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []

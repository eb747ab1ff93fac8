"""Check whether a server can be reached, and describe in one sentence why not, for each cause that people can fix."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

from cryptography import x509

from cotune.errors import RunError
from cotune.printable import printable

_SECONDS = 10.0
# OpenSSL's X509_V_ERR_…
_EXPIRED = 10
_NOT_YET = 9
_WRONG_HOST = (62, 64)


def check_reachable(address: str, certificates: bytes | None) -> datetime:
    """Resolve the name, connect and do the TLS handshake; nothing else is sent.

    Args:
        address: host:port.
        certificates: PEM of the authority; None: the authorities that this machine trusts.

    Returns:
        When the server's certificate expires.

    Raises:
        RunError: If the server cannot be reached, with the cause.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cadata=None if certificates is None else certificates.decode("ascii"))
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            shown = secure.getpeercert(binary_form=True)
    except (OSError, UnicodeError) as error:
        raise RunError(describe_error(error, address), code="run.server_unreachable") from None
    assert shown is not None, "a server shows its certificate"
    return x509.load_der_x509_certificate(shown).not_valid_after_utc


def describe_error(error: BaseException, address: str) -> str:
    """Describe in one sentence why a server was not reached, based on an exception and its causes."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(cause, address)
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionResetError | BrokenPipeError):
            return (
                f"the connection to {address} was closed before it was secured ({_reason(cause)}): the server may be full, hold"
                " as many connections from this address as it allows, or be stopping, or something on the way may cut them; if it"
                " stays so, ask the coordinator for the server's log"
            )
        if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or ""):
            return (
                f"the server at {address} broke off the TLS handshake ({_reason(cause)}): expected TLS 1.2 or later on both sides"
                " and nothing on the way that takes part in it; ask the coordinator for the server's log"
            )
        if isinstance(cause, ssl.SSLError):
            return (
                f"what answers at {address} does not speak TLS ({_reason(cause)}): expected the server's public port; compare the"
                " address with the coordinator's, and look for a proxy on the way"
            )
        if isinstance(cause, socket.gaierror | UnicodeError):
            host = address.rpartition(":")[0]
            return (
                f"the name {host} cannot be resolved: expected the server's name; check its spelling and this machine's network"
            )
        if isinstance(cause, ConnectionRefusedError):
            return f"nothing listens at {address}: expected the server's public port; ask the coordinator whether it is running"
        if isinstance(cause, TimeoutError):
            return f"{address} does not answer: expected the server; check the network and the firewalls on the way"
    return f"the server at {address} cannot be reached ({_reason(error)}): check the network"


def _untrusted(error: ssl.SSLCertVerificationError, address: str) -> str:
    if error.verify_code == _EXPIRED:
        return (
            f"the certificate of {address} has expired, by this machine's clock ({_now()}): ask the coordinator to renew it, and"
            " check the clock"
        )
    if error.verify_code == _NOT_YET:
        return f"the certificate of {address} is not valid yet, by this machine's clock ({_now()}): the clocks are apart; set it"
    if error.verify_code in _WRONG_HOST:
        return (
            f"the certificate of {address} is for another host: expected one for this address; ask the coordinator for the"
            " address that the certificate was made for"
        )
    return (
        f"the certificate of {address} was not made by the federation's authority ({error.verify_message}): this may be another"
        " server; get the federation.toml from the coordinator again, and compare its fingerprint"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _reason(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:120])


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"

"""The front as a process: `python -m cotune.server.proxy_process front.toml`, which ends on SIGTERM or SIGINT.

It gives `server/proxy` what that needs of the rest: certificates, the list of members, and a place where refusals are kept.
"""

from __future__ import annotations

import logging
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from cotune.errors import CotuneError, RunError
from cotune.flower import fleet_parsers
from cotune.printable import clean_output, printable
from cotune.server.deployment.front_refusals import RefusalLog
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.layout import CertificateFiles
from cotune.server.deployment.members import Members
from cotune.server.proxy.fleet_types import FleetFormat
from cotune.server.proxy.limits import Limits
from cotune.server.proxy.member_quotas import Quotas
from cotune.server.proxy.request_guard import ignore_refusal
from cotune.server.proxy.server import ProxySetup, serve
from cotune.storage.config_table import ConfigTable, format_validation_error
from cotune.storage.json_documents import parse_toml

log = logging.getLogger("cotune.front")

FLEET_FORMAT = FleetFormat(
    key_header=fleet_parsers.KEY_HEADER,
    signature_header=fleet_parsers.SIGNATURE_HEADER,
    time_header=fleet_parsers.TIME_HEADER,
    max_age=fleet_parsers.MAX_AGE,
    clock_tolerance=fleet_parsers.CLOCK_TOLERANCE,
    server_node=fleet_parsers.SERVER_NODE,
    parse_push=fleet_parsers.parse_push,
    parse_pull=fleet_parsers.parse_pull,
)


class FrontConfig(ConfigTable):
    """front.toml; paths are relative to it. The SuperLink shows the certificate of the same folder, which is for loopback too."""

    certificates: Path  # a folder as `new_authority` writes it
    members: Path  # members.json: nobody else may call
    superlink_port: int = Field(ge=1, le=65535)  # on 127.0.0.1
    host: str = "0.0.0.0"  # the address to listen at; "::" for IPv6 and IPv4
    port: int = Field(9092, ge=0, le=65535)  # 0: any that is free
    proxied: bool = False  # only nginx, or the like, on this machine connects here, and counts connections
    refusals: Path | None = None  # the file in which members are kept that were refused what they announced, or by a quota
    limits: Limits = Limits()
    quotas: Quotas = Quotas()


def read_config(path: Path) -> FrontConfig:
    """Read front.toml. Raises RunError for a file that cannot be read, is not TOML, or has a key that is unknown or wrong."""
    try:
        config = FrontConfig.model_validate(parse_toml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}): expected the front's configuration", code="run.unreadable_config"
        ) from None
    except ValueError as error:
        mistake = (
            format_validation_error(error, FrontConfig, "front's configuration")
            if isinstance(error, ValidationError)
            else f"{error}"
        )
        raise RunError(f"{path}: {mistake}", code="run.invalid_config") from None
    paths = {"certificates": path.parent / config.certificates, "members": path.parent / config.members}
    if config.refusals is not None:
        paths["refusals"] = path.parent / config.refusals
    return config.model_copy(update=paths)


class MemberKeys:
    """Finds whose a public key is, by members.json, which is read again when it has changed; a damaged one changes nothing."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._members = Members(file)
        self._state: tuple[int, int, int] | None = None
        self._names: dict[bytes, str] = {}

    def __call__(self, key: bytes) -> str | None:
        state = self._file_state()
        if state != self._state:
            self._state = state
            try:
                self._names = {member.key: member.name for member in self._members.active()}
            except RunError as error:
                log.error("%s", error)
        return self._names.get(key)

    def _file_state(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def setup(config: FrontConfig) -> ProxySetup:
    """Build what the proxy needs. Raises RunError for certificates that organizations would not accept, and a damaged list."""
    expiry = certificates.check_certificate(config.certificates)
    log.info("the certificate expires on %s", f"{expiry:%Y-%m-%d}")
    Members(config.members).all()
    refusals = RefusalLog(config.refusals) if config.refusals else None
    return ProxySetup(
        config.host,
        config.port,
        _server_context(config.certificates),
        config.superlink_port,
        ssl.create_default_context(cafile=str(CertificateFiles(config.certificates).authority)),
        MemberKeys(config.members),
        FLEET_FORMAT,
        refusals.record_member if refusals else ignore_refusal,
        config.limits,
        config.quotas,
        config.proxied,
        refusals.record_address if refusals else ignore_refusal,
    )


def _server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 or later
    files = CertificateFiles(folder)
    context.load_cert_chain(files.server, files.server_key)
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def main(arguments: Sequence[str]) -> int:
    """The process of a supervisor: exit code 0 after a signal, otherwise 1 or 2 and one sentence."""
    clean_output()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if len(arguments) != 1:
        print("usage: python -m cotune.server.proxy_process front.toml", file=sys.stderr)
        return 2
    try:
        serve(setup(read_config(Path(arguments[0]))))
    except CotuneError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

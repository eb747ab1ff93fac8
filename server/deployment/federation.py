"""Open a federation's folder on the coordinator's machine: configuration, plan, members and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import tomli_w
from pydantic import Field, ValidationError

from cotune.errors import RunError
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.protocol.federation_file import Invitation, read_invitation
from cotune.server.deployment.layout import FederationFiles
from cotune.server.deployment.members import Members
from cotune.server.proxy.member_quotas import Quotas
from cotune.storage.config_table import ConfigTable, format_validation_error
from cotune.storage.files import atomic_write
from cotune.storage.json_documents import parse_toml
from cotune.storage.toml_edit import edit_toml


class ServerConfig(ConfigTable):
    """server.toml."""

    name: str = Field(description="name of the federation")
    id: str = Field(
        "", pattern=r"^([0-9a-f]{32})?$", description="random id of the federation; what it signs is valid for no other"
    )
    hosts: tuple[str, ...] = Field(min_length=1, description="names and addresses by which organizations reach the server")
    listen: str = Field("0.0.0.0", description="the address that the public port listens on")
    port: int = Field(9092, ge=1, le=65535, description="the public port")
    superlink_port: int = Field(9093, ge=1, le=65535, description="port of the SuperLink, on loopback")
    database: bool = Field(
        True, description="whether the SuperLink keeps messages in a file, so that a round survives its restart; false: in memory"
    )
    test: Path | None = Field(
        None, description="records on which the model of every round is evaluated, if the coordinator has any"
    )
    base: Path | None = Field(None, description="the folder of the base model, of which the plan gives members only the name")
    quotas: Quotas = Field(Quotas(), description="of the server that one member may take; reply is drawn from the base model")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N: the device for evaluating and exporting the model")


class FederationFolder:
    """A federation's folder.

    Args:
        path: The folder that `create_federation` created.

    Attributes:
        path: The folder, absolute.
        files: The names of the files in it.
        config: The content of server.toml.
        members: The organizations that were invited.

    Raises:
        RunError: If it is not the folder of a federation, or its configuration is not valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.files = FederationFiles(self.path)
        file = self.files.config
        try:
            self.config = ServerConfig.model_validate(parse_toml(file.read_text(encoding="utf-8-sig")))
        except ValidationError as error:
            raise RunError(
                f"{format_validation_error(error, ServerConfig, 'server.toml')} ({file})", code="run.invalid_server_config"
            ) from None
        except (OSError, ValueError) as error:
            reason = f"server.toml: {error.strerror if isinstance(error, OSError) else error}"
            raise RunError(
                f"{path} is not the folder of a federation ({reason}): expected one that `cotune server init` made",
                code="run.not_a_federation",
            ) from None
        self.members = Members(self.files.members)

    @property
    def plan(self) -> Plan:
        """The plan of the federation's runs; raises PlanError if it cannot be read."""
        return load_plan(self.files.plan)

    @property
    def invitation(self) -> Invitation:
        """The content of federation.toml; raises RunError or PlanError if it cannot be read."""
        return read_invitation(self.files.invitation)

    @property
    def certificates(self) -> Path:
        """The folder of certificates and keys."""
        return self.files.certificates.path

    @property
    def superlink(self) -> Path:
        """The folder of Flower's processes."""
        return self.files.superlink.path

    @property
    def superlink_address(self) -> str:
        """The SuperLink's host:port, on loopback."""
        return f"127.0.0.1:{self.config.superlink_port}"

    def runs(self) -> Iterator[Path]:
        """Yield the folders of runs, the newest last."""
        found = self.files.runs.glob("*/run.json")
        yield from (
            file.parent for file in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file))
        )  # run.json is written once


def write_config(path: Path, config: ServerConfig) -> None:
    """Write server.toml; comments, order and formatting of an existing file are preserved.

    Args:
        path: The federation's folder.
        config: The new content.
    """
    file = FederationFiles(path).config
    table = config.model_dump(mode="json", exclude_none=True)
    if not file.exists():
        atomic_write(file, tomli_w.dumps(table).encode())
        return
    text = file.read_text(encoding="utf-8-sig")
    present = ServerConfig.model_validate(parse_toml(text)).model_dump(mode="json", exclude_none=True)
    changes = {key: table.get(key) for key in {**present, **table} if present.get(key) != table.get(key)}
    atomic_write(file, edit_toml(text, changes).encode())


def get_public_address(config: ServerConfig) -> str:
    """Return the address that organizations join, as host:port."""
    host = config.hosts[0]
    return f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"

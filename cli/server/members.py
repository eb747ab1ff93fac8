"""`cotune server invite | revoke | accept-key | list`: who belongs to a federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import open_console
from cotune.cli.options import AsJson, FederationPath
from cotune.errors import PlanError
from cotune.protocol.key_renewal import read_node_renewal
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.members import Member, read_public_key


def invite(
    folder: FederationPath,
    name: Annotated[str, typer.Argument(help="Of the organization, such as hospital-a.")],
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="Its public key, as `cotune client init` has made it.")],
    examples: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Updates that declare fewer or more records are refused.")
    ] = None,
) -> None:
    """Admit an organization by its public key."""
    opened = FederationFolder(folder)
    member = opened.members.invite(name, read_public_key(key.expanduser()), _range(examples))
    open_console().print(
        f"{escape(member.name)} is invited; its key's fingerprint, to be compared by telephone: {member.fingerprint}"
    )


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise PlanError(
            f'--examples "{text}" is not understood: expected two numbers from 1 on, such as 500:20000',
            code="plan.malformed_range",
        )
    return int(low), int(high)


def revoke(folder: FederationPath, name: Annotated[str, typer.Argument(help="Of the organization.")]) -> None:
    """Shut an organization out. Its key is never admitted again."""
    member = FederationFolder(folder).members.revoke(name)
    open_console().print(f"{escape(member.name)} is revoked; invite it with another key to let it in again")


def accept_key(
    folder: FederationPath,
    renewal: Annotated[Path, typer.Argument(metavar="FILE", help="The node-renewal.json of `cotune client renew-key`.")],
) -> None:
    """Replace an organization's key with its new one; the old key is never admitted again. Runs continue."""
    opened = FederationFolder(folder)
    member = opened.members.renew(read_node_renewal(renewal.expanduser()), opened.config.id)
    typer.echo(f"{member.name} has a new key; its fingerprint, to be compared by telephone: {member.fingerprint}")


def members(folder: FederationPath, as_json: AsJson = False) -> None:
    """List the invited organizations and their keys."""
    opened = FederationFolder(folder)
    found = opened.members.all()
    fingerprint = opened.invitation.fingerprint
    console = open_console()
    if as_json:
        people = [{**member.model_dump(), "fingerprint": member.fingerprint} for member in found]
        typer.echo(json.dumps({"federation": opened.config.name, "fingerprint": fingerprint, "members": people}, indent=1))
        return
    console.print(f"{escape(opened.config.name)}; fingerprint of federation.toml: {fingerprint}")
    if found:
        console.print(_table(found))
    else:
        console.print("nobody is invited so far: cotune server invite FED NAME KEY.pub")


def _table(found: tuple[Member, ...]) -> Table:
    table = Table("organization", "invited", "key", "records", "", box=None, header_style="bold", pad_edge=False)
    for member in found:
        low_high = "–" if member.examples is None else f"{member.examples[0]:,} to {member.examples[1]:,}"
        revoked = "" if member.revoked is None else f"revoked {member.revoked[:10]}"
        table.add_row(escape(member.name), member.invited[:10], f"{member.fingerprint[:16]}…", low_high, revoked)
    return table

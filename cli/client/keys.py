"""Implement `cotune client renew-key` and `trust`: renew the node's key, and trust new keys of the server."""

from __future__ import annotations

from pathlib import Path

import typer

from cotune.client.node.keys import renew_key as renew_node_key
from cotune.client.node.trust import Trust, record_renewals
from cotune.client.site import Site
from cotune.errors import RunError
from cotune.protocol.key_renewal import read_server_renewals


def renew_key(site: Path) -> None:
    """Make a new key for the node of a site, and say what becomes of it."""
    file, fingerprint = renew_node_key(Site(site.expanduser()))
    typer.echo(f"give {file} to the coordinator, who accepts it by `cotune server accept-key`; it is no secret")
    typer.echo(f"SHA-256 of the new key, to be compared by telephone: {fingerprint}")
    typer.echo("until then the present key is used; afterwards a node that runs changes over by itself")


def trust_renewal(site: Path, renewal: Path) -> None:
    """Take the server's new keys from a file of statements.

    Args:
        site: The site's folder.
        renewal: server-renewals.jsonl, from the coordinator.

    Raises:
        RunError: Where nothing in it follows from the key that the site trusts.
    """
    folder = Site(site.expanduser()).folder
    renewals = read_server_renewals(renewal.expanduser())
    learned = record_renewals(folder, renewals)
    newest = Trust.read(folder).newest.signing_key
    if not learned and newest not in [each.about.new for each in renewals]:
        raise RunError(
            f"nothing in {renewal} follows from the key that the site trusts ({newest[:16]}…): expected all statements of its"
            " server, or the federation.toml again",
            code="run.untrusted_renewal",
        )
    typer.echo(f"{len(learned)} statements were new; the server's newest key is {newest}")

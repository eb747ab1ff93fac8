"""An organization renews the key by which servers know its node: a statement for the coordinator, signed by the old key."""

from __future__ import annotations

from pathlib import Path

from cotune.client.keys import both_keys
from cotune.client.site import Site
from cotune.client.trust import Trust
from cotune.models.durable import write_durably
from cotune.models.errors import RunError
from cotune.plan.renewal import NodeRenewal, fingerprint


def renew_key(site: Site) -> tuple[Path, str]:
    """Makes the next key, and the statement that the coordinator is to be given. The same again renews the same key.

    Until the coordinator has accepted it, the node goes on with the present key; from then on it uses the next one by itself.

    Returns:
        The statement's file, and the new key's fingerprint: SHA-256, hex.

    Raises:
        RunError: For a site that has joined no federation, keys that cannot be read, and a folder that cannot be written.
    """
    federation, file = Trust.read(site.folder).federation, site.folder / "node-renewal.json"
    try:
        present, following = both_keys(site.folder)
        renewal = _kept(file, federation, fingerprint(following.public_key()))
        if renewal is None:
            renewal = NodeRenewal.make(federation, site.organisation, present, following)
            write_durably(file, renewal.text().encode() + b"\n")
    except OSError as error:
        raise RunError(f"{site.folder} cannot be written ({error.strerror}): make room, or mend its permissions") from None
    return file, fingerprint(following.public_key())


def _kept(file: Path, federation: str, new: str) -> NodeRenewal | None:
    """The statement that was made before, so that the coordinator is shown one and the same."""
    try:
        renewal = NodeRenewal.parse(file.read_text(encoding="ascii"))
        about = renewal.about
        return renewal if (about.federation, fingerprint(renewal.new_key())) == (federation, new) else None
    except (OSError, ValueError, RunError):
        return None

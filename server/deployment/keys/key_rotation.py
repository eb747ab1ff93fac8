"""Rotate the federation's keys without a new invitation: the key that signs requests, and the server's certificate authority.

First, the new keys are announced: every request carries a statement of them, signed by the old key, and each answer names the
newest key that its organization knows. Then the new keys are activated. A process that is killed between any two writes leaves
working keys, either old or new; repeating the command finishes the rotation.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from cotune.errors import RunError
from cotune.protocol.key_renewal import ServerRenewal, read_server_renewals
from cotune.protocol.statements import ReplyStatement
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.join_files import write_handout
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.keys.signing import create_signing_key, read_signing_key, replace_signing_key
from cotune.server.deployment.layout import CertificateFiles
from cotune.server.runs.events import read_events
from cotune.storage.files import atomic_write


def announce_keys(folder: FederationFolder) -> ServerRenewal:
    """Create the next keys, and the statement that names them. Calling it again changes nothing.

    Returns:
        The statement, signed by the current key and by the new one.

    Raises:
        RunError: If a file cannot be read or written.
    """
    finish_activation(folder)
    path = folder.certificates
    following = CertificateFiles(path).next.path
    try:
        for left in path.glob(f".{following.name}.*.part"):  # of a process that was killed
            shutil.rmtree(left)
        if not following.exists():
            part = _make_part(following)
            try:
                _write_next_keys(part, path, folder.config.id)
                os.rename(part, following)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        _write_statements(folder)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): check its permissions and space", code="run.not_writable"
        ) from None
    found = read_announced(path)
    assert found is not None
    return found


def _write_next_keys(part: Path, present: Path, federation: str) -> None:
    certificates.create_next_authority(part)
    renewal = ServerRenewal.make(
        federation, read_signing_key(present), create_signing_key(part), certificates.read_authority_pem(part)
    )
    atomic_write(CertificateFiles(part).renewal, renewal.text().encode())


def read_announced(path: Path) -> ServerRenewal | None:
    """Return the statement of the announced keys; None if there are none.

    Args:
        path: The folder of certificates.

    Raises:
        RunError: If the file is damaged.
    """
    file = CertificateFiles(path).next.renewal
    return read_server_renewals(file)[0] if file.exists() else None


def read_renewals(path: Path) -> list[ServerRenewal]:
    """Return all statements of rotated keys, the oldest first.

    Args:
        path: The folder of certificates.

    Raises:
        RunError: If a file is damaged.
    """
    used = _read_used(path)
    following = read_announced(path)
    return used if following is None or following in used else [*used, following]


def list_members_without_keys(folder: FederationFolder) -> list[str]:
    """Return the names of the members whose answers have not yet shown that they know the announced keys.

    Raises:
        RunError: If no keys are announced.
    """
    following = _require_announced(folder)
    known = {sender for run in folder.runs() for sender in _list_trusting(run, following.about.new)}
    return [member.name for member in folder.members.active() if member.name not in known]


def _list_trusting(run: Path, key: str) -> set[str]:
    """Return the organizations that named the key in a reply of a run; its signature was verified on receipt."""
    file = run / "trail.jsonl"
    replies = [entry for entry in read_events(file) if entry.get("event") == "reply"] if file.exists() else []
    statements = [ReplyStatement.parse(str(entry["statement"])) for entry in replies]
    return {statement.sender for statement in statements if statement.trusts == key}


def activate_keys(folder: FederationFolder) -> None:
    """Replace the current keys by the announced ones.

    Requests are signed by the new key at once; processes use the new certificate after a restart.

    Raises:
        RunError: If no keys are announced, or a file cannot be read or written.
    """
    announced = _require_announced(folder)
    path = folder.certificates
    files = CertificateFiles(path)
    following = files.next.path
    try:
        used = _read_used(path)
        if announced not in used:  # from here on, the activation will be finished after a crash
            atomic_write(files.used_renewals, "".join(f"{each.text()}\n" for each in (*used, announced)).encode())
        replace_signing_key(path, read_signing_key(following))
        certificates.replace_authority(path, following)
        write_handout(folder.path, folder.plan, folder.config)
        _write_statements(folder)
        done = _make_part(following)
        os.rename(following, done / following.name)
        shutil.rmtree(done)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): check its permissions and space", code="run.not_writable"
        ) from None


def finish_activation(folder: FederationFolder) -> None:
    """Finish `activate_keys` if a process was killed during it.

    Raises:
        RunError: As `activate_keys`.
    """
    following = read_announced(folder.certificates)
    if following is not None and following in _read_used(folder.certificates):
        activate_keys(folder)


def _require_announced(folder: FederationFolder) -> ServerRenewal:
    following = read_announced(folder.certificates)
    if following is None:
        raise RunError(
            "there are no new keys to put into use: make them by `cotune server renew-keys` without --switch first",
            code="run.no_announced_keys",
        )
    return following


def _read_used(path: Path) -> list[ServerRenewal]:
    file = CertificateFiles(path).used_renewals
    if not file.exists():
        return []
    return [ServerRenewal.parse(line) for line in file.read_text(encoding="ascii").splitlines()]


def _write_statements(folder: FederationFolder) -> None:
    atomic_write(folder.files.server_renewals, ServerRenewal.join(read_renewals(folder.certificates)).encode())


def _make_part(following: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=following.parent, prefix=f".{following.name}.", suffix=".part"))  # mode 0700

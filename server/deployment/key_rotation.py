"""The federation's keys are renewed without a new invitation: the key that signs requests, and the authority of the server.

certificates/next/             the keys that are to follow (ca.crt, ca.key, signing.key) and renewal.json, their statement; whole
                               or not at all, and gone once they are in use
certificates/renewals.jsonl    the statements of all keys that were put into use, the oldest first
server-renewals.jsonl          all statements, for organizations that no request reaches meanwhile

First the new keys are announced: the statement, signed by the old key, goes with every request, and each answer names the newest
key that its organization knows. Then they are put into use. A process that is killed between any two writes leaves keys that
work, the old or the new; the same command again finishes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from cotune.errors import RunError
from cotune.protocol.key_renewal import ServerRenewal, read_server_renewals
from cotune.protocol.signatures import ReplyStatement
from cotune.server.deployment import certificates
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.handout import write_handout
from cotune.server.deployment.signing import create_signing_key, read_signing_key, replace_signing_key
from cotune.server.runs.events import read_events
from cotune.storage.files import atomic_write

SERVER_RENEWALS = "server-renewals.jsonl"
_NEXT = "next"
_STATEMENT = "renewal.json"
_USED = "renewals.jsonl"


def announce_keys(folder: FederationFolder) -> ServerRenewal:
    """Makes the keys that are to follow, and signs their statement; the same again changes nothing. Raises RunError."""
    finish_activation(folder)
    path = folder.certificates
    try:
        for left in path.glob(f".{_NEXT}.*.part"):  # of a process that was killed
            shutil.rmtree(left)
        if not (path / _NEXT).exists():
            part = Path(tempfile.mkdtemp(dir=path, prefix=f".{_NEXT}.", suffix=".part"))  # 0700
            try:
                _fill(part, path, folder.config.id)
                os.rename(part, path / _NEXT)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        _write_statements(folder)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): check its permissions and space") from None
    found = read_announced(path)
    assert found is not None
    return found


def _fill(part: Path, present: Path, federation: str) -> None:
    certificates.create_next_authority(part)
    renewal = ServerRenewal.make(
        federation, read_signing_key(present), create_signing_key(part), certificates.read_authority_pem(part)
    )
    atomic_write(part / _STATEMENT, renewal.text().encode())


def read_announced(path: Path) -> ServerRenewal | None:
    """The statement of the keys that are to follow, if there are any. path: the folder of certificates. Raises RunError."""
    file = path / _NEXT / _STATEMENT
    return read_server_renewals(file)[0] if file.exists() else None


def read_renewals(path: Path) -> list[ServerRenewal]:
    """All statements, the oldest first. path: the folder of certificates. Raises RunError for a damaged file."""
    used = _used(path)
    following = read_announced(path)
    return used if following is None or following in used else [*used, following]


def list_members_without_keys(folder: FederationFolder) -> list[str]:
    """The members that have not answered yet since they learned the announced keys. Raises RunError where none are announced."""
    following = _announced(folder)
    known = {sender for run in folder.runs() for sender in _knowing(run, following.about.new)}
    return [member.name for member in folder.members.active() if member.name not in known]


def _knowing(run: Path, key: str) -> set[str]:
    """Who has answered in a run and trusted the key then: its signature was verified when the answer was entered."""
    file = run / "trail.jsonl"
    replies = [entry for entry in read_events(file) if entry.get("event") == "reply"] if file.exists() else []
    statements = [ReplyStatement.parse(str(entry["statement"])) for entry in replies]
    return {statement.sender for statement in statements if statement.trusts == key}


def activate_keys(folder: FederationFolder) -> None:
    """The announced keys take the place of the present ones. What runs shows the new certificate after a restart; requests are
    signed by the new key at once. Raises RunError where none are announced, and for files that cannot be read or written.
    """
    following = _announced(folder)
    path = folder.certificates
    try:
        used = _used(path)
        if following not in used:  # from here on it is finished, whatever happens
            atomic_write(path / _USED, "".join(f"{each.text()}\n" for each in (*used, following)).encode())
        replace_signing_key(path, read_signing_key(path / _NEXT))
        certificates.replace_authority(path, path / _NEXT)
        write_handout(folder.path, folder.plan, folder.config)
        _write_statements(folder)
        done = Path(tempfile.mkdtemp(dir=path, prefix=f".{_NEXT}.", suffix=".part"))
        os.rename(path / _NEXT, done / _NEXT)
        shutil.rmtree(done)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): check its permissions and space") from None


def finish_activation(folder: FederationFolder) -> None:
    """Puts keys into use where a process was killed at it. Raises RunError as `activate_keys` does."""
    following = read_announced(folder.certificates)
    if following is not None and following in _used(folder.certificates):
        activate_keys(folder)


def _announced(folder: FederationFolder) -> ServerRenewal:
    following = read_announced(folder.certificates)
    if following is None:
        raise RunError("there are no new keys to put into use: make them by `cotune server renew-keys` without --switch first")
    return following


def _used(path: Path) -> list[ServerRenewal]:
    file = path / _USED
    if not file.exists():
        return []
    return [ServerRenewal.parse(line) for line in file.read_text(encoding="ascii").splitlines()]


def _write_statements(folder: FederationFolder) -> None:
    atomic_write(folder.path / SERVER_RENEWALS, ServerRenewal.join(read_renewals(folder.certificates)).encode())

"""Open the ledger of a site once per process, without loading records or anything that trains."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from cotune.client.site_folder import SiteFolder
from cotune.privacy.ledger.ledger import Ledger

_MAX_OPEN = 64  # ledgers that a process keeps open, each with up to three files


class SiteWithLedger(SiteFolder):
    """A site with its ledger."""

    def ledger(self) -> Ledger:
        """Return the ledger, which is created if it is missing, and stays open in this process.

        The ledger of a simulated organization survives the end of the process, but not a power failure: it accounts for no real
        records, and starts with its run.

        Raises:
            PrivacyError: If it is damaged.
        """
        with _opening:
            return _open_ledger(self.ledger_file, not self.file.simulated)


_LedgerKey = tuple[Path, bool, tuple[int, ...], tuple[int, ...]]
_opening = threading.Lock()
_open_ledgers: OrderedDict[_LedgerKey, Ledger] = OrderedDict()  # opening verifies the log; every use checks for writes of others


def _ledger_key(file: Path, durable: bool) -> _LedgerKey:
    """Return what identifies an open ledger: its path, the identity of the file, and identity and last change of its key.

    A file that replaces another one is another ledger, even if it gets the same inode number.
    """
    return file.absolute(), durable, _identity(file)[:2], _identity(file.with_name("ledger.key"))


def _open_ledger(file: Path, durable: bool) -> Ledger:
    key = _ledger_key(file, durable)
    found = _open_ledgers.get(key)
    if found is None:
        found = Ledger(file, durable=durable)
        key = _ledger_key(file, durable)  # which its files, now that they are there, decide
        while len(_open_ledgers) >= _MAX_OPEN:
            _open_ledgers.popitem(last=False)
        _open_ledgers[key] = found
    _open_ledgers.move_to_end(key)
    return found


def _identity(file: Path) -> tuple[int, ...]:
    """Return a file's device, inode number and time of last change; empty if it is missing."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns

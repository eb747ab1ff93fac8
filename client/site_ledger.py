"""The ledger of a site, opened once in a process. Whoever asks for the ledger alone loads no records, and nothing that trains."""

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
        """Return the ledger, which is created where it is missing, and stays open in this process.

        What is entered in that of a simulated organization survives the end of the process, and no power cut: it is an account
        of nobody's records, and begins with its run.

        Raises:
            PrivacyError: It is damaged.
        """
        with _opening:
            return _open_ledger(self.ledger_file, not self.file.simulated)


_LedgerKey = tuple[Path, bool, tuple[int, ...], tuple[int, ...]]
_opening = threading.Lock()
_open_ledgers: OrderedDict[_LedgerKey, Ledger] = OrderedDict()  # opening verifies a log, every use whether others have written it


def _ledger_key(file: Path, durable: bool) -> _LedgerKey:
    """Return what a ledger is known by: its file, the identity of that, and the identity and last change of its key.

    Another file that is put in its place is another ledger, and may get the number of the one that was removed.
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
    """Return a file's device, number and time of its last change; nothing where it is missing."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns

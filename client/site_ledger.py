"""Open the ledger of a site once per process, without loading records or anything that trains."""

from __future__ import annotations

from pathlib import Path

from cotune.bounded_cache import BoundedCache
from cotune.client.site_folder import SiteFolder
from cotune.privacy.ledger.ledger import Ledger


class SiteWithLedger(SiteFolder):
    """A site with its ledger."""

    def ledger(self) -> Ledger:
        """Return the ledger, which is created if it is missing, and stays open in this process.

        The ledger of a simulated organization survives the end of the process, but not a power failure: it accounts for no real
        records, and starts with its run.

        Raises:
            PrivacyError: If it is damaged.
        """
        with _open_ledgers.lock:
            return _open_ledger(self.ledger_file, not self.file.simulated)


_LedgerKey = tuple[Path, bool, tuple[int, ...], tuple[int, ...]]
_open_ledgers: BoundedCache[_LedgerKey, Ledger] = BoundedCache(max_entries=64)  # each with up to three open files


def _ledger_key(file: Path, durable: bool) -> _LedgerKey:
    """Return what identifies an open ledger: its path, the identity of the file, and identity and last change of its key.

    A file that replaces another one is another ledger, even if it gets the same inode number.
    """
    return file.absolute(), durable, _identity(file)[:2], _identity(file.with_name("ledger.key"))


def _open_ledger(file: Path, durable: bool) -> Ledger:
    """Return a ledger that stays open: opening verifies the log, and every use checks for writes of others."""
    found = _open_ledgers.get(_ledger_key(file, durable))
    if found is None:
        found = Ledger(file, durable=durable)
        _open_ledgers.put(_ledger_key(file, durable), found)  # the key by its files, now that they are there
    return found


def _identity(file: Path) -> tuple[int, ...]:
    """Return a file's device, inode number and time of last change; empty if it is missing."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns

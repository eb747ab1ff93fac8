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
            return _open_ledger(self.ledger_file, not self.file.simulated, self._owner)

    @property
    def has_ledger(self) -> bool:
        """Whether there is a ledger, of which at least the key was entered: to look at one must not create it.

        Raises:
            PrivacyError: If it is damaged, or the file of a run is gone.
        """
        return not self.ledger().is_empty if self._owner else self.ledger_file.exists()

    @property
    def _owner(self) -> str:
        """Whose ledger it is, in a file for a whole run; "": the file is the site's own."""
        return self.organization if self.file.run_ledger is not None else ""


_LedgerKey = tuple[Path, bool, str, tuple[int, ...], tuple[int, ...]]
_open_ledgers: BoundedCache[_LedgerKey, Ledger] = BoundedCache(max_entries=64)  # each with up to three open files
_ledgers_of_runs: BoundedCache[_LedgerKey, Ledger] = BoundedCache(max_entries=256)  # without files of their own


def _ledger_key(file: Path, durable: bool, owner: str) -> _LedgerKey:
    """Return what identifies an open ledger: its path, the identity of the file, and identity and last change of its key.

    A file that replaces another one is another ledger, even if it gets the same inode number.
    """
    return file.absolute(), durable, owner, _identity(file)[:2], _identity(file.with_name("ledger.key"))


def _open_ledger(file: Path, durable: bool, owner: str) -> Ledger:
    """Return a ledger that stays open: opening verifies the log, and every use checks for writes of others."""
    kept = _ledgers_of_runs if owner else _open_ledgers
    found = kept.get(_ledger_key(file, durable, owner))
    if found is None:
        found = Ledger(file, durable=durable, owner=owner)
        kept.put(_ledger_key(file, durable, owner), found)  # the key by its files, now that they are there
    return found


def _identity(file: Path) -> tuple[int, ...]:
    """Return a file's device, inode number and time of last change; empty if it is missing."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns

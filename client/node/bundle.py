"""Check that the bundle of a run (Flower's FAB, a zip archive) contains only configuration. It is never unpacked."""

from __future__ import annotations

import io
import zipfile
from pathlib import PurePosixPath

_CONFIGURATION = {".toml", ".md", ".txt", ".json", ".yaml", ".yml"}
_PLAIN = {".info/CONTENT", "LICENSE"}


def reason_to_refuse(content: bytes) -> str | None:
    """Return why a run with this bundle is refused, in words that the server may see; None if it contains only configuration."""
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "the run's bundle is not a zip archive: expected the one that cotune starts its runs with"
    foreign = [name for name in names if name not in _PLAIN and PurePosixPath(name).suffix.lower() not in _CONFIGURATION]
    if not foreign:
        return None
    return (
        f"the run's bundle holds {foreign[0][:80]!r}: expected configuration only, as this organization runs the cotune that is"
        " installed there"
    )

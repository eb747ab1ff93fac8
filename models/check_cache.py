"""Where results that are expensive to compute are kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where features are kept between runs: $COTUNE_CACHE, or cotune/ in the user's cache folder.

    For a user without a home, a folder of that user alone among the temporary files.
    """
    given = os.environ.get("COTUNE_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotune"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"cotune-{os.getuid()}"

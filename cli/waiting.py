"""Show on standard error, for any command, that preparing a model takes minutes."""

from __future__ import annotations

import sys
import time
from typing import Any

_SECONDS = 10.0  # between two lines


class Waiting:
    """One line when the map of a feature begins to be fitted, and one every ten seconds until it is."""

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, what: str, about: dict[str, Any]) -> None:
        if what != "map":
            return
        done = about["done"]
        total = about["total"]
        if done in (0, total) or time.monotonic() - self._told > _SECONDS:
            self._told = time.monotonic()
            print(
                f"fitting the map of {about['base']} to {total:,} texts of random tokens, once on this machine: {done:,} done",
                file=sys.stderr,
            )

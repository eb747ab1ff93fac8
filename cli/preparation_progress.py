"""Show on standard error, for any command, that preparing a model takes minutes."""

from __future__ import annotations

import sys
import time
from typing import Any

_SECONDS = 10.0  # between two lines


class Waiting:
    """One line when the map of a feature begins to be fitted, and one every ten seconds until it is.

    One, too, where a batch does not fit into memory, and a smaller one is tried.
    """

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, what: str, about: dict[str, Any]) -> None:
        if what == "physical_batch":
            self._tell_physical_batch(**about)
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

    @staticmethod
    def _tell_physical_batch(rows: int, before: int, device: str) -> None:
        print(
            f"{before} records at a time do not fit into the memory of {device}: going on with {rows} at a time",
            file=sys.stderr,
        )

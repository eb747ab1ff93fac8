"""Kills at chosen moments: before the n-th change of a file that is meant to last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest


class Killed(BaseException):
    """As a process that ends there: nothing catches it to go on."""


def killed_before_each_change(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Iterator[int]:
    """Ends `act` before its first change, its second, and so on, with the number of changes that were made each time.

    A change is a rename, by which every durable file gets its place. Stops after the first `act` that comes to its end; anyone who
    iterates puts things back in between.
    """
    for most in range(100):
        made = 0

        def counted(real: Callable[..., None], most: int = most) -> Callable[..., None]:
            def change(*paths: object, **options: object) -> None:
                nonlocal made
                if made == most:
                    raise Killed
                made += 1
                real(*paths, **options)

            return change

        with monkeypatch.context() as patch:
            for name in ("replace", "rename"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                act()
                ended = True
            except Killed:
                ended = False
        yield made
        if ended:
            return
    raise AssertionError("it makes a hundred changes and more")

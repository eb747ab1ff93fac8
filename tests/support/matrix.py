"""Parameters that are crossed: all combinations for `make test-faults`, each value once for everybody."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def crossed(*axes: Iterable[Any]) -> list[ParameterSet]:
    """Return all combinations of the axes' values; those that are not of the short form are marked `long`.

    The short form is the diagonal, as often through the shorter axes as the longest one needs: every value of every axis is in it.

    Example:
        >>> [(each.values, [mark.name for mark in each.marks]) for each in crossed("ab", [1, 2])]
        [(('a', 1), []), (('a', 2), ['long']), (('b', 1), ['long']), (('b', 2), [])]
    """
    values = [list(axis) for axis in axes]
    longest = max(len(axis) for axis in values)
    short = {tuple(i % len(axis) for axis in values) for i in range(longest)}
    found = []
    for places in itertools.product(*(range(len(axis)) for axis in values)):
        chosen = [axis[i] for axis, i in zip(values, places, strict=True)]
        found.append(pytest.param(*chosen, marks=() if places in short else pytest.mark.long))
    return found

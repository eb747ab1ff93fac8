"""Records that stay together when data are split: those of one unit, or of one text however it is written.

If one of two records of a person, or one of two copies of a text, is trained on, the other cannot test what was learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cotune.models.inputs import stratum_of
from cotune.models.records import Records
from cotune.models.units import grouped
from cotune.simulations.partitions import Rows


@dataclass(frozen=True)
class UnitGroups:
    """The rows of a file by unit, in the order in which units come first.

    strata: the class of each group, that of most of its records (of equally many, the alphabetically first). names: by which a
    unit is known in another file.
    """

    groups: tuple[tuple[int, ...], ...]
    strata: tuple[str, ...]
    names: tuple[str | bytes, ...]

    def rows(self, chosen: Iterable[int]) -> Rows:
        """The rows of the chosen groups, ascending."""
        return np.array(sorted(row for group in chosen for row in self.groups[group]), dtype=np.int64)

    def names_at(self, rows: Collection[int]) -> set[str | bytes]:
        """The units of some rows."""
        wanted = {int(row) for row in rows}
        return {name for name, group in zip(self.names, self.groups, strict=True) if wanted.intersection(group)}

    def by(self, owners: Sequence[str]) -> dict[str, UnitGroups]:
        """The groups of each owner of rows, by name: a group is with the one that has most of it (of equally many, the first)."""
        whose = [Counter(owners[row] for row in group) for group in self.groups]
        owner = [min(counts, key=lambda name: (-counts[name], name)) for counts in whose]
        return {name: self._only([i for i, each in enumerate(owner) if each == name]) for name in sorted(set(owner))}

    def _only(self, chosen: Sequence[int]) -> UnitGroups:
        kept = [(self.groups[i], self.strata[i], self.names[i]) for i in chosen]
        groups, strata, names = zip(*kept, strict=True)
        return UnitGroups(groups, strata, names)

    def without(self, rows: Rows, names: Collection[str | bytes]) -> Rows:
        """The rows that belong to none of the named units."""
        others = {row for name, group in zip(self.names, self.groups, strict=True) if name in names for row in group}
        return rows[[int(row) not in others for row in rows]]


def unit_groups(records: Records) -> UnitGroups:
    """By the column of the units where one was read, else by `identity_of`."""
    names: Sequence[str | bytes] = records.units or records.identities
    groups = grouped(names)
    strata = [Counter(stratum_of(records.labels[row]) for row in group) for group in groups]
    return UnitGroups(
        tuple(map(tuple, groups)),
        tuple(min(counts, key=lambda name: (-counts[name], name)) for counts in strata),
        tuple(names[group[0]] for group in groups),
    )

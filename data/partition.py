"""Split one pooled data set over simulated organizations, and hold some of it out for testing.

What is split are units (see `unit_groups`): an example is all that stays together, and has one class.

Every scheme is a matrix of shares, groups × clients: a group's shuffled rows are cut where its cumulative shares fall.
- iid, quantity: all rows are one group.
- dirichlet: a group per class, each with its own shares, which skews labels and sizes
  (Yurochkin et al., ICML 2019, https://arxiv.org/abs/1905.12022, section 4).
- shards: a group per class, shared by the clients that hold it
  (after McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, section 3).

Records that stay together when data are split: those of one unit, or of one text however it is written.

If one of two records of a person, or one of two copies of a text, is trained on, the other cannot test what was learned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cotune.data.records import Records
from cotune.data.types import get_stratum
from cotune.data.units import group_positions
from cotune.errors import DataError, PlanError, nearest

Rows = NDArray[np.int64]  # indices into the pooled records, ascending
Shares = NDArray[np.float64]  # groups × clients, each row adds up to 1

SCHEMES = ("iid", "dirichlet:ALPHA", "quantity:ALPHA", "shards:K")
ALPHA_RANGE = (1e-3, 1e6)  # beyond, one client gets all, or all get the same, to the last digit
MAX_DRAWS = 1000  # how often shares are drawn before min_examples is given up


class PartitionConfig(BaseModel):
    """How a simulation shares the pooled records out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clients: int = Field(default=4, ge=1, description="number of simulated organizations")
    scheme: str = Field(
        default="dirichlet:0.5",
        description=(
            "iid, dirichlet:ALPHA (each class is divided by a Dirichlet draw: skewed labels and unequal sizes), "
            "quantity:ALPHA (sizes by a Dirichlet draw, labels iid) or shards:K (K classes per client); a smaller"
            " ALPHA or K is more uneven"
        ),
    )
    sizes: Literal["equal"] | float = Field(
        default="equal", description="for iid and shards: equal, or the ALPHA of a Dirichlet draw of the clients' sizes"
    )
    min_examples: int = Field(
        default=20, ge=1, description="the fewest records of each client; shares are drawn again until every client has as many"
    )

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        _parse(value)
        return value

    @model_validator(mode="after")
    def _sizes_apply(self) -> PartitionConfig:
        if self.sizes != "equal":
            _check_alpha(self.sizes, f"sizes={self.sizes}")
            if _parse(self.scheme)[0] in ("dirichlet", "quantity"):
                raise ValueError(f"sizes={self.sizes} was given, but scheme {self.scheme!r} draws them: leave sizes out")
        return self


def partition(labels: Sequence[str], config: PartitionConfig, rng: np.random.Generator) -> list[Rows]:
    """The rows of each client: disjoint, together all of `labels`, each list ascending; decided by `rng` alone.

    Equal sizes are equal to within one, for shards within each class. A client of shards:K holds K classes, or fewer
    where a class has fewer examples than holders. Raises DataError if `config.min_examples` cannot be met.

    Args:
        labels: The label of each row.
        config: Scheme, number of clients and their fewest examples.
        rng: Decides who gets which rows.
    """
    kind, value = _parse(config.scheme)
    codes = _class_codes(labels)
    groups = codes if kind in ("dirichlet", "shards") else np.zeros_like(codes)
    counts = np.bincount(groups)
    if config.clients * config.min_examples > len(labels):
        raise DataError(
            f"{len(labels)} examples cannot give {config.clients} clients {config.min_examples} each:"
            " use fewer clients, a smaller min_examples or more data",
            code="data.too_few_records",
        )
    if kind == "shards":
        _check_shards(int(value), config.clients, len(counts))
    parts: list[list[Rows]] = [[] for _ in range(config.clients)]
    for group, ends in enumerate(_draw_cuts(kind, value, counts, config, rng)):
        rows = rng.permutation(np.flatnonzero(groups == group))
        for part, piece in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def split_test(labels: Sequence[str], fraction: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """The rows to train on and those to test on, both ascending: `fraction` of each class tests, rounded half up.

    A class of two or more examples has at least one on each side; a single example is trained on.
    Raises PlanError for a fraction that is not between 0 and 1, and DataError if no class has two examples.

    Args:
        labels: The label of each row.
        fraction: Of each class, between 0 and 1.
        rng: Decides which rows test.

    Returns:
        (training rows, test rows).
    """
    if not 0 < fraction < 1:
        raise PlanError(
            f"test fraction {fraction} is out of range: expected a number between 0 and 1, both excluded",
            code="plan.test_fraction",
        )
    codes = _class_codes(labels)
    testing = np.zeros(len(codes), dtype=bool)
    for code in range(codes.max(initial=-1) + 1):
        rows = np.flatnonzero(codes == code)
        size = min(max(math.floor(fraction * len(rows) + 0.5), 1), len(rows) - 1)
        testing[rng.permutation(rows)[:size]] = True
    if not testing.any():
        raise DataError(
            f"no class among {len(labels)} examples has two, to test on one: add data, leave this file or organization out, or"
            " check data.label",
            code="data.too_few_records",
        )
    return np.flatnonzero(~testing).astype(np.int64), np.flatnonzero(testing).astype(np.int64)


def split_by_class_shares(held: Sequence[Sequence[str]], labels: Sequence[str], rng: np.random.Generator) -> list[Rows]:
    """The rows of further examples, dealt to clients in the proportions in which they hold each class.

    As clients of one pooled file differ in their classes alone, what each gets is like what it holds: as if its own records had
    been split, class by class. Disjoint, together all of `labels` whose class somebody holds, each list ascending.

    Args:
        held: For each client, the classes of its examples.
        labels: The classes of the further examples.
    """
    names = sorted({name for own in held for name in own})
    code = {name: number for number, name in enumerate(names)}
    owned = np.stack([np.bincount([code[name] for name in own], minlength=len(names)) for own in held], axis=1)
    parts: list[list[Rows]] = [[] for _ in held]
    for name, own in zip(names, owned, strict=True):
        rows = rng.permutation(np.flatnonzero([label == name for label in labels]))
        ends = np.rint(np.cumsum(own) / own.sum() * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def _class_codes(labels: Sequence[str]) -> NDArray[np.int64]:
    """Each label as the index of its class, classes in alphabetical order."""
    index = {name: code for code, name in enumerate(sorted(set(labels)))}
    return np.array([index[label] for label in labels], dtype=np.int64)


def _draw_cuts(
    kind: str, value: float, counts: NDArray[np.int64], config: PartitionConfig, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Where each client's piece of each group ends (groups × clients), from the first draw that gives all enough."""
    best = 0
    for _ in range(MAX_DRAWS):
        shares = _draw_shares(kind, value, len(counts), config, rng)
        cuts = np.rint(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        smallest = int(np.diff(cuts, axis=1, prepend=0).sum(axis=0).min())
        if smallest >= config.min_examples:
            return cuts
        best = max(best, smallest)
    raise DataError(
        f"scheme {config.scheme!r} with {config.clients} clients left one with {best} examples or fewer"
        f" in each of {MAX_DRAWS} draws, and min_examples is {config.min_examples}:"
        " use fewer clients, a larger ALPHA or K, or a smaller min_examples",
        code="data.too_few_records",
    )


def _draw_shares(kind: str, value: float, groups: int, config: PartitionConfig, rng: np.random.Generator) -> Shares:
    if kind in ("dirichlet", "quantity"):
        return rng.dirichlet(np.full(config.clients, value), size=groups)
    sizes = np.ones(config.clients)
    if config.sizes != "equal":  # a size may underflow to 0, and yet the only holder of a class gets all of it
        sizes = np.maximum(rng.dirichlet(np.full(config.clients, config.sizes)), 1e-12)
    shares: Shares = sizes[None, :]
    if kind == "shards":
        shares = shares * _deal_classes(int(value), groups, config.clients, rng)
    total: Shares = shares.sum(axis=1, keepdims=True)
    return shares / total


def _deal_classes(classes_each: int, classes: int, clients: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Who holds which class (classes × clients): K each, dealt in turn from a shuffled deck; no class is left over."""
    deck = rng.permutation(classes)
    holds = np.zeros((classes, clients), dtype=bool)
    for client in range(clients):
        holds[deck[np.arange(client * classes_each, (client + 1) * classes_each) % classes], client] = True
    return holds


def _check_shards(classes_each: int, clients: int, classes: int) -> None:
    scheme = f"scheme 'shards:{classes_each}'"
    if classes_each > classes:
        raise DataError(
            f"{scheme} needs {classes_each} classes, and the data has {classes}: use a smaller K", code="data.too_few_classes"
        )
    if clients * classes_each < classes:
        held = f"{clients} clients hold {clients * classes_each} of {classes}"
        raise DataError(
            f"{scheme} leaves classes without a client, as {held}: use more clients or a larger K", code="data.too_few_clients"
        )


def _parse(scheme: str) -> tuple[str, float]:
    """A scheme's name and its number (0 for iid); a ValueError says what is wrong with it."""
    kind, _, argument = scheme.partition(":")
    if scheme == "iid":
        return "iid", 0.0
    if kind == "iid":
        raise ValueError(f"scheme {scheme!r} has something after the name: expected 'iid'")
    if kind not in ("dirichlet", "quantity", "shards"):
        raise ValueError(f"scheme {scheme!r} is not known{nearest(kind, SCHEMES)}")
    try:
        value = float(int(argument) if kind == "shards" else float(argument))
    except (ValueError, OverflowError) as error:
        example = "a whole number of classes, as in 'shards:2'" if kind == "shards" else f"ALPHA, as in '{kind}:0.5'"
        raise ValueError(f"scheme {scheme!r} has {argument!r} after the name: expected {example}") from error
    if kind != "shards":
        _check_alpha(value, f"scheme {scheme!r}")
    elif value < 1:
        raise ValueError(f"scheme {scheme!r} gives a client no class: expected K of 1 or more")
    return kind, value


def _check_alpha(alpha: float, given: str) -> None:
    low, high = ALPHA_RANGE
    if not low <= alpha <= high:
        raise ValueError(f"{given} is out of range: expected ALPHA from {low:g} to {high:g}")


@dataclass(frozen=True)
class UnitGroups:
    """The rows of a file by unit, in the order in which units come first.

    Attributes:
        groups: The rows of each unit.
        strata: The class of each unit: that of most of its records, of equally many the alphabetically first.
        names: By which each unit is known in another file.
    """

    groups: tuple[tuple[int, ...], ...]
    strata: tuple[str, ...]
    names: tuple[str | bytes, ...]

    def rows(self, chosen: Iterable[int]) -> Rows:
        """The rows of the chosen groups, ascending."""
        return np.array(sorted(row for group in chosen for row in self.groups[group]), dtype=np.int64)

    def units_of_rows(self, rows: Collection[int]) -> set[str | bytes]:
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
    """By the column of the units where one was read, else by `record_identity`."""
    names: Sequence[str | bytes] = records.units or records.identities
    groups = group_positions(names)
    return UnitGroups(
        tuple(map(tuple, groups)),
        tuple(_find_stratum(records, group) for group in groups),
        tuple(names[group[0]] for group in groups),
    )


def _find_stratum(records: Records, group: Sequence[int]) -> str:
    """The most frequent one of a unit's records; of several the first by name."""
    if len(group) == 1:  # most are, and counting them takes ten times as long
        return get_stratum(records.labels[group[0]])
    counts = Counter(get_stratum(records.labels[row]) for row in group)
    return min(counts, key=lambda name: (-counts[name], name))

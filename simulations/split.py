"""Who holds which record: a pooled file dealt to simulated organizations or files that are one each, and what tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from cotune.data.config import has_labels
from cotune.data.dataset import Dataset
from cotune.data.multi_task import keep_tasks
from cotune.data.natural_partition import get_partition_column, read_owners
from cotune.data.partition import PartitionConfig, Rows, UnitGroups, partition, split_by_class_shares, split_test, unit_groups
from cotune.data.record_reading import organization_name
from cotune.data.records import Records
from cotune.errors import DataError, PlanError
from cotune.plan.plan import Plan
from cotune.privacy.accounting.display_rounding import round_to_two_digits
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.random_generators import seeded_generator
from cotune.privacy.policy import Policy


@dataclass(frozen=True)
class Share:
    """The training records of one organization.

    Attributes:
        name: Of the organization.
        file: That its records are in; None: the one pooled file.
        rows: Of the file.
        units: To how many the plan's promise is made.
        epsilon: Its own, where it wants to spend less than the plan allows.
        rank: Of adapters, its own where it is smaller than the plan's.
        base: Its own base model, where it is not the plan's.
        held_out: Rows of its file that test, and on which nobody trains.
        tasks: Of several, those that it has labels of; empty: of all.
    """

    name: str
    file: Path | None
    rows: Rows
    units: int
    epsilon: float | None = None  # its own, where it wants to spend less than the plan allows
    rank: int | None = None  # of adapters, its own where it is smaller than the plan's
    base: str | None = None
    held_out: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # rows of its file that test, and none trains on
    tasks: tuple[str, ...] = ()

    def public_examples(self, plan: Plan) -> int:
        """N: rounded down to two digits, which a simulated organization declares; without privacy the true number."""
        return round_to_two_digits(self.units) if isinstance(plan.privacy, RecordPrivacy) else self.units

    def policy(self, plan: Plan) -> Policy:
        """Allows everything, with its own ε, rank and public number."""
        declared = self.public_examples(plan) if isinstance(plan.privacy, RecordPrivacy) else None
        return Policy.permissive(self.epsilon, self.rank, declared)


Portions = tuple[tuple[Path | None, Rows], ...]


def split_records(
    plan: Plan, records: dict[Path | None, Records]
) -> tuple[tuple[Share, ...], Portions, Portions, Counter[Path | None]]:
    """(shares, test set, validation set, how many records of a file are left out of the last two as their unit is elsewhere).

    One file is split over simulated organizations; of several files each is one. The records of a unit stay together (see
    `unit_groups`); of one that several files hold, those that would test are left out where another file trains on it.
    """
    rng = seeded_generator(plan.seed, "partition")
    shares: list[Share] = []
    test: list[tuple[Path | None, Rows]] = []
    validation: list[tuple[Path | None, Rows]] = []
    units = {file: unit_groups(found) for file, found in records.items()}
    for file, name, own, found in _pools(plan, records, units):
        train, held_out = _held_out(own, plan.test_fraction, rng, name or found.source)
        test.append((file, own.rows(held_out)))
        if plan.validation_fraction:
            kept, servers = _held_out(own, plan.validation_fraction, rng, name or found.source, train)
            validation.append((file, own.rows(train[servers])))
            train = train[kept]
        if name is not None:
            shares.append(replace(_share(plan, found, name, file, own.rows(train)), held_out=test[-1][1]))
        else:
            shares += _dealt(plan, found, own, train, held_out, rng)
    shares = _with_tasks(plan, records, shares)
    before = _sizes(test) + _sizes(validation)
    if len(units) > 1:
        validation = _apart(validation, units, [(share.file, share.rows) for share in shares])
        test = _apart(test, units, [(share.file, share.rows) for share in shares] + validation)
        shares = [replace(share, held_out=rows) for share, (_, rows) in zip(shares, test, strict=True)]
    if not sum(_sizes(test).values()):
        raise DataError(
            f"no records are left for the test set: expected more than {plan.test_fraction:g} of them to be at least one",
            code="data.too_few_records",
        )
    return tuple(shares), tuple(test), tuple(validation), before - _sizes(test) - _sizes(validation)


def _with_tasks(plan: Plan, records: Mapping[Path | None, Records], shares: list[Share]) -> list[Share]:
    """The shares, each with the tasks that it has labels of, and the records that are labeled for one of them."""
    given = plan.simulation.tasks
    if not given:
        return shares
    if len(given) != len(shares):
        raise PlanError(
            f"the plan has {len(given)} values in simulation.tasks for {len(shares)} organizations: expected one for each",
            code="plan.values_per_organization",
        )
    return [_of_tasks(plan, records[share.file], share, tasks) for share, tasks in zip(shares, given, strict=True)]


def _of_tasks(plan: Plan, records: Records, share: Share, tasks: tuple[str, ...]) -> Share:
    held = keep_tasks(records, tasks)
    rows = np.asarray([row for row in share.rows if held.labels[row]], dtype=np.int64)
    own = _share(plan, held, share.name, share.file, rows)
    if own.units < plan.simulation.min_examples:
        raise DataError(
            f"{share.name} has {own.units} records of its tasks ({', '.join(tasks)}), and simulation.min_examples is"
            f" {plan.simulation.min_examples}: give it other tasks, or use a smaller min_examples",
            code="data.too_few_records",
        )
    return replace(own, held_out=share.held_out, tasks=tasks)


def _sizes(portions: Sequence[tuple[Path | None, Rows]]) -> Counter[Path | None]:
    """File -> how many of its records they hold."""
    found: Counter[Path | None] = Counter()
    for file, rows in portions:
        found[file] += len(rows)
    return found


def _held_out(
    own: UnitGroups, fraction: float, rng: np.random.Generator, whose: str, of: Rows | None = None
) -> tuple[Rows, Rows]:
    """See `split_test`; an error names the organization, or the file that is dealt out."""
    try:
        return split_test(own.strata if of is None else [own.strata[i] for i in of], fraction, rng)
    except DataError as error:
        raise DataError(f"{whose}: {error}", code=error.code) from None


def _pools(
    plan: Plan, records: Mapping[Path | None, Records], units: Mapping[Path | None, UnitGroups]
) -> Iterator[tuple[Path | None, str | None, UnitGroups, Records]]:
    """(file, organization, its units, the file's records); the organization is None where its records are dealt out."""
    column = get_partition_column(plan.simulation.partition)
    if column is not None and None not in records:
        raise PlanError(
            f'the plan has simulation.partition = "{plan.simulation.partition}" for a folder with one file per organization:'
            " expected one file with that column, or no partition",
            code="plan.partition",
        )
    for file, found in records.items():
        if file is not None or column is None:
            yield file, None if file is None else organization_name(file), units[file], found
            continue
        for name, own in units[file].by(read_owners(plan.data, plan.task, found, column)).items():
            yield file, _checked_size(plan, name, own), own, found


def _checked_size(plan: Plan, name: str, own: UnitGroups) -> str:
    if len(own.groups) < plan.simulation.min_examples:
        raise DataError(
            f"{name} has {len(own.groups)} records by {plan.simulation.partition}, and simulation.min_examples is"
            f" {plan.simulation.min_examples}: leave it out of the file, or use a smaller min_examples",
            code="data.too_few_records",
        )
    return name


def _dealt(
    plan: Plan, records: Records, own: UnitGroups, train: Rows, held_out: Rows, rng: np.random.Generator
) -> Iterator[Share]:
    """The organizations that a pooled file is split over; each holds out test records that are like its own."""
    parts = partition([own.strata[i] for i in train], _partition_config(plan), rng)
    held = [[own.strata[i] for i in train[groups]] for groups in parts]
    tests = split_by_class_shares(held, [own.strata[i] for i in held_out], seeded_generator(plan.seed, "own test"))
    for number, (groups, testing) in enumerate(zip(parts, tests, strict=True), start=1):
        share = _share(plan, records, f"org-{number}", None, own.rows(train[groups]))
        yield replace(share, held_out=own.rows(held_out[testing]))


def _share(plan: Plan, records: Records, name: str, file: Path | None, rows: Rows) -> Share:
    return Share(name, file, rows, count_units(plan, records, rows))


def count_units(plan: Plan, records: Records, rows: Rows) -> int:
    """Return how many units some rows of a file are of, after what the plan's promise leaves out."""
    return len(Dataset(((records, rows),), plan.labels, plan.task).bound_contributions(plan.privacy, plan.seed).units)


def _apart(
    held_out: Sequence[tuple[Path | None, Rows]],
    units: Mapping[Path | None, UnitGroups],
    used: Sequence[tuple[Path | None, Rows]],
) -> list[tuple[Path | None, Rows]]:
    """What is held out, without the units that are used elsewhere."""
    names = {name for file, rows in used for name in units[file].units_of_rows(rows)}
    return [(file, units[file].without(rows, names)) for file, rows in held_out]


def _partition_config(plan: Plan) -> PartitionConfig:
    simulation = plan.simulation
    if not has_labels(plan.task) and simulation.partition.startswith(("dirichlet", "shards")):
        raise PlanError(
            f'simulation.partition = "{simulation.partition}" shares out classes, and the records of task = {plan.task} have'
            " none: expected iid, quantity:ALPHA or column:NAME",
            code="plan.partition",
        )
    try:
        return PartitionConfig(clients=simulation.clients, scheme=simulation.partition, min_examples=simulation.min_examples)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise PlanError(
            f'the plan has simulation.partition = "{simulation.partition}": {reason}', code="plan.partition"
        ) from None

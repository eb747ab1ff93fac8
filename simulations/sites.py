"""Before a simulation: the plan is resolved against data and model, the data are split, and every organisation gets its site."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from cotune.client.budget import budget_of, check_examples, noise_multiplier
from cotune.client.setting import check_stages
from cotune.client.site_folder import SiteFile
from cotune.models.base import find_base
from cotune.models.device import pick_device
from cotune.models.durable import write_durably
from cotune.models.errors import DataError, PlanError
from cotune.models.holdings import Holdings, write_holdings
from cotune.models.left_out import ELSEWHERE
from cotune.models.model_settings import base_labels
from cotune.models.records import Records, check_labels, is_one_source, organisation_files, organisation_name, read_records
from cotune.plan.model import model_of
from cotune.plan.schema import Plan
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import Policy, dump_policy
from cotune.privacy.randomness import seeded_generator
from cotune.privacy.rounding import two_digits
from cotune.server.run_folder import Participant, RunFile, RunFolder
from cotune.server.suitability import check_suits
from cotune.simulations.data_notes import LeftOut, data_notes, left_out_of
from cotune.simulations.natural import column_of, owners_of
from cotune.simulations.partitions import PartitionConfig, Rows, deal_alike, partition, split_test
from cotune.simulations.unit_groups import UnitGroups, unit_groups


@dataclass(frozen=True)
class Share:
    """The training records of one organisation: rows of a file. units: to how many the plan's promise is made."""

    name: str
    file: Path | None
    rows: Rows
    units: int
    epsilon: float | None = None  # its own, where it wants to spend less than the plan allows
    rank: int | None = None  # of adapters, its own where it is smaller than the plan's
    held_out: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # rows of its file that test, and none trains on

    def public_examples(self, plan: Plan) -> int:
        """N: rounded down to two digits, which a simulated organization declares; without privacy the true number."""
        return two_digits(self.units) if isinstance(plan.privacy, RecordPrivacy) else self.units

    def policy(self, plan: Plan) -> Policy:
        """Allows everything, with its own ε, rank and public number."""
        declared = self.public_examples(plan) if isinstance(plan.privacy, RecordPrivacy) else None
        return Policy.permissive(self.epsilon, self.rank, declared)


@dataclass(frozen=True)
class Prepared:
    """A plan with nothing left open, and who holds what."""

    plan: Plan
    shares: tuple[Share, ...]
    test: tuple[tuple[Path | None, Rows], ...]
    records: dict[Path | None, Records]
    noise: dict[str, float]  # organisation -> σ; empty without privacy
    validation: tuple[tuple[Path | None, Rows], ...] = ()  # of the server
    left_out_by_file: LeftOut = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all records, file by file."""
        return hashlib.sha256("".join(records.fingerprint for records in self.records.values()).encode()).hexdigest()

    @property
    def left_out(self) -> dict[str, int]:
        """How many records of all files do not count, by the reason."""
        return dict(sum((Counter(reasons) for reasons in self.left_out_by_file.values()), Counter[str]()))

    @property
    def notes(self) -> list[str]:
        """What whoever reads the results should know about the records."""
        return data_notes(self.plan, self.left_out_by_file, self.records)

    def label_counts(self, share: Share) -> dict[str, int]:
        """Records of each class; with tags, words of each tag."""
        return self.records[share.file].select(share.rows).label_counts_in(self.plan.labels)


def prepare(plan: Plan, device: str = "auto") -> Prepared:
    """Checks everything that can be checked before training, and splits the data.

    Raises DataError, ModelError, PrivacyError, DeviceError or PlanError.
    """
    pick_device(device)
    base = find_base(plan.model)
    records = _read(plan)
    labels = _labels(plan, records, base_labels(base.path))
    data = plan.data.model_copy(update={"source": _absolute(plan.data.source)})
    pinned = plan.model.model_copy(update={**base.pins, "base": _absolute(plan.model.base)})
    resolved = plan.model_copy(update={"labels": labels, "data": data, "model": pinned})
    shares, test, validation, elsewhere = _split(resolved, records)
    shares = _with_own("rank", plan.simulation.ranks, _with_own("epsilon", plan.simulation.epsilons, shares))
    for share in shares:
        for stage in resolved.stages:
            check_examples(share.public_examples(resolved), stage.local, share.name)
    check_suits(resolved, len(shares), server_data=plan.validation_fraction > 0)
    noise = _noise(resolved, shares)
    model = model_of(resolved, device)
    check_stages(resolved, model)
    left_out = {
        file: {**reasons, **({ELSEWHERE: elsewhere[file]} if elsewhere[file] else {})}
        for file, reasons in left_out_of(resolved, records, model).items()
    }
    return Prepared(resolved, shares, test, records, noise, validation, left_out)


def _with_own(what: Literal["epsilon", "rank"], values: Sequence[float], shares: tuple[Share, ...]) -> tuple[Share, ...]:
    if not values:
        return shares
    if len(values) != len(shares):
        raise PlanError(
            f"the plan has {len(values)} values in simulation.{what}s for {len(shares)} organisations: expected one for each"
        )
    own: list[dict[str, Any]] = [{what: value} for value in values]
    return tuple(replace(share, **rule) for share, rule in zip(shares, own, strict=True))


def _read(plan: Plan) -> dict[Path | None, Records]:
    """All files of the source; None stands for a source that is one file, or one folder of images."""
    folder, data, task = Path(plan.data.source).expanduser(), plan.data, plan.task
    if not data.source.startswith("package:") and folder.is_dir() and not is_one_source(folder, task):
        return {path.resolve(): read_records(data, path, task) for path in organisation_files(folder, task).values()}
    return {None: read_records(data, task=task)}


def _absolute(source: str) -> str:
    """Local paths in a plan that is kept must not depend on the folder it was started in."""
    path = Path(source).expanduser()
    return str(path.resolve()) if not source.startswith("package:") and path.exists() else source


def _labels(plan: Plan, records: dict[Path | None, Records], of_base: tuple[str, ...]) -> tuple[str, ...]:
    """The plan's class names; else the base model's where they are those of the data; else those of the data."""
    for found in records.values():
        if plan.labels and not set(found.labels) <= set(plan.labels):
            check_labels(found, plan.labels)  # says which file has the classes that the plan lacks
    together = check_labels(_joined(list(records.values())), plan.labels or None)
    return plan.labels or (of_base if set(of_base) == set(together) else together)


def _joined(records: list[Records]) -> Records:
    inputs = tuple(given for r in records for given in r.inputs)
    return Records(inputs, tuple(label for r in records for label in r.labels), records[0].source)


Portions = tuple[tuple[Path | None, Rows], ...]


def _split(plan: Plan, records: dict[Path | None, Records]) -> tuple[tuple[Share, ...], Portions, Portions, Counter[Path | None]]:
    """(shares, test set, validation set, how many records of a file are left out of the last two as their unit is elsewhere).

    One file is split over simulated organisations; of several files each is one. The records of a unit stay together (see
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
    before = _sizes(test) + _sizes(validation)
    if len(units) > 1:
        validation = _apart(validation, units, [(share.file, share.rows) for share in shares])
        test = _apart(test, units, [(share.file, share.rows) for share in shares] + validation)
        shares = [replace(share, held_out=rows) for share, (_, rows) in zip(shares, test, strict=True)]
    if not sum(_sizes(test).values()):
        raise DataError(
            f"no records are left for the test set: expected more than {plan.test_fraction:g} of them to be at least one"
        )
    return tuple(shares), tuple(test), tuple(validation), before - _sizes(test) - _sizes(validation)


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
        raise DataError(f"{whose}: {error}") from None


def _pools(
    plan: Plan, records: Mapping[Path | None, Records], units: Mapping[Path | None, UnitGroups]
) -> Iterator[tuple[Path | None, str | None, UnitGroups, Records]]:
    """(file, organization, its units, the file's records); the organization is None where its records are dealt out."""
    column = column_of(plan.simulation.partition)
    if column is not None and None not in records:
        raise PlanError(
            f'the plan has simulation.partition = "{plan.simulation.partition}" for a folder with one file per organization:'
            " expected one file with that column, or no partition"
        )
    for file, found in records.items():
        if file is not None or column is None:
            yield file, None if file is None else organisation_name(file), units[file], found
            continue
        for name, own in units[file].by(owners_of(plan.data, plan.task, found, column)).items():
            yield file, _checked_size(plan, name, own), own, found


def _checked_size(plan: Plan, name: str, own: UnitGroups) -> str:
    if len(own.groups) < plan.simulation.min_examples:
        raise DataError(
            f"{name} has {len(own.groups)} records by {plan.simulation.partition}, and simulation.min_examples is"
            f" {plan.simulation.min_examples}: leave it out of the file, or use a smaller min_examples"
        )
    return name


def _dealt(
    plan: Plan, records: Records, own: UnitGroups, train: Rows, held_out: Rows, rng: np.random.Generator
) -> Iterator[Share]:
    """The organizations that a pooled file is split over; each holds out test records that are like its own."""
    parts = partition([own.strata[i] for i in train], _partition_config(plan), rng)
    held = [[own.strata[i] for i in train[groups]] for groups in parts]
    tests = deal_alike(held, [own.strata[i] for i in held_out], seeded_generator(plan.seed, "own test"))
    for number, (groups, testing) in enumerate(zip(parts, tests, strict=True), start=1):
        share = _share(plan, records, f"org-{number}", None, own.rows(train[groups]))
        yield replace(share, held_out=own.rows(held_out[testing]))


def _share(plan: Plan, records: Records, name: str, file: Path | None, rows: Rows) -> Share:
    held = Holdings(((records, rows),), plan.labels, plan.task).bounded(plan.privacy, plan.seed)
    return Share(name, file, rows, len(held.units))


def _apart(
    held_out: Sequence[tuple[Path | None, Rows]],
    units: Mapping[Path | None, UnitGroups],
    used: Sequence[tuple[Path | None, Rows]],
) -> list[tuple[Path | None, Rows]]:
    """What is held out, without the units that are used elsewhere."""
    names = {name for file, rows in used for name in units[file].names_at(rows)}
    return [(file, units[file].without(rows, names)) for file, rows in held_out]


def _partition_config(plan: Plan) -> PartitionConfig:
    simulation = plan.simulation
    try:
        return PartitionConfig(clients=simulation.clients, scheme=simulation.partition, min_examples=simulation.min_examples)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise PlanError(f'the plan has simulation.partition = "{simulation.partition}": {reason}') from None


def _noise(plan: Plan, shares: tuple[Share, ...]) -> dict[str, float]:
    if not isinstance(plan.privacy, RecordPrivacy):
        return {}
    return {share.name: _noise_of(plan, plan.privacy, share) for share in shares}


def _noise_of(plan: Plan, privacy: RecordPrivacy, share: Share) -> float:
    policy, examples = share.policy(plan), share.public_examples(plan)
    return noise_multiplier(plan, policy, budget_of(privacy, policy, examples), examples, 1)


def make_run(prepared: Prepared, path: Path, engine: str, device: str) -> RunFolder:
    """Writes the run's folder with its sites and its test set."""
    plan = prepared.plan
    for share in prepared.shares:
        make_site(path / "sites" / share.name, share.name, plan, [share], device)
    write_holdings(path / "test" / "data.json", plan.data, list(prepared.test), plan.task)
    if prepared.validation:
        write_holdings(path / "validation" / "data.json", plan.data, list(prepared.validation), plan.task)
    people = tuple(Participant(name=share.name, site=f"sites/{share.name}") for share in prepared.shares)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return RunFolder.create(
        path,
        plan,
        RunFile(run=path.name, created=created, engine=engine, device=device, participants=people, data=prepared.fingerprint),
    )


def make_site(folder: Path, name: str, plan: Plan, shares: Sequence[Share], device: str) -> None:
    """A simulated organisation's folder; its ledger and outbox are left alone where they exist."""
    write_holdings(folder / "data.json", plan.data, [(share.file, np.asarray(share.rows)) for share in shares], plan.task)
    if len(shares) == 1 and shares[0].policy(plan) != Policy.permissive():
        write_durably(folder / "policy.toml", dump_policy(shares[0].policy(plan)).encode())
    write_durably(folder / "site.json", SiteFile(organisation=name, simulated=True, device=device).model_dump_json().encode())

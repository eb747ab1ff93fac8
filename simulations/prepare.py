"""Before a simulation: the plan is resolved against data and model, the data are split, and every organization gets its site.

What a simulation says about its records: how many do not count and why, and classes that look like one.
"""

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
from cotune.client.site_folder import SiteFile
from cotune.client.training.setup import check_stages
from cotune.data.class_names import like_missing, shown, spelled_alike
from cotune.data.dataset import Dataset, write_holdings
from cotune.data.left_out import ELSEWHERE, KEPT, cut_texts, left_out_line
from cotune.data.natural_partition import column_of, owners_of
from cotune.data.partition import PartitionConfig, Rows, UnitGroups, deal_alike, partition, split_test, unit_groups
from cotune.data.records import Records, check_labels, is_one_source, organization_files, organization_name, read_records
from cotune.errors import DataError, PlanError
from cotune.models.base_folder import base_labels
from cotune.models.base_model import find_base
from cotune.models.device import pick_device
from cotune.models.trainable import TrainableModel
from cotune.plan.parameters import model_of
from cotune.plan.schema import Plan
from cotune.privacy.accounting.rounding import round_to_two_digits
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.random import seeded_generator
from cotune.privacy.policy import Policy, dump_policy
from cotune.server.rounds.feasibility import check_feasible
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder
from cotune.storage.files import atomic_write

LeftOut = Mapping[Path | None, Mapping[str, int]]
"""File -> how many of its records do not count in training, or not in full, by the reason."""
_SHOWN = 5  # groups of classes that are named
_FILES = 10  # that are named one by one
# more classes than the first, with fewer records than the second in the mean
_MANY = 20
_RECORDS_OF_A_CLASS = 5
_counted: dict[tuple[str, str, int], Mapping[str, int]] = {}  # (records, model, length) -> how many texts are cut


def left_out_of(plan: Plan, records: Mapping[Path | None, Records], model: TrainableModel) -> LeftOut:
    """Return how many records of each file do not count in training, or not in full, by the reason."""
    return {file: _losses(plan, each, model) for file, each in records.items()}


def _losses(plan: Plan, records: Records, model: TrainableModel) -> Mapping[str, int]:
    found: Counter[str] = Counter()
    for reasons in (records.skipped, _cut(records, model), _copies(plan, records)):
        found.update(reasons)
    return {reason: count for reason, count in found.items() if count}


def data_notes(plan: Plan, left_out: LeftOut, records: Mapping[Path | None, Records]) -> list[str]:
    """Return the sentences about the records of a simulation."""
    total = sum(map(len, records.values()))
    return [*_lines(left_out, records), *alike_notes(plan.labels), *_many_classes(plan, total)]


def _lines(left_out: LeftOut, records: Mapping[Path | None, Records]) -> Iterator[str]:
    """What is left out: of several files each that loses anything, by its name, those that lose most first."""
    if len(records) == 1:
        ((file, held),) = records.items()
        yield from _line(left_out.get(file, {}), len(held), "")
        return
    losing = sorted((file for file in left_out if left_out[file]), key=lambda file: -sum(left_out[file].values()))
    named = losing if len(losing) <= _FILES + 1 else losing[:_FILES]
    for file in named:
        yield from _line(left_out[file], len(records[file]), Path(records[file].source).name)
    if others := losing[len(named) :]:
        together = sum((Counter(left_out[file]) for file in others), Counter[str]())
        yield from _line(together, sum(len(records[file]) for file in others), f"{len(others)} other files")


def _line(reasons: Mapping[str, int], records: int, source: str) -> Iterator[str]:
    line = left_out_line(reasons, records, source)
    if line is not None:
        yield line


def alike_notes(labels: Sequence[str]) -> Iterator[str]:
    """Warnings where classes differ in spelling alone, and where one may be no class."""
    groups = spelled_alike(labels)
    if groups:
        named = "; ".join(" and ".join(map(shown, group)) for group in groups[:_SHOWN])
        more = f", and {len(groups) - _SHOWN} more such groups" if len(groups) > _SHOWN else ""
        yield (
            f"classes differ in spelling alone, and are trained as different ones: {named}{more}; if they are one class, give it"
            " one spelling in all files"
        )
    missing = like_missing(labels)
    if missing:
        yield (
            f"trained as a class, and perhaps a missing label: {' and '.join(map(shown, missing))}; if it is none, leave these"
            " fields empty in all files"
        )


def _many_classes(plan: Plan, records: int) -> Iterator[str]:
    """A warning where the column of labels looks like one of numbers, dates or names."""
    if plan.task == "sequence-classification" and len(plan.labels) > max(_MANY, records // _RECORDS_OF_A_CLASS):
        yield (
            f"the column {plan.data.label!r} has {len(plan.labels):,} classes for {records:,} records, as one of numbers or dates"
            " would: if another one says the class, name it with --label"
        )


def _copies(plan: Plan, records: Records) -> Mapping[str, int]:
    """Records that a promise leaves out; without one, the copies that are trained on."""
    if plan.privacy == "none":
        return {KEPT: len(records) - len(set(records.identities))}
    rows = np.arange(len(records))
    return Dataset(((records, rows),), plan.labels, plan.task).bounded(plan.privacy, plan.seed).dropped


def _cut(records: Records, model: TrainableModel) -> Mapping[str, int]:
    """Counted once for the same records and model, as comparisons prepare many runs."""
    loaded = model.loaded
    key = records.fingerprint, loaded.folder.content_hash, loaded.max_length
    if key not in _counted:
        _counted[key] = cut_texts(model, records.inputs)
    return _counted[key]


@dataclass(frozen=True)
class Share:
    """The training records of one organization: rows of a file. units: to how many the plan's promise is made."""

    name: str
    file: Path | None
    rows: Rows
    units: int
    epsilon: float | None = None  # its own, where it wants to spend less than the plan allows
    rank: int | None = None  # of adapters, its own where it is smaller than the plan's
    held_out: Rows = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # rows of its file that test, and none trains on

    def public_examples(self, plan: Plan) -> int:
        """N: rounded down to two digits, which a simulated organization declares; without privacy the true number."""
        return round_to_two_digits(self.units) if isinstance(plan.privacy, RecordPrivacy) else self.units

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
    noise: dict[str, float]  # organization -> σ; empty without privacy
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
        """What anyone who reads the results should know about the records."""
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
    check_feasible(resolved, len(shares), server_data=plan.validation_fraction > 0)
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
            f"the plan has {len(values)} values in simulation.{what}s for {len(shares)} organizations: expected one for each"
        )
    own: list[dict[str, Any]] = [{what: value} for value in values]
    return tuple(replace(share, **rule) for share, rule in zip(shares, own, strict=True))


def _read(plan: Plan) -> dict[Path | None, Records]:
    """All files of the source; None stands for a source that is one file, or one folder of images."""
    folder = Path(plan.data.source).expanduser()
    data = plan.data
    task = plan.task
    if not data.source.startswith("package:") and folder.is_dir() and not is_one_source(folder, task):
        return {path.resolve(): read_records(data, path, task) for path in organization_files(folder, task).values()}
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
            yield file, None if file is None else organization_name(file), units[file], found
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
    held = Dataset(((records, rows),), plan.labels, plan.task).bounded(plan.privacy, plan.seed)
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
    policy = share.policy(plan)
    examples = share.public_examples(plan)
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
    """A simulated organization's folder; its ledger and outbox are left alone where they exist."""
    write_holdings(folder / "data.json", plan.data, [(share.file, np.asarray(share.rows)) for share in shares], plan.task)
    if len(shares) == 1 and shares[0].policy(plan) != Policy.permissive():
        atomic_write(folder / "policy.toml", dump_policy(shares[0].policy(plan)).encode())
    atomic_write(folder / "site.json", SiteFile(organization=name, simulated=True, device=device).model_dump_json().encode())

"""Before a simulation: the plan is resolved against data and model, the data are split, and every organization gets its site."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cotune.client.noise_calibration import check_examples, get_budget, noise_multiplier
from cotune.client.site_folder import SiteFile, SitePaths
from cotune.client.training.checks.gradient_checks import check_stages
from cotune.data.config import has_labels
from cotune.data.dataset import write_manifest
from cotune.data.metrics.text_metrics import check_text_metrics
from cotune.data.multi_task import check_task_labels, keep_tasks
from cotune.data.partition import Rows
from cotune.data.record_reading import is_one_source, organization_files, read_records
from cotune.data.records import Records, check_labels
from cotune.data.skipped_records import ELSEWHERE
from cotune.ensembles.public_inputs import pin_public
from cotune.errors import PlanError
from cotune.models.base.folder import read_base_labels
from cotune.models.base.lookup import find_base
from cotune.models.device import pick_device
from cotune.models.features.public_map import pin_model
from cotune.plan.plan import Plan
from cotune.plan.public import PublicConfig
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.ledger.ledger import create_run_ledger
from cotune.privacy.policy import Policy, dump_policy
from cotune.server.rounds.feasibility import check_feasible
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder, manifest_file
from cotune.simulations.record_notes import LeftOut, build_notes, count_left_out, holder_notes
from cotune.simulations.split import Share, split_records
from cotune.storage.files import atomic_write
from cotune.storage.json_documents import JsonDocument

RUN_LEDGER = "ledger.sqlite"  # in the folder of a run


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
        holders = {task.name: [s.name for s in self.shares if task.name in (s.tasks or (task.name,))] for task in self.plan.tasks}
        return [*build_notes(self.plan, self.left_out_by_file, self.records), *holder_notes(holders)]

    def label_counts(self, share: Share) -> dict[str, int]:
        """Records of each class; with tags, words of each tag."""
        return self.held(share).select(share.rows).label_counts_in(self.plan.labels)

    def held(self, share: Share) -> Records:
        """The records of the file of an organization, with the labels that it holds."""
        records = self.records[share.file]
        return keep_tasks(records, share.tasks) if share.tasks else records


def prepare(plan: Plan, device: str = "auto") -> Prepared:
    """Checks everything that can be checked before training, and splits the data.

    Raises DataError, ModelError, PrivacyError, DeviceError or PlanError.
    """
    pick_device(device)
    if plan.generate is not None:
        check_text_metrics()
    base = find_base(plan.model)
    records = _read(plan)
    labels = _labels(plan, records, read_base_labels(base.path))
    check_task_labels([task.name for task in plan.tasks], labels, plan.data.source)
    data = plan.data.model_copy(update={"source": _absolute(plan.data.source)})
    pinned = pin_model(plan.model, base).model_copy(update={"base": _absolute(plan.model.base)})
    simulation = plan.simulation.model_copy(update={"bases": tuple(map(_absolute, plan.simulation.bases))})
    resolved = plan.model_copy(
        update={"labels": labels, "data": data, "model": pinned, "public": _pin_public(plan), "simulation": simulation}
    )
    shares, test, validation, elsewhere = split_records(resolved, records)
    shares = _with_own("rank", plan.simulation.ranks, _with_own("epsilon", plan.simulation.epsilons, shares))
    shares = _with_own("base", resolved.simulation.bases, shares)
    for share in shares:
        for stage in resolved.stages:
            check_examples(share.public_examples(resolved), stage.local, share.name)
    check_feasible(resolved, len(shares), server_data=plan.validation_fraction > 0)
    noise = _noise(resolved, shares)
    model = get_plan_model(resolved, device)
    check_stages(resolved, model)
    left_out = {
        file: {**reasons, **({ELSEWHERE: elsewhere[file]} if elsewhere[file] else {})}
        for file, reasons in count_left_out(resolved, records, model).items()
    }
    return Prepared(resolved, shares, test, records, noise, validation, left_out)


def _with_own(
    what: Literal["epsilon", "rank", "base"], values: Sequence[float | str], shares: tuple[Share, ...]
) -> tuple[Share, ...]:
    if not values:
        return shares
    if len(values) != len(shares):
        raise PlanError(
            f"the plan has {len(values)} values in simulation.{what}s for {len(shares)} organizations: expected one for each",
            code="plan.values_per_organization",
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


def _pin_public(plan: Plan) -> PublicConfig:
    """The plan's public inputs, with their hash and number. Raises DataError where they cannot be read."""
    if not plan.public.source:
        return plan.public
    return pin_public(plan, Path()).public.model_copy(update={"source": _absolute(plan.public.source)})


def _labels(plan: Plan, records: dict[Path | None, Records], of_base: tuple[str, ...]) -> tuple[str, ...]:
    """The plan's class names; else the base model's where they are those of the data; else those of the data."""
    if not has_labels(plan.task):
        return ()
    for found in records.values():
        if plan.labels and not set(found.labels) <= set(plan.labels):
            check_labels(found, plan.labels)  # says which file has the classes that the plan lacks
    together = check_labels(_joined(list(records.values())), plan.labels or None)
    return plan.labels or (of_base if set(of_base) == set(together) else together)


def _joined(records: list[Records]) -> Records:
    inputs = tuple(given for r in records for given in r.inputs)
    return Records(inputs, tuple(label for r in records for label in r.labels), records[0].source)


def _noise(plan: Plan, shares: tuple[Share, ...]) -> dict[str, float]:
    if not isinstance(plan.privacy, RecordPrivacy):
        return {}
    return {share.name: _noise_of(plan, plan.privacy, share) for share in shares}


def _noise_of(plan: Plan, privacy: RecordPrivacy, share: Share) -> float:
    policy = share.policy(plan)
    examples = share.public_examples(plan)
    return noise_multiplier(plan, policy, get_budget(privacy, policy, examples), examples, 1)


def make_run(prepared: Prepared, path: Path, engine: str, device: str) -> RunFolder:
    """Write the folder of a run with its sites and its test set, and return it.

    Args:
        prepared: The plan with the rows of each organization and of the test set.
        path: The folder of the run.
        engine: "in-process", "ray" or "flower".
        device: Such as "cpu".
    """
    plan = prepared.plan
    people = make_sites(path, plan, prepared.shares, device)
    write_manifest(manifest_file(path, "test"), plan.data, list(prepared.test), plan.task)
    if prepared.validation:
        write_manifest(manifest_file(path, "validation"), plan.data, list(prepared.validation), plan.task)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return RunFolder.create(
        path,
        plan,
        RunFile(run=path.name, created=created, engine=engine, device=device, participants=people, data=prepared.fingerprint),
    )


def make_sites(run: Path, plan: Plan, shares: Sequence[Share], device: str) -> tuple[Participant, ...]:
    """Write the folders of the organizations of a run, with one file for their ledgers, and return who takes part.

    Args:
        run: The folder of the run.
        plan: The plan.
        shares: One for each organization.
        device: Such as "cpu".
    """
    run.mkdir(parents=True, exist_ok=True)
    ledger = run / RUN_LEDGER
    create_run_ledger(ledger)
    for share in shares:
        make_site(run / "sites" / share.name, share.name, plan, [share], device, ledger)
    return tuple(Participant(name=share.name, site=f"sites/{share.name}") for share in shares)


def make_site(folder: Path, name: str, plan: Plan, shares: Sequence[Share], device: str, run_ledger: Path | None = None) -> None:
    """Write the folder of a simulated organization; an existing ledger and outbox are left alone.

    Args:
        folder: Of the site.
        name: Of the organization.
        plan: The plan; its columns describe the records.
        shares: The rows that it holds, one share for each file or organization that is joined in it.
        device: Such as "cpu".
        run_ledger: The file for the ledgers of all organizations of its run; None: it has one of its own.
    """
    site = SitePaths(folder)
    portions = [(share.file, np.asarray(share.rows)) for share in shares]
    write_manifest(site.records, plan.data, portions, plan.task, [share.tasks for share in shares])
    if len(shares) == 1 and shares[0].policy(plan) != Policy.permissive():
        atomic_write(site.policy_file, dump_policy(shares[0].policy(plan)).encode(), durable=False)
    own = shares[0].base if len(shares) == 1 and plan.shares_predictions else None
    shared = None if run_ledger is None else Path(os.path.relpath(run_ledger, folder))
    described = SiteFile(organization=name, simulated=True, device=device, own_base=own, run_ledger=shared)
    JsonDocument(site.description, SiteFile).write(described, durable=False)

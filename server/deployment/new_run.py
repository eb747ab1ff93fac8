"""Create the folder of a new run of a federation, with everything that the executor needs to run it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cotune.data.config import has_labels
from cotune.data.dataset import DatasetManifest, FileSlice
from cotune.data.readers.sources import get_base_path
from cotune.data.record_reading import read_records
from cotune.data.records import check_labels
from cotune.ensembles.public_inputs import pin_public, read_public_inputs
from cotune.errors import PlanError, RunError
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.reporting.documents.events import Note
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.plan_for_members import build_notes, check_example_bounds
from cotune.server.rounds.feasibility import check_feasible
from cotune.server.runs.base_weights import check_without_weights, describe_weights, holds_weights
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder, check_run_folder, manifest_file, pick_run_folder
from cotune.server.runs.run_model import hide_base_folder
from cotune.storage.json_documents import JsonDocument


def create_run(federation: FederationFolder, overrides: Sequence[str] = (), name: str | None = None) -> RunFolder:
    """Create the folder of a run of the federation's plan by its current members.

    Args:
        federation: The federation.
        overrides: Changes of the plan, such as "rounds=5".
        name: Of the folder; None: <time>-<plan>.

    Raises:
        RunError: If there are no members, or the folder cannot be written.
        PlanError: If an override is not valid, or the plan cannot run with that many members.
        PrivacyError: If client-level privacy is impossible with that many members.
        DataError: If the test set cannot be read.
        ModelError: If the base model's weights are not there, and the run could not do without.
    """
    plan, base = _with_base(federation, load_plan(federation.files.plan, overrides))
    people = tuple(Participant(name=member.name) for member in federation.members.active())
    if not people:
        raise RunError("the federation has no members: invite one first (`cotune server invite`)", code="run.no_members")
    check_feasible(plan, len(people), server_data=False)
    check_example_bounds(plan, federation.members.active())
    if test := _test_file(federation):
        found = read_records(plan.data.without_units(), test, plan.task)
        if has_labels(plan.task):
            check_labels(found, plan.labels)
    place = base or plan.model.base
    weights = holds_weights(place)
    if not weights:
        check_without_weights(plan, base, has_test=test is not None)
    if plan.shares_predictions:
        plan = pin_public(plan, federation.path)
    else:
        read_public_inputs(plan, federation.path)
    path = _folder(federation, plan, name)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    device = federation.config.device
    home = str(federation.path)
    file = RunFile(run=path.name, created=created, engine="superlink", device=device, participants=people, federation=home)
    file = file.model_copy(update={"base": base, "weights": weights})
    try:
        path.mkdir(parents=True, mode=0o700, exist_ok=True)
        _write_test(federation, plan, path)
        folder = RunFolder.create(path, plan, file)
    except OSError as error:
        raise RunError(
            f"the folder {path} cannot be written ({error.strerror}): free space for it, or give write access",
            code="run.not_writable",
        ) from None
    notes = build_notes(plan, federation.members.active())
    for note in notes if weights else [describe_weights(get_base_path(place), held=False), *notes]:
        folder.events.write(Note(text=note))
    return folder


def _with_base(federation: FederationFolder, plan: Plan) -> tuple[Plan, str]:
    """Return the plan as members see it, without the base model's path, and that path, also if it came from `--set`."""
    if plan.model.base == federation.plan.model.base:
        return plan, str(federation.config.base or "")
    return hide_base_folder(plan), str(get_base_path(plan.model.base) or "")


def _folder(federation: FederationFolder, plan: Plan, name: str | None) -> Path:
    runs = federation.files.runs
    if name is None:
        return pick_run_folder(plan.name, runs)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise PlanError(
            f"{name[:100]!r} cannot be the name of a run: expected letters, digits, dots, hyphens and underscores",
            code="plan.invalid_run_name",
        )
    return check_run_folder(runs / name)


def _test_file(federation: FederationFolder) -> Path | None:
    """Return the coordinator's test set, if it has one."""
    test = federation.config.test
    return None if test is None else (federation.path / test).resolve()


def _write_test(federation: FederationFolder, plan: Plan, path: Path) -> None:
    """Write all records of the test set to the run's folder, read as the plan specifies."""
    if file := _test_file(federation):
        document = DatasetManifest(task=plan.task, data=plan.data.without_units(), portions=(FileSlice(path=file),))
        JsonDocument(manifest_file(path, "test"), DatasetManifest).write(document)

"""The cells of a comparison: combinations of variations under a seed, checked before anything runs, each with its folder.

A cell's folder is named for its plan's id, so that one that is there already is read and not played again, no matter who asked
for
it.
The id holds the plan and the base model's hash but not the records: a cell counts only while the fingerprint of the records in
its run.json is that of today's.

What a plan costs its records when it is played, and which records it is judged by: known before anything runs.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cotune.client.noise_calibration import planned_charges
from cotune.errors import CotuneError, PlanError, RunError, nearest
from cotune.observers import Observer
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.reporting.comparison_statistics import Measured, Settings, Variation
from cotune.reporting.documents.summary import OrganizationWorth, read_summary
from cotune.reporting.measures import measures_of
from cotune.server.runs.run_folder import RunFile
from cotune.simulations.prepare import Prepared, prepare
from cotune.storage.json_documents import JsonDocument


@dataclass(frozen=True)
class Promise:
    """Of a plan that was checked.

    Attributes:
        charges: For each organization, all that it will be charged if nothing is interrupted; nothing without privacy.
        deltas: δ of each organization.
        held_out: SHA-256 over which records test and validate.
    """

    charges: tuple[tuple[Steps, ...], ...]
    deltas: tuple[float, ...]
    held_out: str


def build_promise(prepared: Prepared) -> Promise:
    """Return what a plan promises, from the noise that is calibrated for all of its rounds."""
    plan = prepared.plan
    privacy = prepared.plan.privacy
    if not isinstance(privacy, RecordPrivacy):
        return Promise((), (), _held_out(prepared))
    charges = []
    deltas = []
    for share in prepared.shares:
        examples = share.public_examples(plan)
        sigma = prepared.noise[share.name]
        charges.append(tuple(planned_charges(plan, share.policy(plan), sigma, examples)))
        deltas.append(privacy.delta_for(examples))
    return Promise(tuple(charges), tuple(deltas), _held_out(prepared))


def _held_out(prepared: Prepared) -> str:
    digest = hashlib.sha256()
    for what, portions in (("test", prepared.test), ("validation", prepared.validation)):
        for file, rows in portions:
            digest.update(f"{what}\0{file}\0{len(rows)}\0".encode())
            digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    return digest.hexdigest()


_CLOSING = {"{": "}", "[": "]", "(": ")"}
_MAX_SEEDS = 1000


@dataclass(frozen=True)
class GridPoint:
    """A combination under a seed, checked.

    Attributes:
        settings: Key -> value of each variation.
        plan: Resolved.
        plan_id: Of that plan.
        data: Fingerprint of the records.
        promise: What the plan promises its records.
        notes: About the records, such as how many are left out and why.
    """

    settings: Settings
    plan: Plan
    plan_id: str
    data: str
    promise: Promise
    notes: tuple[str, ...] = ()

    @property
    def combination(self) -> str:
        return _describe(self.settings)

    @property
    def name(self) -> str:
        return f"{self.combination}, seed={self.plan.seed}"


def parse_variation(text: str) -> Variation:
    """A variation as KEY=V1,V2, split at commas outside of brackets and quotes. Raises PlanError.

    >>> parse_variation('strategy.fusion=mean,{name="ties",density=0.3}').values
    ('mean', '{name="ties",density=0.3}')
    """
    key, _, rest = text.partition("=")
    values = tuple(value.strip() for value in _split(rest))
    if not key.strip() or not all(values):
        raise PlanError(
            f'the variation "{text}" is not understood: expected KEY=V1,V2, such as partition=iid,dirichlet:0.1',
            code="plan.malformed_variation",
        )
    if len(set(values)) < len(values):
        raise PlanError(f'the variation "{text}" has a value twice: expected distinct ones', code="plan.malformed_variation")
    return Variation(key.strip(), values)


def _split(text: str) -> Iterator[str]:
    start = 0
    closing = list[str]()
    quote = ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _CLOSING:
            closing.append(_CLOSING[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def get_baseline(variations: Sequence[Variation], baseline: str | None) -> str:
    """The value that others are compared with. Raises PlanError for variations that make no grid."""
    if not variations:
        raise PlanError(
            "there is nothing to compare: expected at least one --vary, such as --vary strategy.weighting=examples,uniform",
            code="plan.malformed_variation",
        )
    paths = [variation.path for variation in variations]
    if "seed" in paths:
        raise PlanError(
            "the seed is no key to vary: expected --seeds, which plays every combination under each",
            code="plan.malformed_variation",
        )
    if len(set(paths)) < len(paths):
        raise PlanError(
            f"the keys {', '.join(paths)} cannot be varied together: expected distinct ones", code="plan.malformed_variation"
        )
    first = variations[0]
    if baseline is not None and baseline not in first.values:
        raise PlanError(
            f'the baseline "{baseline}" is no value of {first.key}{nearest(baseline, first.values)}', code="plan.unknown_baseline"
        )
    return first.values[0] if baseline is None else baseline


def build_grid(
    source: str | Path,
    variations: Sequence[Variation],
    seeds: int,
    overrides: Sequence[str],
    device: str,
    listener: Observer = lambda event, fields: None,
) -> list[GridPoint]:
    """All cells in the order of the grid, seeds last. Raises PlanError, which names the combination that is not supported.

    What a plan alone shows to be wrong, such as a name that is unknown, is refused before the first one meets data and model.
    """
    if not 1 <= seeds <= _MAX_SEEDS:
        raise PlanError(f"expected 1 to {_MAX_SEEDS} seeds, got {seeds}", code="plan.seeds")
    keys = [variation.key for variation in variations]
    grid = [tuple(zip(keys, values, strict=True)) for values in itertools.product(*(each.values for each in variations))]
    paths = {variation.key: variation.path for variation in variations}
    first = _plan(source, grid[0], paths, overrides).seed
    seeded = [(settings, seed) for seed in range(first, first + seeds) for settings in grid]
    plans = {key: _plan(source, key[0], paths, [*overrides, f"seed={key[1]}"]) for key in seeded}
    found: dict[tuple[Settings, int], GridPoint] = {}
    for (settings, seed), plan in plans.items():  # seeds outermost: one has one initial model, which is loaded once
        listener("cell_checked", {"checked": len(found), "cells": len(plans), "combinations": len(grid), "seeds": seeds})
        found[settings, seed] = _checked(settings, plan, device)
    cells = [found[settings, seed] for settings in grid for seed in range(first, first + seeds)]
    _check_distinct(cells)
    return cells


def _plan(source: str | Path, settings: Settings, paths: Mapping[str, str], overrides: Sequence[str]) -> Plan:
    """The plan of a combination; without baselines, which cost much and compare nothing here, unless it asks for them."""
    given = [*overrides, *(f"{paths[key]}={value}" for key, value in settings)]
    try:
        plan = load_plan(source, given)
        asked = "baselines" in plan.simulation.model_fields_set
        return plan if asked else load_plan(source, [*given, "simulation.baselines=[]"])
    except PlanError as error:
        raise PlanError(f"{_describe(settings)}: {error}", code=error.code) from None


def _checked(settings: Settings, plan: Plan, device: str) -> GridPoint:
    try:
        prepared = prepare(plan, device)
    except CotuneError as error:
        raise PlanError(f"{_describe(settings)}, seed={plan.seed}: {error}", code=error.code) from None
    return GridPoint(
        settings, prepared.plan, prepared.plan.plan_id, prepared.fingerprint, build_promise(prepared), tuple(prepared.notes)
    )


def _check_distinct(cells: Sequence[GridPoint]) -> None:
    seen: dict[tuple[str, str], GridPoint] = {}
    for cell in cells:
        other = seen.setdefault((cell.plan_id, cell.data), cell)
        if other is not cell:
            raise PlanError(
                f"{other.name} and {cell.name} are the same plan: expected values that differ", code="plan.equal_plans"
            )


def _describe(settings: Settings) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings)


def get_run_path(folder: Path, cell: GridPoint) -> Path:
    """The folder of a cell's run: named for its plan, and for its records too where that one holds a run on others.

    Raises RunError where a run.json is damaged.
    """
    path = folder / "cells" / cell.plan_id[:16]
    file = path / "run.json"
    found = JsonDocument(file, RunFile, advice="expected that of a run; remove its folder").read()
    other = found is not None and found.data != cell.data
    return path.with_name(f"{path.name}-{cell.data[:8]}") if other else path


def is_finished(path: Path, cell: GridPoint) -> bool:
    try:
        return read_summary(path / "summary.json").plan_id == cell.plan_id
    except (OSError, ValueError, KeyError):
        return False


def read_measured(cell: GridPoint, folder: Path, path: Path, reason: str) -> Measured:
    """A cell's result from its summary.json. Raises RunError where that is gone."""
    common = Measured(cell.settings, cell.plan.seed, cell.plan_id, "failed", reason, folder=str(path.relative_to(folder)))
    if reason:
        return common
    try:
        summary = read_summary(path / "summary.json")
    except (OSError, ValueError):
        raise RunError(
            f"{path / 'summary.json'} cannot be read: expected the results of a finished run; remove the folder",
            code="run.damaged_file",
        ) from None
    measure = measures_of(summary)[0]
    own = [each.own.federated[measure.key] for each in summary.organizations if each.own and each.own.federated]
    spent = [each.epsilon_spent for each in summary.organizations if each.epsilon_spent is not None]
    return replace(
        common,
        metrics=dict(summary.test.federated or {}),
        status=summary.status,
        reason=summary.stopped or "",
        worst=min(own, key=measure.rank, default=None),
        spread=statistics.pstdev(own) if own else None,
        **_gain([each.worth for each in summary.organizations if each.worth]),
        bytes_up=summary.bytes.up,
        bytes_down=summary.bytes.down,
        seconds=summary.seconds,
        epsilon=max(spent, default=None),
        deltas=tuple(each.delta for each in summary.organizations if each.delta is not None),
        curve=tuple((entry.round, entry.metrics[measure.key]) for entry in summary.rounds if entry.metrics),
    )


def _gain(compared: Sequence[OrganizationWorth]) -> dict[str, Any]:
    """Of the organizations whose own records say whether joining is worth it; nothing where nobody has trained alone."""
    if not compared:
        return {}
    answers = [each.answer for each in compared]
    return {
        "gain": statistics.fmean(each.difference for each in compared),
        "answers": (answers.count("yes"), answers.count("no"), answers.count("too close to tell")),
    }

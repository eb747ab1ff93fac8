"""Adapt a site's final model to its own records, and compare it with training alone.

Everything stays on this machine: nothing is sent, so nothing is noised and no ε is charged. A model that was fitted to records
may reveal single ones, so an adapted model should stay where the records are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.client.consent.approvals import Approvals
from cotune.client.final_model import ABOUT
from cotune.client.personalization.adaptation import (
    Adaptation,
    OwnRecords,
    adapt,
    build_own_records,
    get_unit_numbers,
    load_base_head,
    split_folds,
)
from cotune.client.site import Site
from cotune.client.site_setup import load_site_model
from cotune.data.dataset import Dataset
from cotune.data.metrics.metrics import compute_metrics
from cotune.data.tasks.classes import classes_from_scores
from cotune.errors import ModelError, RunError
from cotune.models.adapters.adapter import parameter_seed
from cotune.models.base.load import draw_head
from cotune.models.device import pick_device
from cotune.models.encoding import encoded_features
from cotune.models.evaluation.intervals import MIN_TEST_RECORDS, Answers, accuracy_interval, compare_paired, f1_interval
from cotune.models.evaluation.predictor import load_finished
from cotune.models.export import export_model
from cotune.models.features.head import feature_head
from cotune.models.features.head_fit import head_names, head_scores
from cotune.models.trainable import State, TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.required_classes import require_classes
from cotune.plan.tables import PersonalizeConfig
from cotune.reporting.model_card import CARD, model_card
from cotune.storage.json_documents import parse_json

COLUMNS = ("majority", "alone", "received", "adapted")  # from the floor up
STAYS = (
    "Adapted by one organization to its own records, without noise. No ε bounds what it reveals of them: keep it where the"
    " records are."
)


@dataclass(frozen=True)
class Received:
    """A final model in a site.

    Attributes:
        folder: Of the model.
        plan: By which it was trained.
        model: Its encoder, with an untrained head.
        head: The received head.
    """

    folder: Path
    plan: Plan
    model: TrainableModel
    head: State


@dataclass(frozen=True)
class AdaptedSite:
    """An adapted model.

    Attributes:
        folder: Where it was written.
        records: Number of records that it was fitted to.
        adapted: The selected head.
    """

    folder: Path
    records: int
    adapted: Adaptation


def open_final_model(site: Site, wanted: str = "") -> Received:
    """Open the newest final model, or the one whose plan's id begins with `wanted`.

    Raises:
        RunError: If there is none.
        PlanError: If it does not predict classes.
        ModelError: If its head does not read exactly one vector per record, or per word.
    """
    folder, plan = _chosen(site, wanted)
    require_classes(plan, "adapting the received model")
    if plan.tasks:
        raise ModelError(
            f"the model of the plan {plan.name} is for several tasks ({', '.join(task.name for task in plan.tasks)}), and one"
            " head is adapted or evaluated here: expected the folder of one task, such as"
            f" `cotune evaluate {folder / plan.tasks[0].name}`",
            code="model.no_feature_head",
        )
    loaded, labels, task = load_finished(str(folder), plan.model.max_length)
    if (labels, task) != (plan.labels, plan.task):
        raise ModelError(
            f"{folder} is not the model of its plan: expected the classes {', '.join(plan.labels)[:80]}; remove it",
            code="model.wrong_plan",
        )
    model = TrainableModel(loaded, None, plan.seed, pick_device(site.file.device))
    head = model.state(head_names(model))
    draw_head(loaded.module, parameter_seed(plan.seed, "head"))  # before anything is remembered: the model's base from now on
    if feature_head(model) is None:
        raise ModelError(
            f"the head of the model of the plan {plan.name} cannot be run without its encoder: expected one that can be fitted by"
            " itself; use it unchanged, with `cotune predict` and `cotune evaluate`",
            code="model.no_feature_head",
        )
    return Received(folder, plan, model, head)


def _chosen(site: Site, wanted: str) -> tuple[Path, Plan]:
    found = {file.parent: _about(file) for file in sorted(site.models.glob(f"*/{ABOUT}"))}
    fitting = [folder for folder, about in found.items() if about["plan_id"].startswith(wanted)]
    if not fitting or (wanted and len(fitting) > 1):
        known = ", ".join(about["plan_id"][:12] for about in found.values()) or "none so far"
        of_plan = f" of a plan {wanted[:64]}" if wanted else ""
        raise RunError(
            f"{site.folder} has {len(fitting)} finished models{of_plan}: expected one, which comes when a run has ended; models"
            f" of the plans {known} are here",
            code="run.no_such_model",
        )
    newest = max(fitting, key=lambda folder: (folder / ABOUT).stat().st_mtime_ns)
    about = found[newest]  # an earlier version has kept the plan's id alone
    plan = parse_plan(about["plan"]) if "plan" in about else Approvals(site).find(about["plan_id"])
    if plan.plan_id != about["plan_id"]:
        raise RunError(
            f"{newest / ABOUT} does not hold the plan of its model: expected it unchanged; remove the folder",
            code="run.damaged_document",
        )
    return newest, plan


def _about(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_bytes())
        return {**found, "plan_id": str(found["plan_id"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{file} is damaged: expected the plan of a finished model; remove its folder", code="run.damaged_document"
        ) from None


def adapt_site(site: Site, out: Path | None = None, wanted: str = "") -> AdaptedSite:
    """Adapt the received model to the site's own records and export it.

    Args:
        site: Its policy, ledger and audit log are not changed.
        out: Target folder; None: adapted/<plan>/ in the site.
        wanted: First digits of a plan's id; "": the newest model.

    Raises:
        DataError: If there are no usable records.
        RunError, ModelError: See `open_final_model`.
    """
    received = open_final_model(site, wanted)
    own = _own(received, site.dataset(received.plan.labels))
    adapted = adapt(received.model, own, received.head, received.plan.personalize, received.plan.seed)
    received.model.load(adapted.head)
    folder = (out or site.adapted_models / received.folder.name).expanduser()
    _check_free(folder)
    length = received.model.loaded.text_length
    card = model_card(received.plan, privacy=[STAYS], length=length, about=f"{adapted.described}: {STAYS}")
    about = {"plan_id": received.plan.plan_id, "adapted": adapted.described}
    export_model(received.model, folder, {CARD: card, ABOUT: json.dumps(about)})
    return AdaptedSite(folder, own.count, adapted)


def _check_free(folder: Path) -> None:
    """Raise RunError if the target folder is not an earlier export, as an export replaces it."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / ABOUT).exists())):
        raise RunError(
            f"{folder} holds something else than an adapted model: choose another folder with --out", code="run.folder_not_empty"
        )


def _own(received: Received, held: Dataset) -> OwnRecords:
    """Return the features of the records from the received encoder, with their units."""
    return _fitted_to(received.model, received.plan, held)


def _fitted_to(model: TrainableModel, plan: Plan, held: Dataset) -> OwnRecords:
    return build_own_records(
        encoded_features(held, model, {}, plan.model.precision), held.targets, get_unit_numbers(held), len(plan.labels)
    )


def evaluate_site(site: Site, new: Dataset | None = None, wanted: str = "") -> dict[str, Any]:
    """Compare the received model with training alone, on records that neither is fitted to here.

    Args:
        site: It is not changed.
        new: Test records that were in no run; all own records then train. None: a fifth of the own records are held out for the
            test, stratified by class and grouped by unit. The received model was trained on them, too.
        wanted: First digits of a plan's id; "": the newest model.

    Returns:
        Plain values: `columns` (majority, alone, received, adapted) with metrics and intervals, and `worth`: the paired
        comparison of the adapted model with the one trained alone.
    """
    received = open_final_model(site, wanted)
    plan = received.plan
    own = _own(received, site.dataset(received.plan.labels))
    train, judge = next(split_folds(own, _FOLDS, plan.seed)) if new is None else (own, _own(received, new))
    adapted = adapt(received.model, train, received.head, plan.personalize, plan.seed)
    predicted = {
        "majority": torch.full_like(judge.targets, int(train.targets.bincount(minlength=len(plan.labels)).argmax())),
        "received": _predicted(received.model, received.head, judge.features),
        "adapted": _predicted(received.model, adapted.head, judge.features),
    }
    predicted["alone"] = _alone(site, received, adapted, (train, judge), new)
    answers = {name: _answers(predicted[name], judge, len(plan.labels)) for name in COLUMNS}
    return {
        "organization": site.organization,
        "plan": plan.name,
        "plan_id": plan.plan_id,
        "model": str(received.folder),
        "fitted_to": train.count,
        "records": judge.count,
        "seen_by_received": new is None,
        "private": plan.privacy != "none",
        "columns": {name: _metrics(each) for name, each in answers.items()},
        "worth": _worth(answers),
        "adaptation": {"method": adapted.method, "described": adapted.described, "tried": adapted.tried},
    }


_FOLDS = 5  # of which one judges


def _predicted(model: TrainableModel, head: State, features: Tensor) -> Tensor:
    return classes_from_scores(head_scores(model, head, features))


def _alone(
    site: Site, received: Received, adapted: Adaptation, both: tuple[OwnRecords, OwnRecords], new: Dataset | None
) -> Tensor:
    """Return the predictions of a head that was fitted only to own records.

    It uses the features of the base model, which are those of the received encoder if that was not trained.
    """
    train, judge = both
    plan = received.plan
    if all(stage.mode == "head" for stage in plan.stages):
        return _predicted(received.model, adapted.alone, judge.features)
    base = load_site_model(plan, site)
    base.load({})
    own = _fitted_to(base, plan, site.dataset(plan.labels))
    if new is None:
        train, judge = next(split_folds(own, _FOLDS, plan.seed))
    else:
        train = own
        judge = _fitted_to(base, plan, new)
    config = PersonalizeConfig(methods=("alone",), folds=plan.personalize.folds)
    return _predicted(base, adapt(base, train, load_base_head(base), config, plan.seed).alone, judge.features)


def _answers(predicted: Tensor, judge: OwnRecords, classes: int) -> Answers:
    numbers: NDArray[np.int64] = predicted.numpy().astype(np.int64)
    return Answers(judge.targets.numpy().astype(np.int64), numbers, judge.units, classes)


def _metrics(answers: Answers) -> dict[str, Any]:
    found = compute_metrics(answers.truth.tolist(), answers.predicted.tolist(), answers.classes).as_dict()
    return {**found, "accuracy_interval": list(accuracy_interval(answers)), "f1_interval": list(f1_interval(answers))}


def _worth(answers: dict[str, Answers]) -> dict[str, Any]:
    """Compare adapted with alone as the report of a simulation does; never "yes" if a constant prediction is as good."""
    found = compare_paired(answers["adapted"], answers["alone"])
    useful = bool(answers["adapted"].right.mean() > answers["majority"].right.mean())
    return {
        "answer": found.answer if useful or found.answer != "yes" else "no",
        "useful": useful,
        "difference": found.difference,
        "interval": [found.low, found.high],
        "p": found.p,
        "test": found.test,
        "few": len(np.unique(answers["adapted"].units)) < MIN_TEST_RECORDS,
    }

"""Store the final model in the site as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cotune.client.consent.approvals import Approvals
from cotune.client.consent.policy_check import check_base_model
from cotune.client.site import Site
from cotune.client.site_setup import load_site_model
from cotune.client.training.personal.ditto_pfedme import open_personal
from cotune.client.training.personal.parameters import PERSONAL, UNNOISED
from cotune.client.training.personal.prediction_model import export_own_model
from cotune.errors import RunError
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.protocol.messages import (
    Request,
    received_digest,
)
from cotune.reporting.model_card import CARD, model_card, promised
from cotune.storage.files import atomic_write, sync
from cotune.storage.json_documents import parse_json
from cotune.strategies.types import find_not_finite

ABOUT = "cotune.json"  # file in the folder: the plan's id, the digest of what was received, and the plan


def store_final_model(request: Request, plan: Plan, site: Site) -> Path:
    """Store the final model, completed with the site's personal parameters. No record is read.

    Storing the same model again changes nothing.

    Args:
        request: Contains the model.
        plan: Of the request.
        site: Of the organization.

    Returns:
        The folder of the model.

    Raises:
        PolicyError: If the plan is not approved, or its base model is not allowed.
        ModelError: If the parameters are not those of the plan.
        RunError: If the plan does not have the round, the model is not finite, or it cannot be written.
    """
    policy = site.policy()
    Approvals(site).check(plan, policy)
    check_base_model(plan, policy)
    if not 1 <= request.round <= plan.rounds:  # a run may end before its last round
        raise RunError(
            f"a finished model arrived after round {request.round}: expected one of the plan's {plan.rounds} rounds",
            code="run.wrong_round",
        )
    folder = site.models / f"{plan.name}-{plan.plan_id[:12]}"
    about = {
        "plan_id": plan.plan_id,
        "received": received_digest(request.state, request.sent),
        "plan": json.loads(plan.canonical()),
    }
    if _read(folder / ABOUT) != about:
        if plan.shares_predictions:
            _store_own_model(plan, site, folder)
        model = load_site_model(plan, site)
        state = dict(request.state)
        if broken := find_not_finite(state):
            raise RunError(
                f"the finished model is not finite in {broken[:80]}: expected finite parameters", code="run.model_not_finite"
            )
        model.load(state)
        if not plan.shares_predictions:
            open_personal(plan, site, model, request.round, request.admitted).own_model(state)
        card = model_card(
            plan,
            privacy=[UNNOISED] if plan.personal.keeps_copy and not plan.personal.noise else promised(plan),
            length=model.loaded.text_length,
        )
        _write(model, folder, card, about)
    return folder


def _write(model: TrainableModel, folder: Path, card: str, about: Mapping[str, Any]) -> None:
    """Write the model durably, its description last, so that an interrupted write is repeated; raises RunError if it fails."""
    try:
        _remove_unfinished(folder.parent)
        export_model(model, folder, {CARD: card})
        for file in [*(file for file in folder.rglob("*") if file.is_file()), folder, folder.parent]:
            sync(file)
        atomic_write(folder / ABOUT, json.dumps(about).encode())
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise RunError(
            f"the finished model cannot be written to {folder} ({reason}): free space, or correct the permissions, and ask the"
            " coordinator to hand it out again (`cotune server run --resume`)",
            code="run.not_writable",
        ) from None


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed process has left; only one process writes models into a site at a time."""
    for part in folder.glob(".model.*"):
        shutil.rmtree(part, ignore_errors=True)


def _read(file: Path) -> object:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def _store_own_model(plan: Plan, site: Site, folder: Path) -> None:
    """Store the organization's own model beside the student of all predictions; nothing if it has not trained."""
    state = site.load_newest_state(plan.plan_id, PERSONAL)
    if state:
        export_own_model(plan, site, state, folder.with_name(f"{folder.name}-own"))

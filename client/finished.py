"""The finished model of a plan: what every organisation is given at the end, as a Hugging Face folder in its site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cotune.client.approval import Approvals
from cotune.client.base import model_here
from cotune.client.consent import check_base_model
from cotune.client.personal import Personal
from cotune.client.site import Site
from cotune.models.durable import sync, write_durably
from cotune.models.errors import RunError
from cotune.models.export import export_model
from cotune.models.nested import json_of
from cotune.models.sharing import SharedModel
from cotune.plan.card import CARD, model_card, promised
from cotune.plan.schema import Plan
from cotune.strategies.updates import not_finite
from cotune.strategies.wire import Request, received_digest

ABOUT = "cotune.json"  # in the folder: which plan, the digest of what came, and the plan itself


def keep_finished(request: Request, plan: Plan, site: Site) -> Path:
    """Exports the model, with the own part where the plan lets organisations keep one, and returns its folder; no record is read.

    The same model again changes nothing. Raises Declined for a plan that nobody here has approved, or a base model that is not
    allowed; ModelError for parameters that are not the plan's; RunError for a round that is none of the plan's, and for a model
    that cannot be written.
    """
    policy = site.policy()
    Approvals(site).check(plan, policy)
    check_base_model(plan, policy)
    if not 1 <= request.round <= plan.rounds:  # a run may end before its last round, with what it has
        raise RunError(f"a finished model came after round {request.round}: expected one of the plan's {plan.rounds} rounds")
    folder = site.folder / "models" / f"{plan.name}-{plan.plan_id[:12]}"
    about = {
        "plan_id": plan.plan_id,
        "received": received_digest(request.state, request.sent),
        "plan": json.loads(plan.canonical()),
    }
    if _read(folder / ABOUT) != about:
        model, state = model_here(plan, site), dict(request.state)
        if broken := not_finite(state):
            raise RunError(f"the finished model is not finite in {broken[:80]}: expected finite parameters")
        model.load(state)
        Personal(plan, site, model, request.round, request.admitted).joined(state)
        card = model_card(plan, privacy=promised(plan), length=model.loaded.max_length)
        _write(model, folder, card, about)
    return folder


def _write(model: SharedModel, folder: Path, card: str, about: Mapping[str, Any]) -> None:
    """Complete and on the disk before it says so: whatever ends it earlier, the next time begins anew. Raises RunError."""
    try:
        _remove_unfinished(folder.parent)
        export_model(model, folder, {CARD: card})
        for file in [*(file for file in folder.rglob("*") if file.is_file()), folder, folder.parent]:
            sync(file)
        write_durably(folder / ABOUT, json.dumps(about).encode())
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise RunError(
            f"the finished model cannot be written to {folder} ({reason}): make room, or mend the permissions, and ask the"
            " coordinator to hand it out again (`cotune server run --resume`)"
        ) from None


def _remove_unfinished(folder: Path) -> None:
    """What a process that was killed has left: one writes models into a site at a time."""
    for part in folder.glob(".model.*"):
        shutil.rmtree(part, ignore_errors=True)


def _read(file: Path) -> object:
    try:
        return json_of(file.read_bytes())
    except (OSError, ValueError):
        return None

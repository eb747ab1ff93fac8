"""The model of a run: its base model on the coordinator's machine, and the parameters that a round leaves.

Members see the name of the base model and its hash, and no folder.

A plan that names its base model by a folder goes to members with the folder's last name alone, as `folder:NAME`. Where that is is
in server.toml, and in run.json of each run.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.data.readers.sources import get_base_path
from cotune.models.base_lookup import FOLDER
from cotune.models.trainable import State, TrainableModel, strip_prefix
from cotune.plan.parameters import get_plan_model
from cotune.plan.schema import Plan
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.strategies.aggregator import build_server_optimizer


def without_place(plan: Plan) -> Plan:
    """The same with the folder's last name alone."""
    place = get_base_path(plan.model.base)
    return plan if place is None else _naming(plan, f"{FOLDER}{place.name}")


def model_here(folder: RunFolder) -> TrainableModel:
    """The model of a run's plan, on the run's device, as `plan.parameters.get_plan_model` loads it."""
    plan = folder.plan if not folder.file.base else _naming(folder.plan, folder.file.base)
    return get_plan_model(plan, folder.file.device)


def served(plan: Plan, state: State, memory: Mapping[str, Tensor]) -> State:
    """The model to judge and to hand out: θ, or what the server optimizer makes of it."""
    return build_server_optimizer(plan.strategy).serve(state, strip_prefix("optimizer/", memory))


def final_params(plan: Plan, progress: Progress) -> State:
    """The served model of a run after its last finished round."""
    return served(plan, progress.state, progress.memory)


def _naming(plan: Plan, base: str) -> Plan:
    return plan.model_copy(update={"model": plan.model.model_copy(update={"base": base})})

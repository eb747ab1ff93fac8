"""The model of a run: its base model on the coordinator's machine, and the parameters that a round leaves.

Members see the name of the base model and its hash, and no folder.

A plan that names its base model by a folder goes to members with the folder's last name alone, as `folder:NAME`. Where that is is
in server.toml, and in run.json of each run.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cotune.data.readers.sources import get_base_path
from cotune.models.base.lookup import FOLDER
from cotune.models.trainable import State, TrainableModel, strip_prefix
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import Progress, RunFolder
from cotune.strategies.aggregator import build_server_optimizer

STUDENT = "student/"  # before the names of its parameters in what a run remembers


def hide_base_folder(plan: Plan) -> Plan:
    """Return the plan as members see it: of a base model in a folder, the folder's last name alone."""
    place = get_base_path(plan.model.base)
    return plan if place is None else with_base(plan, f"{FOLDER}{place.name}")


def load_run_model(folder: RunFolder) -> TrainableModel:
    """Load the model of a run's plan on the run's device, without weights where run.json allows that and they are not there."""
    return open_server_model(folder.plan, folder.file.base, folder.file.device, needs_weights=folder.file.weights)


def open_server_model(plan: Plan, base: str, device: str, *, needs_weights: bool) -> TrainableModel:
    """Return the model of a plan on the coordinator's machine.

    Args:
        plan: As members see it.
        base: Where the base model is on this machine; empty: as in the plan.
        device: Such as "cpu".
        needs_weights: False: without weights in its folder, the model does without.
    """
    return get_plan_model(with_base(plan, base) if base else plan, device, needs_weights=needs_weights)


def inference_params(plan: Plan, state: State, memory: Mapping[str, Tensor]) -> State:
    """Return the parameters to evaluate and to deliver.

    Args:
        plan: Of the run.
        state: θ after a round.
        memory: The run's memory after the round.

    Returns:
        θ as the server optimizer serves it; the student's parameters if organizations share only predictions.
    """
    if plan.shares_predictions:
        return strip_prefix(STUDENT, memory)
    return build_server_optimizer(plan.strategy).serve(state, strip_prefix("optimizer/", memory))


def final_params(plan: Plan, progress: Progress) -> State:
    """Return the parameters to deliver after the last finished round."""
    return inference_params(plan, progress.state, progress.memory)


def with_base(plan: Plan, base: str) -> Plan:
    """Return the plan with another name of its base model."""
    return plan.model_copy(update={"model": plan.model.model_copy(update={"base": base})})

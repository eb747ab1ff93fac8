"""What a server does without the weights of its base model, and what it refuses to begin."""

from __future__ import annotations

from pathlib import Path

from cotune.data.readers.sources import get_base_path
from cotune.errors import ModelError
from cotune.models.base.folder import has_weights
from cotune.models.trainable import TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import state_shapes
from cotune.server.runs.run_model import open_server_model

_COPY = "copy the base model's *.safetensors to its folder on this machine, or"


def holds_weights(base: str) -> bool:
    """Return whether a base model's folder on this machine has weights; True where it is no folder and will be fetched whole.

    Args:
        base: Name or folder of the base model.
    """
    folder = get_base_path(base)
    return folder is None or not folder.is_dir() or has_weights(folder)


def check_without_weights(plan: Plan, base: str, *, has_test: bool) -> TrainableModel:
    """Refuse at the start what a server without the base model's weights could not do later.

    Args:
        plan: The plan.
        base: The base model's folder on this machine; empty: as in the plan.
        has_test: Whether the coordinator has a test set.

    Returns:
        The plan's model, built without weights.

    Raises:
        ModelError: The server would evaluate or train a model, or has to send values that only the weights have; or the model
            cannot be built.
    """
    if has_test:
        raise _refusal("the test set cannot be evaluated", "leave out --test (`test` in server.toml)")
    if plan.shares_predictions:
        raise _refusal("the student cannot be trained", 'use collaboration = "parameters"')
    if plan.strategy.fusion.info("fusion").needs.public_inputs:
        raise _refusal("no model can predict for the public inputs", "choose another strategy.fusion")
    model = open_server_model(plan, base, "cpu", needs_weights=False)
    unknown = model.names_without_value()
    sent = next((name for name in state_shapes(plan, model, plan.rounds) if name in unknown), None)
    if sent is not None:
        raise _refusal(
            f"the first request cannot be made, as it holds the base model's {sent}",
            "train adapters or a new head (train = lora or head), with a fusion that changes nothing else",
        )
    return model


def _refusal(problem: str, instead: str) -> ModelError:
    return ModelError(
        f"the server does not hold the weights of the base model, so that {problem}: expected them; {_COPY} {instead}",
        code="model.weights_needed",
    )


def describe_weights(base: Path | None, *, held: bool) -> str:
    """Return a sentence for the coordinator on whether the server holds the base model."""
    if held:
        return "the server holds the base model"
    return (
        f"the server does not hold the weights of the base model (no *.safetensors in {base}): it aggregates, and does not"
        " evaluate; of the final model it writes the adapters alone, and organizations get it whole"
    )

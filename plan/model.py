"""The model of a plan."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from cotune.models.errors import PrivacyError
from cotune.models.sharing import SharedModel, resident
from cotune.plan.schema import Plan
from cotune.privacy.accounting import RecordPrivacy

__all__ = ["model_of", "shared_names", "trained_names"]


def model_of(plan: Plan, device: str) -> SharedModel:
    """The plan's base model with its head, and its adapters where a stage trains them: one per process, shared by all callers.

    Raises ModelError when it cannot be loaded, PrivacyError when it mixes records.
    """
    model = resident(plan.model, plan.labels, plan.lora if plan.uses_lora else None, plan.seed, device, plan.task)
    if isinstance(plan.privacy, RecordPrivacy):
        _refuse_batch_norm(model)
    return model


def trained_names(plan: Plan, model: SharedModel, round: int) -> list[str]:
    """The parameters that organisations train in a round, in the model's order."""
    stage = plan.stage_of(round)
    return model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings, round=round)


def shared_names(plan: Plan, model: SharedModel, round: int) -> list[str]:
    """Those of them that travel: all, unless the plan lets organisations keep some to themselves."""
    names = trained_names(plan, model, round)
    if not plan.keeps_personal:
        return names
    return [name for name in names if name.startswith(model.prefix) and ".lora_B." not in name]


def _refuse_batch_norm(model: SharedModel) -> None:
    found = [name for name, layer in model.module.named_modules() if isinstance(layer, _BatchNorm)]
    if found:
        raise PrivacyError(
            f"the base model normalises over the batch in {found[0]}, which mixes records, so that their privacy cannot be"
            " bounded: expected a model without batch norm, such as a ViT; use another base model, or privacy = none"
        )

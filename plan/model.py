"""The model of a plan."""

from __future__ import annotations

from cotune.models.sharing import SharedModel, resident
from cotune.plan.schema import Plan

__all__ = ["model_of"]


def model_of(plan: Plan, device: str) -> SharedModel:
    """The plan's base model with its head, and its adapters where a stage trains them: one per process, shared by all callers."""
    return resident(plan.model, plan.labels, plan.lora if plan.uses_lora else None, plan.seed, device)

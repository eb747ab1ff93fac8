"""Summarize a plan for people, and compare it with another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cotune.models.base.quantization import explain_quantization
from cotune.plan.local_training import Stage
from cotune.plan.personal import explain
from cotune.plan.plan import Plan
from cotune.plan.public import explain_predictions
from cotune.plan.stacking import explain_stacking
from cotune.plan.update_norm import bound_norm_by_gradients
from cotune.printable import printable
from cotune.privacy.config import RecordPrivacy

_MANY_RECORDS = 10_000  # assumed records, if the number of steps depends on it (epochs, or a batch size in records)


def summarize_plan(plan: Plan) -> list[str]:
    """Return six lines: plan, base model, amount of training, rates, privacy, strategy and what travels.

    One more says what is stacked, and one what stays with the organizations, where the plan has it.
    """
    stages = ", ".join(f"{stage.rounds} of {_trained(stage)} ({_amount(stage.local)})" for stage in plan.stages)
    asks = [name for name, wanted in plan.disclosures.model_dump().items() if wanted] + sorted(plan.strategy.sends)
    term = plan.strategy.client_term
    parts = [plan.strategy.weighting.name, plan.strategy.fusion.name, *([] if term is None else [term.name])]
    quantized = explain_quantization(plan.model.quantization)
    lines = [
        f"plan {plan.name} ({plan.plan_id[:12]}…), {plan.task}{_classes(plan)}",
        f"base model {plan.model.base}, hash {plan.model.base_hash or 'not given'}{quantized}{_feature(plan)}",
        f"{plan.rounds} rounds: {stages}",
        _rates(plan),
        _privacy(plan),
        f"strategy {' → '.join(parts)}; updates travel as {plan.wire}{_down(plan)}; asks organizations to disclose:"
        f" {', '.join(asks) or 'nothing beside the updates'}",
    ]
    private = isinstance(plan.privacy, RecordPrivacy)
    stays = (
        explain_predictions(plan.public, private=private) if plan.shares_predictions else explain(plan.personal, private=private)
    )
    stacked = [explain_stacking(plan.model.members, private=private)] if plan.model.members else []
    return [printable(line) for line in (*lines, *stacked, *([] if stays is None else [stays]))]


def _down(plan: Plan) -> str:
    return "" if plan.wire_down == "float32" else f", what changes in the model as {plan.wire_down}"


def _trained(stage: Stage) -> str:
    return stage.mode if stage.layers is None else f"the last {stage.layers} blocks"


def _feature(plan: Plan) -> str:
    feature = plan.model.feature
    if feature is None:
        return ""
    read = f"; read by the means of layers {', '.join(map(str, feature.layers))}{' and the first token' if feature.cls else ''}"
    return f"{read}, whitened by random tokens" if feature.whiten == "public" else read


def _classes(plan: Plan) -> str:
    return f" into {', '.join(plan.labels)}" if plan.labels else ""


def _amount(local: Any) -> str:
    steps = f"{local.epochs:g} epochs" if local.epochs is not None else f"{local.steps} steps"
    batches = "all records in each" if local.batch_size == "all" else f"batches of {local.batch_size:g}"
    return f"{steps}, {batches}"


def _rates(plan: Plan) -> str:
    """Describe what determines how far a record can move the model, besides privacy."""
    stages = [_rate(stage.local) for stage in plan.stages]
    return f"learning rate {', '.join(dict.fromkeys(stages))}; {_longest(plan)}"


def _longest(plan: Plan) -> str:
    if plan.shares_predictions:
        return f"predictions of at most {plan.public.bound:g} each"
    if plan.server.max_update_norm is not None:
        return f"updates of a norm of at most {plan.server.max_update_norm:g}"
    found = [bound_norm_by_gradients(plan, stage, _MANY_RECORDS) for stage in plan.stages]
    if None in found:
        return "no bound on the norm of updates follows from the plan but that of the others in a round"
    adds = "their noise adds" if plan.wire == "float32" else "their noise and rounding add"
    return f"updates of a norm of at most {max(x for x in found if x is not None):.3g} and what {adds}"


def _rate(local: Any) -> str:
    own_head = "" if local.head_learning_rate is None else f" (head {local.head_learning_rate:g})"
    falling = "" if local.schedule == "constant" else f", falling over the rounds ({local.schedule})"
    return f"{local.learning_rate:g}{own_head} with {local.optimizer}{falling}"


def _privacy(plan: Plan) -> str:
    if not isinstance(plan.privacy, RecordPrivacy):
        return "NO differential privacy for records"
    whom = plan.privacy.unit
    if plan.privacy.max_records is not None:
        whom = f"{whom}, of whom at most {plan.privacy.max_records} records count"
    how = f"each one's gradient clipped to a norm of {plan.privacy.clip_norm:g}"
    if plan.privacy.pate is not None:
        how = f"by noisy votes of {plan.privacy.pate.teachers} models, each of which learns from other records, without noise"
    return f"differential privacy for every {whom}: ε = {plan.privacy.epsilon:g} at δ = {plan.privacy.delta}, {how}"


def diff_plans(before: Plan, after: Plan) -> list[str]:
    """Return one line for each key whose value differs: `key: old → new`."""
    old = dict(_flat(before.model_dump(mode="json")))
    new = dict(_flat(after.model_dump(mode="json")))
    keys = [*old, *(key for key in new if key not in old)]
    return [
        printable(f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}")
        for key in keys
        if old.get(key, "absent") != new.get(key, "absent")
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if _is_nested(value) else None
    if items is None:
        yield key, value
        return
    for name, inner in items:
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def _is_nested(value: Any) -> bool:
    """Return whether a value is a list of tables; a list of plain values is shown as a whole."""
    return isinstance(value, list) and any(isinstance(inner, dict) for inner in value)

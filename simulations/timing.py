"""How long a simulation of a plan will take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from cotune.models.features import encode_batch, feature_head
from cotune.models.holdings import Holdings
from cotune.models.sharing import SharedModel
from cotune.models.tasks import Example, example_losses
from cotune.plan.schema import Plan, Stage
from cotune.simulations.sites import Prepared

__all__ = ["seconds_of"]

_SAMPLE = 32  # records that are timed
_CLIPPING_COST = {"head": 1.1, "lora": 1.1, "full": 1.7}  # of DP-SGD by Opacus against plain training


def seconds_of(prepared: Prepared, model: SharedModel) -> float:
    """Encoding once where the encoder is frozen, training every step's records else, and the baselines the same again."""
    plan = prepared.plan
    examples = _examples(prepared, model)
    records = sum(len(r) for r in prepared.records.values())
    total = 0.0
    for stage in plan.stages:
        if stage.mode == "head" and feature_head(model) is not None:
            total += records * _time_per_record(plan, model, examples, None)
        else:
            sizes = [s.public_examples(plan) for s in prepared.shares]
            work = stage.rounds * sum(stage.local.sample_rate(n) * n * stage.local.steps_of(n) for n in sizes)
            cost = _CLIPPING_COST[stage.mode] if plan.privacy != "none" else 1.0
            total += (1 + len(plan.simulation.baselines)) * work * cost * _time_per_record(plan, model, examples, stage)
    return total


def _examples(prepared: Prepared, model: SharedModel) -> list[Example]:
    """A few records from all organisations."""
    parts = tuple((prepared.records[s.file], s.rows[:_SAMPLE]) for s in prepared.shares)
    sample = Holdings(parts, prepared.plan.labels, prepared.plan.task).examples(model)
    return sample[:: max(1, len(sample) // _SAMPLE)][:_SAMPLE]


def _time_per_record(plan: Plan, model: SharedModel, examples: list[Example], stage: Stage | None) -> float:
    """Seconds for one record: encoded only without a stage, forward and backward with one. The first pass only warms up."""
    if stage is None:
        return min(_timed(lambda: encode_batch(model, examples, plan.model.precision)) for _ in range(3)) / len(examples)
    batch = model.loaded.task.collator(model.module, model.loaded.reader, model.device)(examples)
    model.train_only(model.names(stage.mode, freeze_embeddings=stage.freeze_embeddings))

    def step() -> None:
        example_losses(model.module, batch).mean().backward()  # type: ignore[no-untyped-call]
        model.module.zero_grad(set_to_none=True)

    return min(_timed(step) for _ in range(3)) / len(examples)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""Check a plan against its task, by the facts about tasks (`data.config.TASK_FACTS`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cotune.data.config import TASK_FACTS, TaskFacts
from cotune.plan.local_training import Stage
from cotune.plan.several_tasks import find_problems
from cotune.plan.stacking import find_stacking_problems
from cotune.plan.tables import PlanTables


def find_task_problems(plan: PlanTables, stages: Sequence[Stage], *, keeps_personal: bool) -> Iterator[str]:
    """Yield, in words, what does not suit a plan's task.

    Args:
        plan: Its tables.
        stages: What it trains, in order.
        keeps_personal: Whether each organization has a personal model.
    """
    facts = TASK_FACTS[plan.task]
    modes = [stage.mode for stage in stages]
    yield from _classes(plan, facts)
    if facts.keeps_head and "head" in modes:
        yield f"train = head trains a new head, and task = {plan.task} keeps that of its base model: expected train = lora"
    yield from _targets(plan, facts)
    yield from _feature(plan, facts, modes)
    yield from find_stacking_problems(plan, modes)
    yield from _several(plan, facts, modes, keeps_personal)


def _classes(plan: PlanTables, facts: TaskFacts) -> Iterator[str]:
    without = {
        "labels": bool(plan.labels) and not facts.labels,
        "class_weights": bool(plan.class_weights) and not facts.labels,
        "disclosures.label_histogram": plan.disclosures.label_histogram and not facts.classes,
        "public.source": bool(plan.public.source) and not facts.classes,
    }
    for key, found in without.items():
        if found:
            yield f"{key} is for classes, and the records of task = {plan.task} have none: leave it out"


def _targets(plan: PlanTables, facts: TaskFacts) -> Iterator[str]:
    """Check prompts, numbers as targets, and the generation of texts at the end."""
    if facts.prompts == "must" and plan.data.prompt is None:
        yield f"task = {plan.task} reads a text and writes another one: expected data.prompt and data.target"
    if plan.data.chats and not facts.chats:
        key = next(key for key in ("messages", "instruction", "system") if getattr(plan.data, key) is not None)
        yield f"data.{key} is for task = causal-lm, and this is {plan.task}: leave it out"
    if facts.ranged and plan.model.target_range is None:
        yield (
            f"task = {plan.task} needs the least and the largest number, which no records may decide: expected"
            " model.target_range = [LOW, HIGH]"
        )
    if not facts.ranged and plan.model.target_range is not None:
        yield f"model.target_range is for task = regression, and this is {plan.task}: leave it out"
    if facts.prompts != "may" and plan.model.max_target_length is not None:
        yield f"model.max_target_length is for task = causal-lm, and this is {plan.task}: leave it out"
    writes = facts.prompts != "none" and (plan.data.prompt is not None or plan.data.messages is not None)
    if plan.generate is not None and not writes:
        yield (
            f"generate is for a task that writes after prompts, and this plan has task = {plan.task} without data.prompt:"
            " expected task = causal-lm or seq2seq with data.prompt and data.target, or causal-lm with data.messages, or leave"
            " the table out"
        )


def _feature(plan: PlanTables, facts: TaskFacts, modes: Sequence[str]) -> Iterator[str]:
    if plan.model.feature is None:
        return
    if not facts.features:
        yield f"model.feature is for task = sequence-classification, got {plan.task}: leave it out"
    if any(mode != "head" for mode in modes):
        yield "model.feature is of an encoder that nobody trains: expected train = head in all rounds, or leave it out (none)"
    if plan.model.pooling != "auto":
        yield f"model.feature says what a head reads, and so does model.pooling = {plan.model.pooling}: expected one"


def _several(plan: PlanTables, facts: TaskFacts, modes: Sequence[str], keeps_personal: bool) -> Iterator[str]:
    """Check what plans with [[tasks]] support."""
    if facts.several != bool(plan.tasks):
        yield f"task = {plan.task} is for plans with [[tasks]]: expected both, or neither"
    if not plan.tasks:
        if plan.balance != "plan":
            yield f'balance = "{plan.balance}" is for plans with [[tasks]]: leave it out'
        if plan.simulation.tasks or plan.data.tasks or plan.data.tags:
            yield "simulation.tasks, data.tasks and data.tags are for plans with [[tasks]]: expected none of them"
        return
    if plan.data.tags and plan.model.pooling == "mean":
        yield (
            "model.pooling = mean is a layer of the encoder, which tags would be read above, too: expected auto or native beside"
            f" tasks with tags ({', '.join(plan.data.tags)})"
        )
    yield from find_problems(plan.tasks, modes, plan.simulation.tasks)
    cannot = {
        "a [personal] table, or lora.keep": keeps_personal,
        "client_privacy, which divides by a number of organizations, while some train a head": bool(plan.client_privacy),
        'server.late = "fold"': plan.server.late == "fold",
        "disclosures.label_histogram, which counts one class of a record": plan.disclosures.label_histogram,
    }
    for what, found in cannot.items():
        if found:
            yield f"[[tasks]] is not supported with {what}: leave out one of the two"

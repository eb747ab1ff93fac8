"""Each of a plan's several tasks by itself: the run that is compared with, and what sharing the encoder changes.

A run for one task is the plan with that task alone: the same organizations as far as they hold it, rounds, strategy and ε. Where
sharing makes a task worse (negative transfer), its gain is below 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cotune.data.dataset import Dataset
from cotune.data.metrics.metrics import Metrics
from cotune.data.multi_task import keep_tasks, task_of
from cotune.models.evaluation.test_set import measure, predict
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.simulations.prepare import Prepared
from cotune.simulations.split import Share, count_units
from cotune.simulations.worth_of_joining import TestSet

SINGLE = "single"
Predicted = tuple[Any, ...]


def plan_for(plan: Plan, task: str) -> Plan:
    """Return the plan with one of its tasks alone. Its records are read as before, so that rows of files keep their numbers."""
    labels = tuple(label for label in plan.labels if task_of(label) == task)
    return plan.model_copy(
        update={
            "tasks": tuple(each for each in plan.tasks if each.name == task),
            "labels": labels,
            "class_weights": {label: weight for label, weight in plan.class_weights.items() if label in labels},
            "simulation": plan.simulation.model_copy(update={"tasks": ()}),
        }
    )


def shares_for(prepared: Prepared, task: str) -> tuple[Share, ...]:
    """Return the shares of the organizations that hold a task, with the records that have a label of it."""
    return tuple(_only(prepared, share, task) for share in prepared.shares if task in (share.tasks or _names(prepared.plan)))


def _only(prepared: Prepared, share: Share, task: str) -> Share:
    held = keep_tasks(prepared.records[share.file], (task,))
    rows = np.asarray([row for row in share.rows if held.labels[row]], dtype=np.int64)
    return replace(share, rows=rows, units=count_units(prepared.plan, held, rows), tasks=(task,))


def evaluate_for(prepared: Prepared, plan: Plan, model: TrainableModel, state: State) -> tuple[Metrics, Predicted]:
    """Return how good a model for one task is on the test records with a label of it, and what it tells of them.

    Args:
        plan: Of `plan_for`.
        model: Of that plan.
        state: That it was trained to.
    """
    (task,) = _names(plan)
    parts = tuple((keep_tasks(prepared.records[file], (task,)), rows) for file, rows in prepared.test)
    test = Dataset(parts, plan.labels, plan.task)
    predicted = predict(model, state, test, plan.model.precision, plan.physical_rows)
    return measure(model, test, predicted), tuple(predicted)


def join_answers(plan: Plan, truth: Sequence[int], predicted: Mapping[str, Predicted]) -> Predicted:
    """Return what the models of single tasks tell, in the order of the common test set and by the class numbers of all tasks.

    Args:
        truth: The class number of each answer.
        predicted: Task -> predictions of its model; of others there are none.
    """
    first = {task: next(i for i, label in enumerate(plan.labels) if task_of(label) == task) for task in predicted}
    rest = {task: iter(answers) for task, answers in predicted.items()}
    tasks = (task_of(plan.labels[number]) for number in truth)
    return tuple(next(rest[task]) + first[task] if task in rest else -1 for task in tasks)


def describe_tasks(
    prepared: Prepared, test: TestSet, federated: Mapping[str, Predicted], single: Mapping[str, tuple[Metrics, Predicted]]
) -> list[dict[str, Any]]:
    """Return `tasks` of summary.json.

    Args:
        test: The common test set.
        federated: Organization -> what its model of the run tells of it.
        single: Task -> the metrics of the run for it alone, and what that tells.
    """
    plan = prepared.plan
    alone = join_answers(plan, test.truth.tolist(), {task: predicted for task, (_, predicted) in single.items()})
    return [_task(prepared, test, each.name, federated, alone if each.name in single else ()) for each in plan.tasks]


def _task(
    prepared: Prepared, test: TestSet, task: str, federated: Mapping[str, Predicted], alone: Sequence[Any]
) -> dict[str, Any]:
    shares = [share for share in prepared.shares if task in (share.tasks or _names(prepared.plan))]
    weight = next(each.weight for each in prepared.plan.tasks if each.name == task)
    everywhere = test.of_tasks((task,))
    return {
        "name": task,
        "weight": weight,
        "classes": sum(task_of(label) == task for label in prepared.plan.labels),
        "holders": [share.name for share in shares],
        "all": _compared(test, federated[shares[0].name], alone, everywhere) if shares else None,
        "organizations": {
            share.name: _compared(test, federated[share.name], alone, everywhere & test.own(share)) for share in shares
        },
    }


def _compared(test: TestSet, ours: Sequence[Any], theirs: Sequence[Any], where: Any) -> dict[str, Any] | None:
    """Both on a part of the answers, and the paired test of the two; None without an answer."""
    if not where.any():
        return None
    joined = test.answers(ours, where)
    found = {"records": test.records(where), "federated": joined.score, "single": None, "gain": None, "interval": [], "p": None}
    if not theirs:
        return found
    single = test.answers(theirs, where)
    paired = joined.compare(single)
    return {
        **found,
        "single": single.score,
        "gain": paired.difference,
        "interval": [paired.low, paired.high],
        "p": paired.p,
    }


def _names(plan: Plan) -> tuple[str, ...]:
    return tuple(task.name for task in plan.tasks)

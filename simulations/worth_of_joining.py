"""Is it worth joining, for each organization: what every choice reaches on its own held-out records, and a paired test of two.

The question is answered on records like the organization's own. On everybody's records mixed, who trains alone is punished for
classes that it never sees, so that joining looks better than it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.client.personalization.adaptation import get_unit_numbers
from cotune.data.config import has_classes
from cotune.data.dataset import Dataset
from cotune.data.multi_task import task_of
from cotune.data.tasks.task import get_task
from cotune.data.types import Label
from cotune.models.evaluation.intervals import MIN_TEST_RECORDS, Answers, TextAnswers
from cotune.models.evaluation.summed_answers import JUDGMENTS, judge_answers
from cotune.simulations.prepare import Prepared
from cotune.simulations.split import Share

COLUMNS = ("majority", "alone", "alone_without_privacy", "plain", "federated", "adapted")  # from the floor up
JOINED = ("adapted", "federated")  # what an organization has when it joins: the first that was measured
NOT_JOINED = ("alone_without_privacy", "alone")  # what it has when it does not

Predicted = Sequence[Any]  # answers, such as class numbers, in the order of the common test set
Choices = Mapping[str, Predicted]  # column -> what that model of an organization tells; without those that were not measured


class TestSet:
    """The common test set, and which part of it is whose."""

    __test__ = False  # for pytest

    def __init__(self, prepared: Prepared) -> None:
        self.plan = prepared.plan
        parts = tuple((prepared.records[file], rows) for file, rows in prepared.test)
        held = Dataset(parts, self.plan.labels, self.plan.task)
        lengths = [len(target) if isinstance(target, tuple) else 1 for target in held.targets]
        self.truth = np.asarray(held.truth)
        self._record = np.repeat(np.arange(len(lengths)), lengths)  # of each answer
        self._place = {
            (file, int(row)): i for i, (file, row) in enumerate((file, row) for file, rows in prepared.test for row in rows)
        }
        self._unit = np.asarray(get_unit_numbers(held), dtype=np.int64)[self._record]

    def own(self, share: Share) -> NDArray[np.bool_]:
        """(answers,) those on an organization's own held-out records; of several tasks, to those that it holds."""
        mine = np.zeros(len(self._place), dtype=bool)
        mine[[self._place[share.file, int(row)] for row in share.held_out]] = True
        own = mine[self._record]
        return own & self.of_tasks(share.tasks) if share.tasks else own

    def of_tasks(self, tasks: Sequence[str]) -> NDArray[np.bool_]:
        """(answers,) those to some of several tasks."""
        held = np.asarray([task_of(label) in tasks for label in self.plan.labels])
        found: NDArray[np.bool_] = held[self.truth]
        return found

    def records(self, where: NDArray[np.bool_]) -> int:
        """How many records a part of the answers is of."""
        return len(np.unique(self._record[where]))

    def answers(self, predicted: Predicted, where: NDArray[np.bool_]) -> Any:
        """What a model tells on a part of the set: `Answers` of classes, `TextAnswers` or `SummedAnswers`."""
        task = self.plan.task
        if task in JUDGMENTS:
            truth = self.truth[where].tolist()
            given = np.asarray(predicted, dtype=np.float64)[where].tolist()
            metrics = get_task(task).metrics(truth, given, len(self.plan.labels))
            return judge_answers(task, metrics, truth, given, self._unit[where])
        if not has_classes(task):
            losses, tokens, right = (np.asarray(column)[where] for column in zip(*predicted, strict=True))
            return TextAnswers(losses, tokens, right, self._unit[where])
        return Answers(self.truth[where], np.asarray(predicted, dtype=np.int64)[where], self._unit[where], len(self.plan.labels))


def held_labels(prepared: Prepared, share: Share) -> list[Label]:
    """The labels of an organization's training records."""
    labels = prepared.held(share).labels
    return [labels[int(row)] for row in share.rows]


def organization_worth(test: TestSet, share: Share, choices: Choices) -> dict[str, Any]:
    """Return `own`, `common`, `worth` and `personal_gain` of summary.json; without held-out records None but for `common`."""
    where = test.own(share)
    return {
        "own": _figures(test, choices, where) if where.any() else None,
        "common": _figures(test, choices, np.ones(len(test.truth), dtype=bool)),
        "worth": _worth(test, choices, where) if where.any() else None,
        "personal_gain": _personal_gain(test, choices, where) if where.any() else None,
    }


def _personal_gain(test: TestSet, choices: Choices, where: NDArray[np.bool_]) -> float | None:
    """What personal parts change: the score of the own model, less that of the model that is all shared."""
    if "plain" not in choices or "federated" not in choices:
        return None
    gain: float = test.answers(choices["federated"], where).score - test.answers(choices["plain"], where).score
    return gain


def _figures(test: TestSet, choices: Choices, where: NDArray[np.bool_]) -> dict[str, Any]:
    """Metrics of every column with their intervals, and the accuracy of the federated model once more."""
    columns = {name: test.answers(choices[name], where).figures() if name in choices else None for name in COLUMNS}
    federated = columns["federated"]
    return {"records": test.records(where), "accuracy": federated and federated.get("accuracy"), **columns}


def _worth(test: TestSet, choices: Choices, where: NDArray[np.bool_]) -> dict[str, Any] | None:
    """The paired comparison of joining with not joining; None where one of both was not measured."""
    joined = next((name for name in JOINED if name in choices), None)
    against = next((name for name in NOT_JOINED if name in choices), None)
    if joined is None or against is None:
        return None
    ours = test.answers(choices[joined], where)
    theirs = test.answers(choices[against], where)
    found = ours.compare(theirs)
    constant = test.answers(choices["majority"], where)
    useful = ours.score > constant.score  # always answering the same is free
    return {
        "answer": found.answer if useful or found.answer != "yes" else "no",
        "useful": useful,
        "joined": joined,
        "against": against,
        "difference": found.difference,
        "interval": [found.low, found.high],
        "p": found.p,
        "test": found.test,
        "few": len(np.unique(ours.units)) < MIN_TEST_RECORDS,
    }


def personal_gains(organizations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return `personal` of summary.json, by the `personal_gain` of each organization; None where it was not measured."""
    gains = {each["name"]: each["personal_gain"] for each in organizations if each["personal_gain"] is not None}
    if not gains:
        return None
    worst = min(gains, key=lambda name: gains[name])
    return {"mean_gain": sum(gains.values()) / len(gains), "worst_gain": gains[worst], "worst": worst}


def overall_worth(organizations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`worth` of summary.json: the answers counted, and the means on own records; None where nobody could be compared."""
    answers = Counter(each["worth"]["answer"] for each in organizations if each["worth"])
    if not answers:
        return None
    return {
        "answer": _overall(answers),
        "answers": {name: answers[name] for name in ("yes", "no", "too close to tell")},
        "own_means": {name: _mean([each["own"] for each in organizations if each["own"]], name) for name in COLUMNS},
    }


def _overall(answers: Mapping[str, int]) -> str:
    if answers["yes"] and answers["no"]:
        return "it depends"
    if answers["yes"]:
        return "yes"
    return "no" if answers["no"] else "too close to tell"


def _mean(own: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    tables = [each[name] for each in own if each[name] is not None]
    if not tables:
        return None
    return {key: sum(table[key] for table in tables) / len(tables) for key in without_intervals(tables[0])}


def without_intervals(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among figures that have intervals, too."""
    return {key: value for key, value in figures.items() if not key.endswith("_interval")}

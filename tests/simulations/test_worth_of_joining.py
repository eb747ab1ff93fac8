"""The answer against models that are asked by hand, on the rows that each organization holds out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotune.data.dataset import Dataset
from cotune.data.tasks.task import get_task
from cotune.models.evaluation.test_set import predict
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.prepare import Prepared, prepare
from cotune.simulations.run import Run, simulate
from cotune.simulations.split import Share
from cotune.simulations.worth_of_joining import TestSet, held_labels, organization_worth
from tests.support.datasets import sentences, write_csv, write_tagged
from tests.support.simulations import COMPARED, UNADAPTED, NewPlan


@pytest.fixture(scope="module")
def result(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    simulation = {**COMPARED, "clients": 3, "partition": "dirichlet:0.5", "min_examples": 20}
    plan = toy_plan(rounds=2, simulation=simulation, personalize=UNADAPTED)
    return simulate(plan, tmp_path_factory.mktemp("worth") / "run", device="cpu")


def test_own_figures_are_those_of_the_rows_that_are_held_out(result: Run) -> None:
    folder = RunFolder(result.folder)
    prepared = prepare(folder.plan, "cpu")
    (_, everything), trained = prepared.test[0], {int(row) for share in prepared.shares for row in share.rows}
    assert sorted(int(row) for share in prepared.shares for row in share.held_out) == everything.tolist()
    for share, said in zip(prepared.shares, result.summary["organizations"], strict=True):
        assert not trained & {int(row) for row in share.held_out}
        own = Dataset(((prepared.records[None], share.held_out),), folder.plan.labels)
        states = {"federated": folder.load().state}
        states["alone"] = RunFolder(result.folder / "baselines" / "alone" / share.name).load().state
        for column, state in states.items():
            predicted = predict(get_plan_model(folder.plan, "cpu"), state, own, folder.plan.model.precision)
            right = sum(t == n for t, n in zip(own.truth, predicted, strict=True))
            assert said["own"][column]["accuracy"] == pytest.approx(right / len(own))
            low, high = said["own"][column]["accuracy_interval"]
            assert low <= right / len(own) <= high
        assert said["own"]["records"] == len(share.held_out)
        constant = own.truth.count(_constant(prepared, share)) / len(own)
        assert said["own"]["majority"]["accuracy"] == pytest.approx(constant)


def _constant(prepared: Prepared, share: Share) -> int:
    """The class number that most of an organization's training records have."""
    found = get_task(prepared.plan.task).constant(held_labels(prepared, share), prepared.plan.labels)
    assert isinstance(found, int)
    return found


def skewed(toy_plan: NewPlan, tmp_path: Path) -> Prepared:
    """North has one class only, south both others."""
    rows = {"north": sentences(400, classes=("bad",)), "south": sentences(400, seed=1, classes=("good", "so"))}
    rows["north"] += sentences(10, seed=2)
    (tmp_path / "orgs").mkdir()
    for name, own in rows.items():
        write_csv(tmp_path / "orgs" / f"{name}.csv", [(f"{text} {i}", label) for i, (text, label) in enumerate(own)])
    return prepare(toy_plan(data={"source": str(tmp_path / "orgs")}), "cpu")


def test_unseen_classes_do_not_make_joining_worthwhile(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Alone always tells the only class it knows; the federated model is wrong in one of five, whatever the class."""
    prepared = skewed(toy_plan, tmp_path)
    test = TestSet(prepared)
    north = next(share for share in prepared.shares if share.name == "north")
    only = _constant(prepared, north)
    federated = [(n + 1) % 3 if i % 5 == 0 else n for i, n in enumerate(test.truth.tolist())]
    predicted = {"majority": [only] * len(test.truth), "alone_without_privacy": [only] * len(test.truth), "federated": federated}
    found: dict[str, Any] = organization_worth(test, north, predicted)
    common = {key: found["common"][key]["accuracy"] for key in predicted}
    assert common["federated"] > common["alone_without_privacy"] + 0.2  # by which the report said yes
    assert found["worth"]["answer"] == "no"
    assert found["worth"]["difference"] < -0.1
    right = dict(predicted, federated=test.truth.tolist(), majority=[only] * len(test.truth), alone_without_privacy=federated)
    assert organization_worth(test, north, right)["worth"]["answer"] == "yes"
    same = dict(predicted, federated=predicted["alone_without_privacy"])
    assert organization_worth(test, north, same)["worth"]["answer"] == "too close to tell"


def test_what_a_constant_answer_gives_is_no_reason_to_join(toy_plan: NewPlan, tmp_path: Path) -> None:
    prepared = skewed(toy_plan, tmp_path)
    test = TestSet(prepared)
    north = next(share for share in prepared.shares if share.name == "north")
    constant = [_constant(prepared, north)] * len(test.truth)
    wrong = [(n + 1) % 3 for n in test.truth.tolist()]
    found = organization_worth(test, north, {"majority": constant, "alone": wrong, "federated": constant})["worth"]
    assert (found["answer"], found["useful"], found["against"]) == ("no", False, "alone")


def test_tags_are_compared_sentence_by_sentence(toy_plan: NewPlan, tmp_path: Path) -> None:
    data = write_tagged(tmp_path / "tags.jsonl")
    plan = toy_plan(rounds=1, task="token-classification", model={"pooling": "auto"}, data={"source": str(data)})
    prepared = prepare(plan, "cpu")
    test = TestSet(prepared)
    share = prepared.shares[0]
    predicted = {"majority": test.truth.tolist(), "alone": (test.truth + 1).tolist(), "federated": test.truth.tolist()}
    found = organization_worth(test, share, predicted)
    assert found["worth"]["test"] == "paired bootstrap"
    assert found["own"]["records"] == len(share.held_out)
    words = sum(len(prepared.records[None].labels[int(row)]) for row in share.held_out)
    assert int(np.count_nonzero(test.own(share))) == words

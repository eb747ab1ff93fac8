from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.models.holdings import Holdings
from cotune.plan.model import model_of
from cotune.server.evaluation import evaluate, predict
from cotune.server.run_folder import RunFolder
from cotune.simulations.fairness import mixed_accuracy, own_accuracies
from cotune.simulations.simulate import Result, simulate
from cotune.simulations.sites import prepare
from tests.conftest import sentences, write_csv, write_tagged
from tests.simulations.conftest import NewPlan


def test_the_mix_of_recalls_by_hand() -> None:
    recalls = {"bad": 0.5, "good": 1.0, "so": None}
    assert mixed_accuracy({"bad": 3, "good": 1, "so": 0}, recalls) == pytest.approx((3 * 0.5 + 1.0) / 4)
    assert mixed_accuracy({"bad": 3, "good": 1, "so": 6}, recalls) == pytest.approx((3 * 0.5 + 1.0) / 4)  # nothing is known of so
    assert mixed_accuracy({"bad": 0, "good": 0, "so": 6}, recalls) is None


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=6))
def test_an_own_accuracy_is_between_the_recalls(classes: list[tuple[int, float]]) -> None:
    counts, recalls = ({str(i): pair[k] for i, pair in enumerate(classes)} for k in (0, 1))
    found = mixed_accuracy(counts, recalls)
    held = [recall for count, recall in classes if count]
    assert (found is None) == (not held)
    if found is not None:
        assert min(held) - 1e-9 <= found <= max(held) + 1e-9


@pytest.fixture(scope="module")
def result(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Result:
    plan = toy_plan(rounds=1, simulation={"clients": 3, "partition": "dirichlet:0.3", "min_examples": 5, "baselines": []})
    return simulate(plan, tmp_path_factory.mktemp("fair") / "run", device="cpu")


def test_organisations_of_one_file_weighted_by_what_they_hold(result: Result) -> None:
    """The mix of the test set itself gives the test accuracy; an organisation with one class gives that class's recall."""
    folder = RunFolder(result.folder)
    prepared, state = prepare(folder.plan, "cpu"), folder.load().state
    model = model_of(folder.plan, "cpu")
    ((_, rows),) = prepared.test
    test = Holdings(((prepared.records[None], rows),), folder.plan.labels)
    predicted = predict(model, state, test, "auto")
    right = [t == p for t, p in zip(test.truth, predicted, strict=True)]
    recalls: dict[str, Any] = {
        name: sum(r for r, t in zip(right, test.truth, strict=True) if t == c) / test.truth.count(c)
        for c, name in enumerate(folder.plan.labels)
    }
    assert mixed_accuracy(test.label_counts(), recalls) == pytest.approx(result.summary["test"]["federated"]["accuracy"])
    for organisation in result.summary["organisations"]:
        expected = sum(n * recalls[name] for name, n in organisation["labels"].items()) / organisation["examples"]
        assert organisation["own"] == {"accuracy": pytest.approx(expected)}
    assert len({organisation["own"]["accuracy"] for organisation in result.summary["organisations"]}) > 1
    assert own_accuracies(prepared, model, state, {}) == {
        o["name"]: o["own"]["accuracy"] for o in result.summary["organisations"]
    }


def test_organisations_with_files_are_judged_on_their_own(toy_plan: NewPlan, tmp_path: Path) -> None:
    (tmp_path / "orgs").mkdir()
    for number, name in enumerate(("north", "south")):
        write_csv(tmp_path / "orgs" / f"{name}.csv", sentences(60 + 40 * number, seed=number))
    plan = toy_plan(rounds=1, data={"source": str(tmp_path / "orgs")}, simulation={"baselines": []})
    summary = simulate(plan, tmp_path / "run", device="cpu").summary
    folder = RunFolder(tmp_path / "run")
    prepared, state = prepare(folder.plan, "cpu"), folder.load().state
    right = 0.0
    for (file, rows), organisation in zip(prepared.test, summary["organisations"], strict=True):
        own = Holdings(((prepared.records[file], rows),), folder.plan.labels)
        judged = evaluate(model_of(folder.plan, "cpu"), state, own, "auto").accuracy
        assert organisation["own"] == {"accuracy": judged}
        right += judged * len(rows)
    assert right / summary["test"]["examples"] == pytest.approx(summary["test"]["federated"]["accuracy"])


def test_organisations_with_tags_are_weighted_by_words(toy_plan: NewPlan, tmp_path: Path) -> None:
    """An organisation whose words all have one tag gets that tag's recall; words of every tag count, "O" among them."""
    data = write_tagged(tmp_path / "tags.jsonl")
    plan = toy_plan(rounds=1, task="token-classification", model={"pooling": "auto"}, data={"source": str(data)})
    prepared = prepare(plan, "cpu")
    model = model_of(prepared.plan, "cpu")
    ((_, rows),) = prepared.test
    predicted = predict(model, {}, Holdings(((prepared.records[None], rows),), prepared.plan.labels, plan.task), "auto")
    words = [tag for row in rows for tag in prepared.records[None].labels[row]]
    right = [tag == prepared.plan.labels[number] for tag, number in zip(words, predicted, strict=True)]
    recalls = {t: sum(r for r, tag in zip(right, words, strict=True) if tag == t) / words.count(t) for t in prepared.plan.labels}
    for share in prepared.shares:
        held = [tag for row in share.rows for tag in prepared.records[None].labels[row]]
        expected = sum(recalls[tag] for tag in held) / len(held)
        assert own_accuracies(prepared, model, {}, {})[share.name] == pytest.approx(expected)

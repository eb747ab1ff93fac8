from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cotune.client.site import Site
from cotune.data.dataset import DatasetManifest
from cotune.data.skipped_records import ELSEWHERE
from cotune.errors import DataError, ModelError, PlanError, PrivacyError
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.display_rounding import round_to_two_digits
from cotune.simulations.prepare import make_run, prepare
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.simulations import NewPlan


def test_one_file_is_split_without_loss_or_overlap(toy_plan: NewPlan) -> None:
    prepared = prepare(toy_plan(simulation={"clients": 3}))
    assert [share.name for share in prepared.shares] == ["org-1", "org-2", "org-3"]
    ((file, test),) = prepared.test
    rows = np.concatenate([test, *(share.rows for share in prepared.shares)])
    assert file is None
    assert sorted(rows.tolist()) == list(range(240))
    assert len(test) == pytest.approx(0.15 * 240, abs=2)


def test_what_does_not_count_is_told_in_one_line(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Counted by hand: 240 texts and beside them 2 blank ones, 1 without a label, a header and 4 copies; 5 have over 8 tokens."""
    rows = [(f"{number} great", label) for number, (_, label) in enumerate(sentences(240))]
    long = [(" ".join(["tree"] * 9 + [text]), label) for text, label in rows[:5]]
    extra = [("", "good"), (" ", "bad"), ("a", ""), ("text", "label")]
    path = write_csv(tmp_path / "mine.csv", [*long, *rows[5:], *rows[5:9], *extra])
    private = {"epsilon": 8.0, "delta": "1/n"}
    plan = toy_plan(data={"source": str(path)}, model={"max_length": 8}, privacy=private)
    prepared = prepare(plan)
    found = {"blank text": 2, "missing label": 1, "repeated header": 1, "cut at 8 tokens": 5, "copies": 4}
    assert prepared.left_out == found
    (note,) = prepared.notes
    for part in ("2 blank texts", "5 texts cut at 8 tokens (2 %)", "4 duplicates"):
        assert part in note
    public = prepare(plan.model_copy(update={"privacy": "none"}))
    assert public.left_out == {**{key: found[key] for key in list(found)[:4]}, "duplicate that is trained on": 4}


def test_each_file_that_loses_records_is_named_with_its_count(toy_plan: NewPlan, tmp_path: Path) -> None:
    """By hand: a holds 2 blank texts, b a missing label and 3 of 80 texts of more than 8 tokens, c nothing of the kind."""
    (tmp_path / "orgs").mkdir()
    rows = {name: [(f"{number} {name} great", label) for number, (_, label) in enumerate(sentences(80))] for name in "abc"}
    rows["a"] += [("", "good"), (" ", "bad")]
    rows["b"] = [(" ".join(["tree"] * 9 + [text]), label) for text, label in rows["b"][:3]] + rows["b"][3:] + [("a", "")]
    for name in rows:
        write_csv(tmp_path / "orgs" / f"{name}.csv", rows[name])
    prepared = prepare(toy_plan(data={"source": str(tmp_path / "orgs")}, model={"max_length": 8}))
    found = {file.name: dict(reasons) for file, reasons in prepared.left_out_by_file.items() if file is not None}
    assert found == {"a.csv": {"blank text": 2}, "b.csv": {"missing label": 1, "cut at 8 tokens": 3}, "c.csv": {}}
    assert prepared.left_out == {"blank text": 2, "missing label": 1, "cut at 8 tokens": 3}
    of_b, of_a = prepared.notes  # who loses most comes first, who loses nothing is not named
    assert ("a.csv" in of_a, "2 blank texts" in of_a, "b.csv" in of_a) == (True, True, False)
    assert ("b.csv" in of_b, "1 missing label" in of_b, "3 texts cut at 8 tokens (4 %)" in of_b) == (True, True, True)


def test_of_very_many_files_the_rest_is_told_together(toy_plan: NewPlan, tmp_path: Path) -> None:
    (tmp_path / "orgs").mkdir()
    for number in range(15):
        rows = [(f"{number} {i} great", label) for i, (_, label) in enumerate(sentences(40))]
        write_csv(tmp_path / "orgs" / f"{number:02}.csv", [*rows, *[("", "good")] * (20 - number)])
    notes = prepare(toy_plan(data={"source": str(tmp_path / "orgs")})).notes
    assert [note.partition(":")[0].split()[-1] for note in notes[:10]] == [f"{number:02}.csv" for number in range(10)]
    assert "5 other files" in notes[10]
    assert f"{sum(range(6, 11))} blank texts" in notes[10]
    assert len(notes) == 11


def test_classes_that_differ_in_spelling_alone_are_pointed_out(toy_plan: NewPlan, tmp_path: Path) -> None:
    rows = [(text, "Good" if label == "good" and number % 2 else label) for number, (text, label) in enumerate(sentences(240))]
    prepared = prepare(toy_plan(data={"source": str(write_csv(tmp_path / "mine.csv", rows))}))
    assert any("'Good' and 'good'" in note for note in prepared.notes)


def test_a_column_that_is_none_of_classes_is_pointed_out(toy_plan: NewPlan, tmp_path: Path) -> None:
    rows = [(text, f"2024-01-{number % 80:02}") for number, (text, _) in enumerate(sentences(240))]
    prepared = prepare(toy_plan(data={"source": str(write_csv(tmp_path / "mine.csv", rows))}, simulation={"partition": "iid"}))
    assert any("80 classes for 240 records" in note for note in prepared.notes)


def test_texts_trained_on_elsewhere_are_counted_and_not_tested(toy_plan: NewPlan, tmp_path: Path) -> None:
    """Both files hold the same: what one holds out is nearly always what the other trains on."""
    (tmp_path / "orgs").mkdir()
    rows = [(f"{number} great", label) for number, (_, label) in enumerate(sentences(200))]
    for name in ("a", "b"):
        write_csv(tmp_path / "orgs" / f"{name}.csv", rows)
    prepared = prepare(toy_plan(data={"source": str(tmp_path / "orgs")}))
    trained = [set(share.rows.tolist()) for share in prepared.shares]
    missing = [200 - len(rows) - len(share.rows) for share, (_, rows) in zip(prepared.shares, prepared.test, strict=True)]
    assert prepared.left_out[ELSEWHERE] == sum(missing) > 0
    assert all(not set(rows.tolist()) & trained[1 - number] for number, (_, rows) in enumerate(prepared.test))


def test_a_small_organization_is_named(toy_plan: NewPlan, tmp_path: Path) -> None:
    (tmp_path / "orgs").mkdir()
    write_csv(tmp_path / "orgs" / "big.csv", sentences(60))
    write_csv(tmp_path / "orgs" / "small.csv", [("great", "good"), ("awful", "bad")])
    with fails_with("data.too_few_records", "small", "2"):
        prepare(toy_plan(data={"source": str(tmp_path / "orgs")}))


def test_split_follows_from_plan_and_seed(toy_plan: NewPlan) -> None:
    def split(seed: int) -> list[list[int]]:
        prepared = prepare(toy_plan(seed=seed))
        return [rows.tolist() for rows in (prepared.test[0][1], *(share.rows for share in prepared.shares))]

    assert split(7) == split(7)
    assert split(7) != split(8)


def test_nothing_of_the_resolved_plan_is_left_open(
    toy_plan: NewPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_data: Path, base_model: Callable[[str], Path]
) -> None:
    shutil.copy(toy_data, tmp_path / "mine.csv")
    shutil.copytree(base_model("bert"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    plan = prepare(toy_plan(data={"source": "mine.csv"}, model={"base": "./base"})).plan
    assert plan.labels == ("bad", "good", "so")
    assert (plan.data.source, plan.model.base) == (str(tmp_path / "mine.csv"), str(tmp_path / "base"))
    assert plan.model.base_hash is not None
    assert prepare(plan).plan == plan
    monkeypatch.chdir("/")
    assert prepare(plan).plan == plan  # it does not matter where it is read


def test_labels_keep_the_order_of_a_base_model_that_knows_them(
    toy_plan: NewPlan, tmp_path: Path, base_model: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(base_model("bert"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "so", "1": "good", "2": "bad"}
    (folder / "config.json").write_text(json.dumps(config))
    assert prepare(toy_plan(model={"base": str(folder)})).plan.labels == ("so", "good", "bad")
    assert prepare(toy_plan(model={"base": str(folder)}, labels=["good", "bad", "so"])).plan.labels == ("good", "bad", "so")


def test_each_file_of_a_folder_is_an_organization(toy_plan: NewPlan, tmp_path: Path) -> None:
    folder = tmp_path / "organizations"
    folder.mkdir()
    write_csv(folder / "north.csv", sentences(60, seed=1))
    write_csv(folder / "Süd ost.csv", sentences(80, seed=2, classes=("bad", "so")))
    prepared = prepare(toy_plan(data={"source": str(folder)}))
    assert prepared.plan.labels == ("bad", "good", "so")
    assert {share.name for share in prepared.shares} == {"north", "Süd ost"}
    by_file = dict(prepared.test)
    for share in prepared.shares:
        size = {"north": 60, "Süd ost": 80}[share.name]
        assert sorted([*share.rows.tolist(), *by_file[share.file].tolist()]) == list(range(size))
        texts, labels = zip(*sentences(size, seed=1 if share.name == "north" else 2, classes=CLASSES[share.name]), strict=True)
        assert prepared.records[share.file].inputs == texts
        counted = Counter(labels[i] for i in share.rows)
        assert prepared.label_counts(share) == {label: counted[label] for label in ("bad", "good", "so")}


CLASSES = {"north": ("bad", "good", "so"), "Süd ost": ("bad", "so")}


def test_noise_is_the_least_that_keeps_each_budget(toy_plan: NewPlan) -> None:
    plan = toy_plan(privacy={"epsilon": 3.0}, local={"batch_size": 30}, simulation={"partition": "quantity:2.0"})
    prepared = prepare(plan)
    assert set(prepared.noise) == {"org-1", "org-2"}
    for share in prepared.shares:
        n = round_to_two_digits(share.units)
        sigma = prepared.noise[share.name]
        delta = n**-1.5
        assert epsilon([Steps(sigma, 30 / n, 15)], delta) <= 3.0
        assert epsilon([Steps(sigma * 0.99, 30 / n, 15)], delta) > 3.0
    assert prepare(toy_plan()).noise == {}


def test_a_run_folder_says_who_holds_what(toy_plan: NewPlan, tmp_path: Path) -> None:
    prepared = prepare(toy_plan())
    folder = make_run(prepared, tmp_path / "run", "in-process", "cpu")
    assert folder.plan == prepared.plan
    assert [(p.name, p.site) for p in folder.file.participants] == [("org-1", "sites/org-1"), ("org-2", "sites/org-2")]
    assert (folder.file.engine, folder.file.device) == ("in-process", "cpu")
    texts, labels = zip(*sentences(240), strict=True)
    for share in prepared.shares:
        site = Site(folder.path / "sites" / share.name)
        expected = {
            "organization": share.name,
            "simulated": True,
            "device": "cpu",
            "base": None,
            "own_base": None,
            "public": None,
            "run_ledger": Path("../../ledger.sqlite"),
        }
        assert site.file.model_dump() == expected
        assert site.ledger_file == (folder.path / "ledger.sqlite").resolve()
        assert site.dataset(prepared.plan.labels).inputs() == [texts[i] for i in share.rows]
    test = DatasetManifest.read(folder.path / "test" / "data.json", prepared.plan.labels)
    assert test.targets == [("bad", "good", "so").index(labels[i]) for i in prepared.test[0][1]]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data": {"source": "/nowhere/reviews.csv"}}, DataError, "/nowhere/reviews.csv does not exist"),
        ({"labels": ["bad", "good"]}, DataError, "classes that the plan does not list .*'so'"),
        ({"labels": ["bad"]}, DataError, "classes that the plan does not list|lists the class 'bad' only"),
        ({"simulation": {"clients": 50}}, DataError, "use fewer clients"),
        ({"simulation": {"partition": "dirichlett:1"}}, PlanError, "did you mean 'dirichlet"),
        ({"simulation": {"partition": "shards:9"}}, DataError, "needs 9 classes, and the data has 3"),
        ({"local": {"batch_size": 150}}, DataError, "org-1 has 103 examples, fewer than a batch needs"),
        ({"local": {"batch_size": 0.001}}, DataError, "fewer than a batch needs"),
        ({"model": {"base": "/nowhere/model"}}, ModelError, "/nowhere/model is not a folder"),
        ({"model": {"base_hash": "0" * 64}}, ModelError, "expected 0000000000000000"),
        ({"privacy": {"epsilon": 1e-6, "delta": 1e-9}}, PrivacyError, "cannot be reached by 15 steps"),
        ({"privacy": {"delta": 0.5}}, PrivacyError, "0.5"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(
    toy_plan: NewPlan, changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        prepare(toy_plan(**changes))


def test_a_rule_that_chance_may_leave_too_few_updates_is_refused(toy_plan: NewPlan) -> None:
    """Of 6 organizations, each asked with 0.5, fewer than 2 are in 1 of 9 rounds; with 0.999 in fewer than 1 of 10^14."""

    def with_(**server: float) -> None:
        prepare(toy_plan(strategy="model_stock", server=server, simulation={"clients": 6}))

    with fails_with("plan.incompatible", "2", "1"):
        with_(sample_rate=0.5)
    with_(sample_rate=0.999)
    with_(sample_size=2)
    with fails_with("plan.invalid", "2", "1"):
        with_(sample_size=1)


def test_a_stage_that_cannot_fill_its_batch_is_found_too(toy_plan: NewPlan) -> None:
    stages = [{"mode": "head", "rounds": 1}, {"mode": "full", "rounds": 1, "local": {"batch_size": 200}}]
    with fails_with("data.too_few_records", "200"):
        prepare(toy_plan(train=stages))

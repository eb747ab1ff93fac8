from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotune.client.local_events import observe_client
from cotune.errors import PlanError
from cotune.reporting.comparison_statistics import Comparison, Variation
from cotune.server.runs.run_folder import lock_folder
from cotune.simulations.comparison.compare import compare
from cotune.simulations.comparison.grid import parse_variation
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.simulations import rounds_played, table

WEIGHTINGS = parse_variation("strategy.weighting=examples,uniform")
PARTITIONS = parse_variation("partition=dirichlet:0.5,iid")


@pytest.fixture(scope="module")
def found(plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("compare") / "out"
    return compare(plan_file, [WEIGHTINGS, PARTITIONS], seeds=2, out=out, jobs=1, device="cpu")


# --- the variations


def test_values_split_at_commas_outside_brackets_and_quotes() -> None:
    assert parse_variation(" a.b = 1, two ") == Variation("a.b", ("1", "two"))
    assert parse_variation('f={name="ties",density=0.3},mean').values == ('{name="ties",density=0.3}', "mean")
    assert parse_variation('labels=["a,b","c"],["d"]').values == ('["a,b","c"]', '["d"]')
    assert parse_variation("f=\"x,y\",'(,'").values == ('"x,y"', "'(,'")


@pytest.mark.parametrize("text", ["partition", "=a,b", "a=", "a=1,,2", "a=1,"])
def test_what_is_no_variation(text: str) -> None:
    with fails_with("plan.malformed_variation", "KEY=V1", "V2"):
        parse_variation(text)
    with pytest.raises(PlanError, match="has a value twice"):
        parse_variation("a=1,2,1")


# --- what is compared


def test_a_grid_is_played(found: Comparison) -> None:
    assert [(*(value for _, value in cell.settings), cell.seed) for cell in found.cells] == [
        (weighting, partition, seed)
        for weighting in ("examples", "uniform")
        for partition in ("dirichlet:0.5", "iid")
        for seed in (7, 8)
    ]
    assert {cell.status for cell in found.cells} == {"finished"}
    rows = table(found.folder)
    assert list(rows[0]) == [
        *("strategy.weighting", "partition", "seed", "plan_id", "accuracy", "precision", "recall", "f1", "worst", "spread"),
        *("gain", "answers", "bytes_up", "bytes_down", "seconds", "epsilon", "status", "reason"),
    ]
    for row, cell in zip(rows, found.cells, strict=True):
        assert cell.folder == f"cells/{cell.plan_id[:16]}"
        summary = json.loads((found.folder / cell.folder / "summary.json").read_bytes())
        own = [each["own"]["accuracy"] for each in summary["organizations"]]
        assert summary["plan_id"] == row["plan_id"]
        assert float(row["accuracy"]) == summary["test"]["federated"]["accuracy"]
        assert (float(row["worst"]), float(row["spread"])) == (min(own), pytest.approx(np.std(own)))
        assert (row["bytes_up"], row["epsilon"]) == (str(summary["bytes"]["up"]), "")
        assert summary["test"]["alone"] is summary["test"]["pooled"] is None  # baselines cost much and are not compared
    assert [row.facet[0][1] for row in found.rows] == ["dirichlet:0.5", "dirichlet:0.5", "iid", "iid"]
    assert [row.difference is None for row in found.rows] == [True, False, True, False]
    written = json.loads((found.folder / "results.json").read_bytes())
    assert (written["baseline"], written["seeds"], len(written["cells"]), len(written["rows"])) == ("examples", [7, 8], 8, 4)


def test_one_seed_gives_every_strategy_the_same_start(found: Comparison, plan_file: Path, tmp_path: Path) -> None:
    """The same records for everybody, and the same loss at every step of the first round: initial model and batches."""
    losses: list[tuple[Any, ...]] = []

    def watch(what: str, details: dict[str, Any]) -> None:
        if what == "step" and details["round"] == 1:
            losses.append((details["organization"], details["step"], details["loss"]))

    with observe_client(watch):
        again = compare(plan_file, [WEIGHTINGS], seeds=1, out=tmp_path / "out", jobs=1, device="cpu")
    assert len(losses) == 2 * 2 * 2  # strategies, organizations, steps
    assert losses[:4] == losses[4:]
    one, other = (again.folder / cell.folder for cell in again.cells)
    for rows in ("sites/org-1/data-rows-0.npy", "sites/org-2/data-rows-0.npy", "test/data-rows-0.npy"):
        assert np.array_equal(np.load(one / rows), np.load(other / rows))
    seeds = [cell.folder for cell in found.cells[:2]]
    parts = [np.load(found.folder / folder / "sites/org-1/data-rows-0.npy") for folder in seeds]
    assert not np.array_equal(*parts)


def test_finished_runs_are_not_repeated(found: Comparison, plan_file: Path) -> None:
    before = rounds_played(found.folder)
    again = compare(plan_file, [WEIGHTINGS, PARTITIONS], seeds=2, out=found.folder, jobs=1, device="cpu")
    assert rounds_played(found.folder) == before
    assert again.cells == found.cells
    heard: list[str] = []
    iid = parse_variation("partition=iid,dirichlet:0.5")
    more = compare(
        plan_file,
        [WEIGHTINGS, iid],
        seeds=3,
        out=found.folder,
        jobs=1,
        device="cpu",
        listener=lambda event, _: heard.append(event),
    )
    assert heard.count("cell_started") == 4  # the third seed
    assert rounds_played(found.folder) == before + 4 * 2
    assert {(c.settings[0], c.settings[1], c.seed) for c in more.cells} > {
        (c.settings[0], c.settings[1], c.seed) for c in found.cells
    }


def test_changed_records_are_not_served_from_before(plan_file: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "reviews.csv", sentences(200))
    given = {"overrides": [f"data.source={data}"], "seeds": 1, "out": tmp_path / "out", "jobs": 1, "device": "cpu"}
    first = compare(plan_file, [WEIGHTINGS], **given)
    write_csv(data, sentences(200, seed=1))
    second = compare(plan_file, [WEIGHTINGS], **given)
    assert [cell.plan_id for cell in first.cells] == [cell.plan_id for cell in second.cells]
    assert rounds_played(tmp_path / "out") == 2 * 2 * 2
    assert not {cell.folder for cell in first.cells} & {cell.folder for cell in second.cells}
    write_csv(data, sentences(200))
    assert compare(plan_file, [WEIGHTINGS], **given).cells == first.cells


def test_records_left_out_are_told(plan_file: Path, tmp_path: Path) -> None:
    """Before anything is trained, and in all results: of a note that only some runs have, in how many."""
    rows = [*sentences(200), (" ", "good"), ("", "bad")]
    some = write_csv(tmp_path / "some.csv", rows)
    all_of_them = write_csv(tmp_path / "all.csv", sentences(200))
    told: list[dict[str, Any]] = []
    found = compare(
        plan_file,
        [Variation("data.source", (str(some), str(all_of_them)))],
        seeds=1,
        out=tmp_path / "out",
        jobs=1,
        device="cpu",
        listener=lambda event, fields: told.append(fields) if event == "comparison_started" else None,
    )
    (note,) = [note for note in found.notes if "2 blank texts" in note]
    assert note.startswith("left out: ")
    assert note.endswith("(in 1 of 2 runs)")
    assert told[0]["notes"] == found.notes
    assert json.loads((found.folder / "results.json").read_bytes())["notes"] == list(found.notes)
    assert "2 blank texts" in (found.folder / "compare.html").read_text(encoding="utf-8")


def test_a_plan_that_asks_for_baselines_gets_them(plan_file: Path, tmp_path: Path) -> None:
    asked = ["simulation.baselines=['pooled']"]
    found = compare(plan_file, [parse_variation("local.steps=1")], seeds=1, overrides=asked, out=tmp_path, jobs=1, device="cpu")
    assert json.loads((tmp_path / found.cells[0].folder / "summary.json").read_bytes())["test"]["pooled"]


# --- what fails


def test_a_cell_that_fails_is_shown_and_the_others_go_on(plan_file: Path, tmp_path: Path) -> None:
    rates = parse_variation("server.max_update_norm=1000.0,1e-30")
    found = compare(plan_file, [rates], seeds=2, out=tmp_path / "out", jobs=1, device="cpu")
    assert [(cell.status, not cell.metrics) for cell in found.cells] == [
        *[("finished", False)] * 2,
        *[("failed", True)] * 2,
    ]
    assert all("round 1 got 0 of 2 updates" in cell.reason for cell in found.failed)
    assert [row["status"] for row in table(found.folder)] == ["finished", "finished", "failed", "failed"]
    page = (found.folder / "compare.html").read_text(encoding="utf-8")
    assert "2 of 4 runs failed" in page
    assert page.count("round 1 got 0 of 2 updates") == 2


@pytest.mark.parametrize(
    ("variations", "more", "message"),
    [
        ([], {}, "there is nothing to compare: expected at least one --vary"),
        (["partition=iid", "simulation.partition=dirichlet:0.5"], {}, "cannot be varied together"),
        (["seed=1,2"], {}, "the seed is no key to vary: expected --seeds"),
        (["partition=iid"], {"baseline": "idd"}, "the baseline \"idd\" is no value of partition; did you mean 'iid'?"),
        (["partition=iid,zipf:2"], {}, "partition=zipf:2"),
        (["local.stesp=1,2"], {}, 'local.stesp=1: the plan has an unknown key "local.stesp"; did you mean'),
        (["server.sample_size=1,5"], {}, "server.sample_size=5, seed=7: the plan has server.sample_size = 5 and 2 organizations"),
        (["local.learning_rate=1,1.0"], {}, "are the same plan: expected values that differ"),
        (["partition=iid"], {"seeds": 0}, "expected 1 to 1000 seeds, got 0"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_runs(
    plan_file: Path, tmp_path: Path, variations: list[str], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as refused:
        compare(plan_file, [parse_variation(text) for text in variations], out=tmp_path / "out", device="cpu", **more)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_two_comparisons_in_one_folder_at_a_time(plan_file: Path, tmp_path: Path) -> None:
    with lock_folder(tmp_path), fails_with("run.locked"):
        compare(plan_file, [WEIGHTINGS], seeds=1, out=tmp_path, jobs=1, device="cpu")
    (tmp_path / "file").touch()
    with fails_with("run.not_writable", "file"):
        compare(plan_file, [WEIGHTINGS], seeds=1, out=tmp_path / "file", jobs=1, device="cpu")


def test_a_damaged_cell_is_said(plan_file: Path, tmp_path: Path) -> None:
    once: dict[str, Any] = {"seeds": 1, "out": tmp_path, "jobs": 1, "device": "cpu"}
    cell = tmp_path / compare(plan_file, [parse_variation("rounds=1")], **once).cells[0].folder
    (cell / "run.json").write_text("{")
    with fails_with("run.damaged_document", "run.json"):
        compare(plan_file, [parse_variation("rounds=1")], **once)


# --- the page


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_stands_alone(found: Comparison) -> None:
    text = (found.folder / "compare.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    names = [name for name, _ in page.tags]
    assert "script" not in names
    assert {attributes.get("href") for name, attributes in page.tags if name in ("link", "a")} == {"data:,"}
    assert not any("src" in attributes or "style" in attributes for _, attributes in page.tags)
    (policy,) = [a["content"] for n, a in page.tags if n == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert names.count("polyline") == names.count("polygon") == 2 * 2  # a line and a band for each weighting in each facet
    assert names.count("h2") == 3 + bool(found.notes)
    assert "partition = iid" in text
    assert "One seed has the same initial model, the same partition" in text
    assert "Privacy noise and private sampling are not paired" not in text  # there is none


def test_names_are_escaped_and_privacy_is_said_not_to_be_paired(plan_file: Path, tmp_path: Path) -> None:
    rare = Variation("data.source", (str(write_csv(tmp_path / "<b>&.csv", sentences(240))),))
    private = ["privacy={epsilon=8}"]
    found = compare(plan_file, [rare], seeds=1, overrides=private, out=tmp_path / "out", jobs=1, device="cpu")
    text = (found.folder / "compare.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;.csv" in text
    assert "<b>&" not in text
    assert "Privacy noise and private sampling are not paired" in text
    (row,) = table(found.folder)
    assert 0 < float(row["epsilon"]) <= 8

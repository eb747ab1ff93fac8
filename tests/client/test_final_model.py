from __future__ import annotations

import json
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity
from transformers import pipeline

from cotune.client import final_model as finished_module
from cotune.client.app import app
from cotune.client.audit_log import AuditLog
from cotune.client.final_model import store_final_model
from cotune.client.personalization.evaluation import evaluate_site
from cotune.client.site import Site
from cotune.client.training.personal.parameters import PERSONAL
from cotune.client.training.round import train_round
from cotune.errors import RunError
from cotune.models.evaluation.test_set import evaluate
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model, shared_names
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.messages import Receipt, Recipient, Request, decode_receipt, encode_requests, received_digest
from cotune.protocol.refusals import parse_refusal
from cotune.protocol.signatures import detach
from cotune.protocol.statements import FINISHED
from tests.support.failures import fails_with
from tests.support.signing import sign_request

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]


def finished(plan: Plan, state: State, *, round: int = 3, admitted: int = 0) -> Request:
    """The request of the end, of a plan with three rounds."""
    return Request(plan.canonical(), round, "clinic", {name: tensor + 0.25 for name, tensor in state.items()}, admitted)


def test_the_model_is_a_folder_that_transformers_loads(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    site = make_site()
    request = finished(plan, state_for(plan))
    folder = store_final_model(request, plan, site)
    assert folder == site.folder / "models" / f"{plan.name}-{plan.plan_id[:12]}"
    classify = pipeline("text-classification", str(folder))
    [told] = classify("great table")
    assert told["label"] in plan.labels
    for name, tensor in request.state.items():
        assert torch.equal(classify.model.state_dict()[name], tensor)
    assert not site.ledger_file.exists()


def test_the_same_model_again_changes_nothing(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    site = make_site()
    request = finished(plan, state_for(plan))
    weights = store_final_model(request, plan, site) / "model.safetensors"
    before = weights.stat()
    assert store_final_model(request, plan, site) == weights.parent
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other = Request(plan.canonical(), 3, "clinic", {name: tensor + 1 for name, tensor in request.state.items()})
    store_final_model(other, plan, site)
    assert weights.stat().st_ino != before.st_ino


def test_the_own_part_is_joined(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan(train="lora", strategy="fedsa", rounds=1)
    site = make_site()
    state = state_for(plan)
    train_round(plan, site, 1, state)
    own = site.load_newest_state(plan.plan_id, PERSONAL)
    assert own
    shared = {name: tensor for name, tensor in state.items() if ".lora_A." in name}
    store_final_model(Request(plan.canonical(), 1, "clinic", shared, 1), plan, site)
    model = get_plan_model(plan, "cpu")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state(own).items())


@pytest.mark.parametrize(
    "personal",
    [["adapter"], {"parts": ["head"], "order": "own_first"}, {"method": "pfedme", "inner_steps": 2}],
    ids=["adapter", "own first", "pfedme"],
)
def test_own_model_is_stored_and_evaluated(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, personal: Any) -> None:
    """The shared part as it came with what was kept: that is what `client evaluate` calls the received model."""
    plan = make_plan(train="lora", personal=personal, rounds=1)
    site = make_site()
    model = get_plan_model(plan, "cpu")
    model.load({})
    state = model.state(shared_names(plan, model, 1))
    update = train_round(plan, site, 1, state)
    shared = {name: tensor + update.delta[name] for name, tensor in state.items()}
    folder = store_final_model(Request(plan.canonical(), 1, "clinic", shared, 1), plan, site)
    model.load({**shared, **site.load_newest_state(plan.plan_id, PERSONAL)})
    held = site.dataset(plan.labels)
    expected = evaluate(model, {**shared, **site.load_newest_state(plan.plan_id, PERSONAL)}, held, "float32").accuracy
    found = evaluate_site(site, held)
    assert found["model"] == str(folder)
    assert found["columns"]["received"]["accuracy"] == pytest.approx(expected)


def test_a_plan_that_nobody_has_approved_leaves_nothing(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    for rules in ({"training.approval": "each"}, {"training.base_models": ["00" * 32]}):
        site = make_site(policy=change_policy(Policy.permissive(), rules))
        with fails_with(f"policy.{next(iter(rules))}"):
            store_final_model(finished(plan, state_for(plan)), plan, site)
        assert not (site.folder / "models").exists()


def test_what_is_no_finished_model(make_plan: MakePlan, make_site: MakeSite, state_for: StateFor) -> None:
    plan = make_plan()
    site = make_site()
    state = state_for(plan)
    with fails_with("run.wrong_round", "4", "3"):
        store_final_model(finished(plan, state, round=4), plan, site)
    name = next(iter(state))
    with fails_with("run.model_not_finite"):
        store_final_model(finished(plan, {**state, name: state[name] + float("nan")}), plan, site)
    with fails_with("model.foreign_state"):
        store_final_model(finished(plan, {**state, "other": torch.zeros(1)}), plan, site)
    assert not (site.folder / "models").exists()


def ask(request: Request, site: Site) -> Message:
    [content] = encode_requests(request.plan, request.round, request.state, [Recipient(request.organization)])
    sign_request(content, FINISHED)
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1
    message = Message(content, 2, MessageType.EVALUATE, group_id=str(request.round))
    message.metadata.__dict__["_message_id"] = "7"
    config = UserConfig({"site": str(site.folder), "server": "fed:9092"})
    return app(message, Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config=UserConfig()))


def test_the_answer_is_a_receipt_and_the_log_names_the_folder(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("no record is read")

    plan = make_plan()
    site = make_site()
    request = finished(plan, state_for(plan))
    monkeypatch.setattr(Site, "dataset", untouched)
    reply = ask(request, site)
    assert decode_receipt(detach(reply.content)[0]) == Receipt("clinic", plan.plan_id, received_digest(request.state))
    assert set(reply.content) == {"receipt", "signed"}
    _, entry = AuditLog(site.folder).entries()
    assert (entry["what"], entry["server"], entry["round"]) == ("receipt", "fed:9092", 3)
    assert json.loads((site.folder / "models").joinpath(entry["model"], "cotune.json").read_text())["plan_id"] == plan.plan_id
    refused = ask(finished(plan, state_for(plan), round=4), site)
    assert parse_refusal(str(refused.error.reason))[0] == "it did not train; the reason is in its own log"


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a disk that fills up in the middle of a file: the system writes what fits and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def weights_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_model_is_whole_after_a_full_disk(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan()
    site = make_site()
    elsewhere = make_site("clinic", at="elsewhere")
    request = finished(plan, state_for(plan))
    whole = weights_of(store_final_model(request, plan, elsewhere))
    (site.folder / "models" / ".model.killed").mkdir(parents=True)
    folder = site.folder / "models" / f"{plan.name}-{plan.plan_id[:12]}"
    with no_file_larger_than(whole // 2), caplog.at_level(logging.INFO, logger="cotune"):
        reply = ask(request, site)
    assert parse_refusal(str(reply.error.reason))[0] == "it did not train; the reason is in its own log"
    entry = AuditLog(site.folder).last()
    assert entry["what"] == "refusal"
    assert str(folder) in entry["reason"]
    assert "free space" in entry["reason"]
    assert "\n" not in entry["reason"]
    assert "Traceback" not in caplog.text
    assert list((site.folder / "models").iterdir()) == []  # nothing that anybody could take for a model
    assert not ask(request, site).has_error()
    assert weights_of(folder) == whole


@pytest.mark.parametrize("size", [0, 20])
def test_model_without_its_last_file_is_not_finished(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    plan = make_plan()
    site = make_site()
    request = finished(plan, state_for(plan))
    written = finished_module.atomic_write

    def on_a_full_disk(path: Path, content: bytes) -> None:
        with no_file_larger_than(size):
            written(path, content)

    monkeypatch.setattr(finished_module, "atomic_write", on_a_full_disk)
    with pytest.raises(RunError, match="the finished model cannot be written"):
        store_final_model(request, plan, site)
    monkeypatch.setattr(finished_module, "atomic_write", written)
    folder = store_final_model(request, plan, site)
    assert json.loads((folder / "cotune.json").read_text())["plan_id"] == plan.plan_id

"""A round of an organization that trains a model of its own, and shares its predictions for public inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cotune.client.consent.policy_check import check_plan
from cotune.client.egress_guard import EgressBlocked, check_update
from cotune.client.site import Site
from cotune.client.site_folder import SiteFile
from cotune.client.training.personal.prediction_model import OwnModel, load_trained_model
from cotune.client.training.round import train_round
from cotune.ensembles.public_inputs import pin_public, to_taught
from cotune.errors import CotuneError, PolicyError
from cotune.plan.plan import Plan
from cotune.plan.public import SCORES
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.messages import Recipient, decode_request, encode_requests, encode_update
from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.strategies.types import LocalSteps, RoundContext, Update
from tests.support.datasets import sentences, write_csv

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
PRIVATE = {"epsilon": 4.0, "delta": 1e-3}
INPUTS = 12


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "public.csv", sentences(INPUTS, seed=5))


@pytest.fixture
def plan(make_plan: MakePlan, public: Path) -> Plan:
    return plan_with(make_plan, public)


def plan_with(make_plan: MakePlan, public: Path, **changes: Any) -> Plan:
    table = {"source": str(public), "learning_rate": 0.05, "epochs": 60, "batch_size": 6}
    return pin_public(make_plan(**{"collaboration": "predictions", "public": table, "privacy": PRIVATE, **changes}), Path())


def with_file(site: Site, **changes: Any) -> Site:
    """The site, with other entries of its description."""
    described = site.file.model_copy(update=changes)
    site.description.write_text(SiteFile.model_dump_json(described))
    return Site(site.folder)


@pytest.fixture
def site(make_site: MakeSite, public: Path) -> Site:
    return with_file(make_site(), public=public)


def fused(value: float = 0.0, answers: int = INPUTS) -> dict[str, Tensor]:
    """What a request holds: nothing said yet, or the first class preferred."""
    return {SCORES: torch.tensor([[value, -value / 2, -value / 2]]).repeat(answers, 1)}


def code_of(plan: Plan, site: Site, round: int, state: dict[str, Tensor], **more: Any) -> str:
    with pytest.raises(CotuneError) as caught:
        train_round(plan, site, round, state, **more)
    return caught.value.code


def test_predictions_leave_and_nothing_else(plan: Plan, site: Site) -> None:
    update = train_round(plan, site, 1, fused())
    assert {name: tuple(tensor.shape) for name, tensor in update.delta.items()} == {SCORES: (INPUTS, 3)}
    assert not update.statistics
    assert site.ledger().rounds(plan.plan_id) == [1]


def test_same_request_gets_the_same_predictions(plan: Plan, site: Site) -> None:
    first = train_round(plan, site, 1, fused())
    spent = site.ledger().spent(plan.plan_id)
    again = train_round(plan, site, 1, fused())
    assert torch.equal(first.delta[SCORES], again.delta[SCORES])
    assert site.ledger().spent(plan.plan_id) == spent


def test_answered_round_is_not_trained_on_other_predictions(plan: Plan, site: Site) -> None:
    train_round(plan, site, 1, fused())
    assert code_of(plan, site, 1, fused(3.0)) == "privacy.answered_round"


def test_own_model_learns_what_all_say_before_a_record_is_read(plan: Plan, site: Site) -> None:
    train_round(plan, site, 1, fused())
    spent = site.ledger().spent(plan.plan_id)
    model = load_trained_model(plan, site)
    model.load({})
    own = OwnModel(plan, site, model, 2, 1)
    said = fused(6.0)
    before = own.predict(fused())[SCORES]
    joined = own.join(said)
    after = own.predict(fused())[SCORES]
    taught = to_taught(said[SCORES], plan.public)

    def divergence(scores: Tensor) -> float:
        return float(functional.kl_div(scores.double().log_softmax(dim=1), taught, reduction="batchmean"))

    assert divergence(after) < 0.3 * divergence(before)
    assert joined.keys() == set(own.names)
    assert site.ledger().spent(plan.plan_id) == spent


def test_own_model_goes_on_from_the_admitted_round(plan: Plan, site: Site) -> None:
    train_round(plan, site, 1, fused())
    train_round(plan, site, 2, fused(1.0), admitted=1)
    model = load_trained_model(plan, site)
    model.load({})
    kept = OwnModel(plan, site, model, 3, 1).kept
    assert kept
    assert all(torch.equal(kept[name], tensor) for name, tensor in site.load_state(plan.plan_id, 1, "personal").items())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"public": None}, "data.no_public_inputs"),
        ({"public": Path("/nowhere.csv")}, "data.not_readable"),
        ({"own_base": "/nowhere"}, "model.missing_base"),
    ],
)
def test_nothing_is_charged_where_something_is_missing(plan: Plan, site: Site, changes: dict[str, Any], code: str) -> None:
    assert code_of(plan, with_file(site, **changes), 1, fused()) == code
    assert not site.ledger().spent(plan.plan_id)


def test_another_public_set_is_refused(plan: Plan, site: Site, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", sentences(INPUTS, seed=6))
    assert code_of(plan, with_file(site, public=other), 1, fused()) == "data.changed"
    assert not site.ledger().spent(plan.plan_id)


def test_plan_that_binds_no_public_set_is_refused(make_plan: MakePlan, site: Site, public: Path) -> None:
    loose = make_plan(collaboration="predictions", public={"source": str(public), "answers": INPUTS}, privacy=PRIVATE)
    assert code_of(loose, site, 1, fused()) == "data.unstated_inputs"


def test_another_base_model_in_the_middle_is_refused(plan: Plan, site: Site, base_model: Callable[[str], Path]) -> None:
    train_round(plan, site, 1, fused())
    spent = site.ledger().spent(plan.plan_id)
    other = with_file(site, own_base=str(base_model("distilbert")))
    assert code_of(plan, other, 2, fused(1.0), admitted=1) == "run.lost_state"
    assert site.ledger().spent(plan.plan_id) == spent


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ({}, "run.wrong_state"),
        (fused(answers=INPUTS - 1), "run.wrong_state"),
        ({SCORES: torch.zeros(INPUTS, 4)}, "run.wrong_state"),
        (fused(50.0), "run.extreme_values"),
        (fused(torch.nan), "run.extreme_values"),
    ],
)
def test_hostile_request_is_refused(plan: Plan, site: Site, state: dict[str, Tensor], code: str) -> None:
    assert code_of(plan, site, 1, state) == code
    assert not site.ledger().spent(plan.plan_id)


@pytest.mark.parametrize("allowed", ["parameters", "predictions"])
def test_policy_says_what_may_leave(make_plan: MakePlan, plan: Plan, allowed: str) -> None:
    policy = change_policy(Policy.permissive(), {"training.collaborations": [allowed]})
    for asked in (plan, make_plan(privacy=PRIVATE)):
        if asked.collaboration == allowed:
            check_plan(asked, policy)
            continue
        with pytest.raises(PolicyError) as caught:
            check_plan(asked, policy)
        assert caught.value.rule == "training.collaborations"


def test_predictions_of_a_model_without_privacy_are_declined(make_plan: MakePlan, public: Path) -> None:
    """They are a release of the records; the strict policy takes no plan without noise."""
    policy = change_policy(Policy.permissive(), {"training.record_privacy": True})
    with pytest.raises(PolicyError) as caught:
        check_plan(plan_with(make_plan, public, privacy="none"), policy)
    assert caught.value.rule == "training.record_privacy"


def test_predictions_beyond_the_bounds_do_not_leave(plan: Plan, site: Site) -> None:
    [content] = encode_requests(plan.canonical(), 1, fused(), [Recipient("clinic")])
    request = decode_request(content)
    update = train_round(plan, site, 1, dict(request.state))
    check_update(encode_update(update, plan.plan_id), request, plan, site)
    changed = {SCORES: update.delta[SCORES].index_fill(1, torch.tensor([0]), 30.0)}
    with pytest.raises(EgressBlocked):
        check_update(encode_update(Update(**{**vars(update), "delta": changed}), plan.plan_id), request, plan, site)


HOSTILE: dict[str, tuple[dict[str, Tensor], str]] = {
    "fewer answers": ({SCORES: torch.zeros(INPUTS - 1, 3)}, "shape"),
    "more classes": ({SCORES: torch.zeros(INPUTS, 4)}, "shape"),
    "parameters instead": ({"classifier.weight": torch.zeros(3, 16)}, "parameters"),
    "no numbers": ({SCORES: torch.full((INPUTS, 3), torch.nan)}, "finite"),
    "one huge score": (
        {SCORES: torch.zeros(INPUTS, 3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(21.0))},
        "reach",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_predictions_are_rejected(plan: Plan, case: str) -> None:
    delta, word = HOSTILE[case]
    context = RoundContext(round=1, rounds=3, seed=plan.seed, organizations=2, state=fused(), local=LocalSteps())
    spec = UpdateSpec.build(plan, context, fused(), {}, received="r", example_bounds={})
    honest = Update("clinic", 1, {SCORES: torch.zeros(INPUTS, 3)}, examples=60, steps=4, epsilon=1.0, received="r")
    assert spec.validate(honest, "clinic").is_valid
    assert word in spec.validate(Update(**{**vars(honest), "delta": delta}), "clinic").reason

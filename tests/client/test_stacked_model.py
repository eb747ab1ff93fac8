"""Stacking at an organization: what is asked of its policy, one round, and the model that comes at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.client.consent.plan_summary import summarize_plan
from cotune.client.consent.policy_check import find_violations
from cotune.client.consent.preflight import run_preflight
from cotune.client.final_model import store_final_model
from cotune.client.personalization.evaluation import adapt_site, open_final_model
from cotune.client.site import Site
from cotune.client.site_setup import set_base_model
from cotune.client.training.round import train_round
from cotune.ensembles.predictor import open_model
from cotune.errors import ModelError, PolicyError
from cotune.models.base.lookup import FOLDER, find_base
from cotune.models.config import ModelConfig
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.messages import Request
from tests.support.stacked import bundle, stated

BaseModel = Callable[[str], Path]
NewPlan = Callable[..., Plan]
NewSite = Callable[..., Site]
PRIVATE = {"epsilon": 8.0, "delta": 1e-3}
HANDED_OVER = [*stated("north"), {"name": "south", "handed_over": True}]


@pytest.fixture(scope="module")
def together(base_model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(base_model, tmp_path_factory.mktemp("together"))


@pytest.fixture
def stacking(make_plan: NewPlan, together: Path) -> Callable[..., Plan]:
    def make(members: Any = None, **changes: Any) -> Plan:
        base = find_base(ModelConfig(base=str(together)))
        model = {"base": str(together), "pooling": "auto", "members": members or stated("north", "south"), **base.pins}
        return make_plan(**{"model": model, "privacy": PRIVATE, **changes})

    return make


def head_of(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"classifier.weight": torch.randn(3, 6, generator=generator), "classifier.bias": torch.randn(3, generator=generator)}


def test_round_is_charged_and_only_the_meta_model_leaves(stacking: Callable[..., Plan], make_site: NewSite) -> None:
    site = make_site()
    plan = stacking()
    update = train_round(plan, site, 1, head_of(1))
    assert {name: tuple(delta.shape) for name, delta in update.delta.items()} == {
        "classifier.weight": (3, 6),
        "classifier.bias": (3,),
    }
    assert site.ledger().rounds(plan.plan_id) == [1]
    assert update.epsilon is not None
    assert 0 < update.epsilon <= PRIVATE["epsilon"]


def test_members_without_privacy_need_the_policys_leave(stacking: Callable[..., Plan], make_site: NewSite) -> None:
    careful = change_policy(Policy.permissive(), {"training.handed_over_members": False})
    site = make_site(policy=careful)
    plan = stacking(HANDED_OVER)
    with pytest.raises(PolicyError) as caught:
        train_round(plan, site, 1, head_of(1))
    assert caught.value.rule == "training.handed_over_members"
    assert not site.ledger_file.exists() or not site.ledger().rounds(plan.plan_id)
    assert train_round(stacking(), site, 1, head_of(1)).steps > 0
    assert not Policy().training.handed_over_members


@pytest.mark.parametrize(("most", "declined"), [(3.0, False), (2.9, True)])
def test_members_with_a_larger_epsilon_than_own_need_leave(stacking: Callable[..., Plan], most: float, declined: bool) -> None:
    rules = {"training.handed_over_members": False, "budget.epsilon_per_run": most}
    found = find_violations(stacking(), change_policy(Policy.permissive(), rules), 100)
    assert ("training.handed_over_members" in {violation.rule for violation in found}) == declined


def test_preflight_tries_a_step_and_the_summary_says_what_leaves(stacking: Callable[..., Plan], make_site: NewSite) -> None:
    report = run_preflight(stacking(), make_site())
    assert report.declined is None
    assert [stage.mode for stage in report.stages] == ["head"]
    assert any("stacking: 2 frozen models predict" in line for line in summarize_plan(stacking()))
    assert not any(
        "stacking" in line for line in summarize_plan(stacking(HANDED_OVER).model_copy(update={"model": ModelConfig(base="x")}))
    )


def test_organization_names_its_own_copy_of_the_members(
    stacking: Callable[..., Plan], make_site: NewSite, together: Path, base_model: BaseModel
) -> None:
    plan = stacking()
    away = plan.model_copy(update={"model": plan.model.model_copy(update={"base": f"{FOLDER}together"})})
    site = set_base_model(make_site(), away, together)
    assert train_round(away, site, 1, head_of(1)).steps > 0
    with pytest.raises(ModelError) as caught:
        set_base_model(site, away, base_model("bert"))
    assert caught.value.code == "model.other_hash"


def test_final_model_is_opened_and_adapted(stacking: Callable[..., Plan], make_site: NewSite) -> None:
    plan = stacking()
    site = make_site()
    state = head_of(2)
    folder = store_final_model(Request(plan.canonical(), plan.rounds, "clinic", state, 0), plan, site)
    received = open_final_model(site)
    opened = open_model(str(folder), "cpu")
    assert opened.labels == plan.labels
    weight = state["classifier.weight"].reshape(3, 2, 3)
    centered = (weight - weight.mean(dim=2, keepdim=True)).reshape(3, 6)
    assert torch.allclose(received.head["classifier.weight"], centered, atol=1e-6)
    adapted = adapt_site(site)
    assert open_model(str(adapted.folder), "cpu").labels == plan.labels

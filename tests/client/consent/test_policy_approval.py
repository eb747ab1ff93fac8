from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cotune.client.consent.approvals import Approvals
from cotune.client.consent.plan_summary import diff_plans, summarize_plan
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import PolicyError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]

EACH = change_policy(Policy.permissive(), {"training.approval": "each"})


def test_nothing_is_touched_for_a_plan_that_nobody_has_approved(
    make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., State], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(privacy={"epsilon": 2.0, "delta": 1e-3})
    site = make_site(policy=EACH)
    state = state_for(plan)

    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("no record is read")

    with monkeypatch.context() as patched:
        patched.setattr(Site, "dataset", untouched)
        with fails_with("policy.training.approval", str(site.folder), plan.plan_id[:12]) as declined:
            train_round(plan, site, 1, state)
    assert declined.value.public == "declined: its rule training.approval does not allow this plan"
    assert not site.ledger_file.exists()
    assert Approvals(site).pending() == [plan]
    Approvals(site).approve(plan, "by hand")
    assert Approvals(site).pending() == []
    assert train_round(plan, site, 1, state).round == 1  # without a restart


def test_where_nobody_is_to_be_asked(make_plan: MakePlan, make_site: MakeSite) -> None:
    for site, policy in ((make_site(), Policy.permissive()), (make_site("simulated", simulated=True), EACH)):
        Approvals(site).check(make_plan(), policy)
        assert Approvals(site).pending() == []


def test_an_approval_is_for_one_plan_alone(make_plan: MakePlan, make_site: MakeSite) -> None:
    approvals = Approvals(make_site(policy=EACH))
    approvals.approve(make_plan(), "by hand")
    approvals.check(make_plan(), EACH)
    with pytest.raises(PolicyError):
        approvals.check(make_plan(rounds=4), EACH)


def test_approvals_are_kept_in_order_and_once(make_plan: MakePlan, make_site: MakeSite) -> None:
    site = make_site(policy=EACH)
    one = make_plan()
    other = make_plan(rounds=4)
    for plan in (one, other, one):
        Approvals(site).approve(plan, "by hand")
    assert Approvals(site).ids() == [one.plan_id, other.plan_id]
    assert Approvals(site).last() == other
    assert [json.loads(line)["how"] for line in (site.folder / "approved.jsonl").read_text().splitlines()] == ["by hand"] * 2


def test_a_server_cannot_fill_the_disk_with_plans(make_plan: MakePlan, make_site: MakeSite) -> None:
    approvals = Approvals(make_site(policy=EACH))
    for seed in range(25):
        with pytest.raises(PolicyError):
            approvals.check(make_plan(seed=seed), EACH)
    assert len(approvals.pending()) == 20


def test_plans_are_found_by_the_beginning_of_their_ids(make_plan: MakePlan, make_site: MakeSite) -> None:
    approvals = Approvals(make_site(policy=EACH))
    with fails_with("run.no_such_plan"):
        approvals.find()
    plans = [make_plan(seed=seed) for seed in range(2)]
    for plan in plans:
        with pytest.raises(PolicyError):
            approvals.check(plan, EACH)
    assert approvals.find(plans[0].plan_id[:12]) == plans[0]
    with fails_with("run.no_such_plan", plans[1].plan_id[:12]):
        approvals.find()
    for prefix in ("zz", "../x", "*"):
        with fails_with("run.no_such_plan", "0"):
            approvals.find(prefix)
    approvals.approve(plans[0], "by hand")
    assert approvals.find() == plans[1]


def test_plan_changed_on_disk_is_refused(make_plan: MakePlan, make_site: MakeSite) -> None:
    site = make_site(policy=EACH)
    plan = make_plan()
    with pytest.raises(PolicyError):
        Approvals(site).check(plan, EACH)
    [file] = (site.folder / "plans").iterdir()
    file.write_text(make_plan(rounds=9).canonical())
    with fails_with("run.changed_plan"):
        Approvals(site).find(plan.plan_id)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "3"])
def test_a_damaged_list_approves_nothing(make_plan: MakePlan, make_site: MakeSite, content: str) -> None:
    site = make_site(policy=EACH)
    (site.folder / "approved.jsonl").write_text(content)
    with fails_with("run.damaged_document", "approved.jsonl"):
        Approvals(site).check(make_plan(), EACH)


def test_a_plan_in_six_lines(make_plan: MakePlan) -> None:
    lines = summarize_plan(make_plan(privacy={"epsilon": 2.0, "delta": 1e-3}, strategy="fedprox"))
    assert len(lines) == 6
    assert "3 rounds: 3 of head (4 steps, batches of 0.2)" in lines[2]
    assert any("ε = 2 at δ = 0.001" in line for line in lines)
    assert any("examples → mean → proximal" in line for line in lines)
    assert any("NO differential privacy" in line for line in summarize_plan(make_plan()))


def test_what_differs_between_two_plans(make_plan: MakePlan) -> None:
    before = make_plan()
    after = make_plan(privacy={"epsilon": 2.0, "delta": 1e-3}, labels=("bad", "good"))
    lines = diff_plans(before, after)
    assert "labels: ['bad', 'good', 'so'] → ['bad', 'good']" in lines
    assert "privacy: none → absent" in lines
    assert "privacy.epsilon: absent → 2.0" in lines
    assert diff_plans(before, before) == []
    assert not any(line.startswith("model") for line in lines)


def test_a_plan_cannot_hide_on_the_screen_what_it_says(make_plan: MakePlan) -> None:
    before = make_plan()
    after = make_plan(labels=("bad", "go\x1b[2Kod", "s\ro\n"))
    for line in [*summarize_plan(after), *diff_plans(before, after)]:
        assert line.isprintable()
    assert "go\\u001b[2Kod" in summarize_plan(after)[0]

"""The policy overrules the plan: a plan outside it is declined by the name of the rule, before anything is read or charged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cotune.client.consent.policy_check import check_consent
from cotune.client.site import Site
from cotune.client.training import charged_steps, preparation
from cotune.client.training.observe import observe_client
from cotune.client.training.round import train_round
from cotune.errors import PolicyError
from cotune.models.base.lookup import find_base
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, dump_policy
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}


def policy(**tables: dict[str, Any]) -> Policy:
    """A policy that allows everything but what is given."""
    allowed = Policy.permissive()
    given = {name: type(getattr(allowed, name))(**{**dict(getattr(allowed, name)), **rules}) for name, rules in tables.items()}
    return allowed.model_copy(update=given)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # rule -> (policy's tables, plan's)
    "training.record_privacy": ({"training": {"record_privacy": True}}, {"privacy": "none"}),
    "training.tasks": ({"training": {"tasks": ("token-classification",)}}, {}),
    "training.base_models": ({"training": {"base_models": ("00" * 32,)}}, {}),
    "training.units": ({"training": {"units": ("patient_id",)}}, {}),
    "training.train_modes": ({"training": {"train_modes": ("head",)}}, {"train": "lora"}),
    "training.weightings": ({"training": {"weightings": ("uniform",)}}, {}),
    "training.fusions": ({"training": {"fusions": ()}}, {}),
    "training.client_terms": ({"training": {"client_terms": ()}}, {"strategy": "fedprox"}),
    "disclosures.statistics": ({"disclosures": {"statistics": False}}, {"privacy": "none", "strategy": {"fusion": "fisher"}}),
    "training.min_examples": ({"training": {"min_examples": 61}}, {}),
    "training.min_batch": ({"training": {"min_batch": 13}}, {}),
    "training.max_rounds": ({"training": {"max_rounds": 2}}, {}),
    "budget.epsilon_per_run": ({"budget": {"epsilon_per_run": 1.9}}, {}),
    "budget.delta_per_run": ({"budget": {"delta_per_run": 1e-4}}, {}),
}


@pytest.mark.parametrize("rule", CASES)
def test_every_rule_declines_and_nothing_is_spent(
    make_plan: MakePlan,
    make_site: MakeSite,
    state_for: Callable[..., State],
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules, tables = CASES[rule]
    plan = make_plan(**{"privacy": PRIVATE, **tables})
    site = make_site(policy=policy(**rules))
    state = state_for(plan)

    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("a declined plan trains nothing")

    monkeypatch.setattr(charged_steps, "DPSGD", untouched)
    monkeypatch.setattr(preparation, "build_setup", untouched)
    with pytest.raises(PolicyError) as declined:
        train_round(plan, site, 1, state)
    assert declined.value.rule == rule
    assert declined.value.public == f"declined: its rule {rule} does not allow this plan"
    assert not any(character.isdigit() for character in declined.value.public)
    assert site.ledger().charges() == []
    check_consent(plan, Policy.permissive(), 60)  # nothing else was wrong with it


def test_a_policy_that_names_what_the_plan_asks_for_allows_it(make_plan: MakePlan) -> None:
    base = find_base(make_plan().model).content_hash
    plan = make_plan(privacy=PRIVATE, model={"base_hash": base})
    strict = Policy.model_validate(
        {"training": {"base_models": [base], "units": ["record"], "min_examples": 60, "min_batch": 12}}
    )
    check_consent(plan, strict, 60)
    with fails_with("policy.training.base_models", "training.base_models"):
        check_consent(make_plan(privacy=PRIVATE), strict, 60)


def test_a_model_that_is_not_allowed_is_not_even_looked_for(make_plan: MakePlan) -> None:
    plan = make_plan(privacy=PRIVATE, model={"base": "somebody/a-very-large-model", "base_hash": "00" * 32})
    with fails_with("policy.training.base_models", "training.base_models"):
        check_consent(plan, Policy(), 10_000)


def test_rules_about_the_number_of_records_answer_last(make_plan: MakePlan) -> None:
    """Otherwise a plan that is declined anyway would find out, by which rule answers, how many records there are."""
    plan = make_plan(privacy=PRIVATE)
    for rules in ({"max_rounds": 2}, {"fusions": ()}, {"train_modes": ()}):
        broken = policy(training={"min_examples": 100, "min_batch": 100, **rules})
        with pytest.raises(PolicyError) as declined:
            check_consent(plan, broken, 60)
        assert declined.value.rule == f"training.{next(iter(rules))}"


def test_missing_declared_number_is_asked_for_first(make_plan: MakePlan) -> None:
    broken = policy(training={"min_examples": 100}, disclosures={"example_count": "declared"})
    with pytest.raises(PolicyError) as declined:
        check_consent(make_plan(privacy=PRIVATE), broken, 60)
    assert declined.value.rule == "disclosures.declared_examples"


@pytest.mark.parametrize(("delta", "allowed"), [(1e-3, True), (1.6e-3, True), (1.7e-3, False), (1e-2, False)])
def test_a_strict_policy_wants_delta_below_a_tenth_over_n(make_plan: MakePlan, delta: float, allowed: bool) -> None:
    """1/n^1.1 let the promise fail for half a patient: n·δ = .49."""
    rules = policy(budget={"delta_per_run": 0.016, "delta_times_records": 0.1})
    plan = make_plan(privacy={"epsilon": 2.0, "delta": delta})
    if allowed:
        check_consent(plan, rules, 60)
        return
    with pytest.raises(PolicyError) as declined:
        check_consent(plan, rules, 60)
    assert declined.value.rule == "budget.delta_times_records"


def test_the_strict_default_allows_no_model(make_plan: MakePlan) -> None:
    with fails_with("policy.training.base_models", "training.base_models"):
        check_consent(make_plan(privacy=PRIVATE), Policy(), 10_000)


def test_an_own_smaller_epsilon_is_within_the_limit_per_run(make_plan: MakePlan) -> None:
    check_consent(make_plan(privacy=PRIVATE), policy(budget={"epsilon_per_run": 1.0, "own_epsilon": 1.0}), 60)


def test_hours_of_training_are_counted(make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., State]) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=policy(training={"max_hours": 2.0}))
    state = state_for(plan)
    update = train_round(plan, site, 1, state)
    assert update.steps == 4
    [charge] = site.ledger().charges()
    assert charge.seconds > 0
    ledger = site.ledger()
    ledger.settle(ledger.reserve(plan.plan_id, 1, charge.steps, data=charge.data), 0, seconds=2 * 3600)
    with fails_with("policy.training.max_hours", "training.max_hours", "2.0", "2"):
        train_round(plan, site, 2, state)


def test_hours_are_watched_within_a_round(make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., State]) -> None:
    """One round may be made as long as a server likes: the clock is looked at after every step, and what is reserved stays."""
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=policy(training={"max_hours": 1e-9}))
    with fails_with("policy.training.max_hours", "training.max_hours"):
        train_round(plan, site, 1, state_for(plan))
    [charge] = site.ledger().charges()
    assert (charge.state, charge.steps.count) == ("reserved", 4)
    assert not (site.folder / "outbox").exists()


def test_a_round_that_was_stopped_leaves_no_hooks(
    make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., State]
) -> None:
    """The process's model trains for the next organization; that the error is forgotten meanwhile takes nothing from it."""
    plan = make_plan(privacy=PRIVATE)
    kept: list[pytest.ExceptionInfo[PolicyError]] = []
    with pytest.raises(PolicyError) as stopped:
        train_round(plan, make_site(policy=policy(training={"max_hours": 1e-9})), 1, state_for(plan))
    kept.append(stopped)
    del stopped
    with observe_client(lambda *_: kept.clear()):
        assert train_round(plan, make_site(at="another"), 1, state_for(plan)).steps == 4
    assert not kept


def test_a_tighter_policy_holds_for_what_is_finished_too(
    make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., State]
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    state = state_for(plan)
    train_round(plan, site, 1, state)
    (site.folder / "policy.toml").write_text(dump_policy(policy(training={"min_examples": 61})))
    with fails_with("policy.training.min_examples", "training.min_examples"):
        train_round(plan, site, 1, state)


def test_a_delta_for_the_total_that_limits_nothing_is_refused(
    make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., State]
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site(policy=policy(budget={"delta_total": 0.9}))
    with fails_with("privacy.delta_too_large", "budget.delta_total", "0.9", "0.9", "60", "0.017"):
        train_round(plan, site, 1, state_for(plan))
    assert not site.ledger_file.exists()

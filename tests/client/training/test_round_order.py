"""The order of a round: each check refuses in its place, and no record takes part before it is charged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training import charged_steps, preparation, request_context
from cotune.client.training import round as training
from cotune.client.training.checks import request_checks
from cotune.client.training.checks.request_checks import BEFORE_CHARGE, BEFORE_RECORDS, BEFORE_TRAINING, BY_PUBLIC_NUMBER, Check
from cotune.client.training.round import train_round
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.errors import CotuneError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.ledger.ledger import Ledger
from cotune.privacy.policy import Policy

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]

PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}
GROUPS = {
    "BEFORE_RECORDS": training,
    "BY_PUBLIC_NUMBER": training,
    "BEFORE_TRAINING": training,
    "BEFORE_CHARGE": charged_steps,
}  # and where they run
CHECKS = {check.__name__: check for check in (*BEFORE_RECORDS, *BY_PUBLIC_NUMBER, *BEFORE_TRAINING, *BEFORE_CHARGE)}


def without_repeats(events: list[str]) -> list[str]:
    return [event for i, event in enumerate(events) if i == 0 or events[i - 1] != event]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a round, in order: checks, records, the model, charges, and each time records take part in something."""
    seen = list[str]()

    def noting(owner: Any, name: str, event: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def noted(*arguments: Any, **settings: Any) -> Any:
            seen.append(event(*arguments, **settings))
            return original(*arguments, **settings)

        monkeypatch.setattr(owner, name, noted)

    def noted_check(check: Check) -> Check:
        def noted(context: Any) -> None:
            seen.append(check.__name__)
            check(context)

        return noted

    for group, module in GROUPS.items():
        monkeypatch.setattr(module, group, tuple(map(noted_check, getattr(request_checks, group))))
    noting(Site, "counted_dataset", lambda *_: "records are counted")
    noting(Site, "finished_update", lambda *_: "the outbox is read")
    noting(request_context, "load_trained_model", lambda *_: "the model is loaded")
    noting(Ledger, "reserve", lambda *_, purpose, **__: f"charge: {purpose}")
    noting(Ledger, "record_unprotected", lambda self, plan_id, round, what, **_: f"unprotected: {what}")
    noting(Dataset, "label_counts", lambda *_: "labels take part")
    build = preparation.build_setup

    def watched(*arguments: Any, **settings: Any) -> TrainingSetup:
        seen.append("records are encoded")
        setting = build(*arguments, **settings)

        def batches(rows: Any) -> Iterator[Any]:
            seen.append("records take part")
            return iter(setting.batches(rows))

        def alone(row: int) -> Any:
            seen.append("records take part")
            return setting.alone(row)

        return replace(setting, batches=batches, alone=alone)

    monkeypatch.setattr(preparation, "build_setup", watched)
    return seen


CHECKED = [check.__name__ for check in BEFORE_RECORDS]
TELLING = {"disclosures": {"label_histogram": True, "local_metrics": True}}


def test_private_round_charges_before_records_take_part(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, events: list[str]
) -> None:
    plan = make_plan(privacy=PRIVATE, **TELLING)
    train_round(plan, make_site(), 1, state_for(plan))
    assert without_repeats(events) == [
        *("check_round", "check_approval", "check_rules", "check_declared_number", "check_values"),
        *("check_public_number", "records are counted", "check_all_rules", "the outbox is read"),
        *("check_hours", "check_batch", "check_state", "the model is loaded", "check_sent", "records are encoded"),
        *("check_unanswered", "check_budget"),
        *("charge: label histogram", "labels take part"),
        *("charge: local metrics", "records take part"),
        *("charge: training", "records take part"),
    ]


def test_noised_record_count_is_charged_at_first_use(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, events: list[str]
) -> None:
    plan = make_plan(privacy=PRIVATE)
    rules = Policy.permissive()
    counted = {"example_count": "noised", "noise_multiplier": 2.0}  # 30 deviations above a batch: no draw is refused
    noised = rules.model_copy(update={"disclosures": rules.disclosures.model_copy(update=counted)})
    train_round(plan, make_site(policy=noised), 1, state_for(plan))
    first = events.index("charge: example count")
    assert events[: first - 1] == [*CHECKED, "check_public_number"]
    assert "records take part" not in events[: events.index("charge: training")]


def test_plain_round_is_entered_before_records_take_part(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, events: list[str]
) -> None:
    plan = make_plan(disclosures={"local_metrics": True})
    rules = Policy.permissive()
    clear = rules.model_copy(update={"disclosures": rules.disclosures.model_copy(update={"local_metrics": "clear"})})
    train_round(plan, make_site(policy=clear), 1, state_for(plan))
    last = ["unprotected: training", "unprotected: local metrics", "records take part"]
    assert without_repeats(events)[-4:] == ["records are encoded", *last]


# --- every check refuses, and nothing else would have done so at its place


@dataclass(frozen=True)
class Case:
    """A request that one check refuses.

    Attributes:
        plan: Tables of its plan.
        policy: (table, key) -> value, in a policy that allows the rest.
        later: Rules that are added after the same request was answered once.
        rows: Which records the organization holds.
        state: What the server sends in place of the right state.
        request: Further arguments of `train_round`.
        hours: Of training that the plan has taken.
        again: Whether the round was answered before, from another state.
    """

    code: str
    plan: Mapping[str, Any] | None = None
    policy: Mapping[tuple[str, str], Any] | None = None
    later: Mapping[tuple[str, str], Any] | None = None
    rows: range = range(60)
    state: Callable[[State], State] = dict
    request: Mapping[str, Any] | None = None
    hours: float | None = None
    again: bool = False


def infinite(state: State) -> State:
    name = next(iter(state))
    return {**state, name: torch.full_like(state[name], float("inf"))}


def incomplete(state: State) -> State:
    return dict(list(state.items())[1:])


CASES = {
    "check_round": Case("run.wrong_round", request={"admitted": 1}),
    "check_approval": Case("policy.training.approval", policy={("training", "approval"): "each"}),
    "check_rules": Case("policy.training.max_rounds", policy={("training", "max_rounds"): 2}),
    "check_declared_number": Case(
        "policy.disclosures.example_count",
        policy={("disclosures", "example_count"): "declared", ("disclosures", "declared_examples"): 60},
        request={"declarable": (1, 10)},
    ),
    "check_values": Case("run.extreme_values", state=infinite),
    "check_public_number": Case("policy.disclosures.example_count", request={"declarable": (1, 10)}),
    "check_all_rules": Case("policy.training.min_examples", later={("training", "min_examples"): 61}),
    "check_hours": Case("policy.training.max_hours", policy={("training", "max_hours"): 2.0}, hours=2.5),
    "check_batch": Case("data.too_few_records", rows=range(3)),
    "check_state": Case("run.wrong_state", state=incomplete),
    "check_sent": Case("run.wrong_state", request={"sent": {"another": torch.zeros(1)}}),
    "check_unanswered": Case("privacy.answered_round", again=True),
    "check_budget": Case("policy.budget.epsilon_total", policy={("budget", "epsilon_total"): 1.0}),
}


def changed(policy: Policy, rules: Mapping[tuple[str, str], Any] | None) -> Policy:
    tables = policy.model_dump()
    for (table, key), value in (rules or {}).items():
        tables[table][key] = value
    return Policy.model_validate(tables)


Refuse = Callable[[Case], tuple[str, bool, int]]


@pytest.fixture
def refuse(
    make_plan: MakePlan,
    make_site: MakeSite,
    state_for: StateFor,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Refuse:
    """A case -> the code of the refusal ("": it was trained), whether records were read, and how much was charged."""

    def play(case: Case) -> tuple[str, bool, int]:
        plan = make_plan(privacy=PRIVATE, disclosures={"local_metrics": True}, **(case.plan or {}))
        policy = changed(Policy.permissive(), case.policy)
        site = make_site(rows=case.rows, policy=policy)
        state = state_for(plan)
        if case.later or case.again:
            other = {name: tensor + 0.1 for name, tensor in state.items()} if case.again else state
            train_round(plan, site, 1, other)
            site = make_site(rows=case.rows, policy=changed(policy, case.later))
        if case.hours is not None:
            monkeypatch.setattr(Account, "hours", lambda self: case.hours)
        before = charges(site)
        read = list[bool]()
        count = Site.counted_dataset
        monkeypatch.setattr(Site, "counted_dataset", lambda self, plan: (read.append(True), count(self, plan))[1])
        try:
            train_round(plan, site, 1, case.state(state), **(case.request or {}))
        except CotuneError as error:
            return error.code, bool(read), charges(site) - before
        except KeyError:  # what a missing check leads to
            return "KeyError", bool(read), charges(site) - before
        return "", bool(read), charges(site) - before

    return play


def charges(site: Site) -> int:
    return len(site.ledger().charges()) if site.ledger_file.exists() else 0


@pytest.mark.parametrize("name", CHECKS)
def test_check_refuses_in_its_place(name: str, refuse: Refuse) -> None:
    records_are_read = CHECKS[name] not in BEFORE_RECORDS
    assert refuse(CASES[name]) == (CASES[name].code, records_are_read, 0)


@pytest.mark.parametrize("name", CHECKS)
def test_missing_check_would_show(name: str, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, module in GROUPS.items():
        kept = tuple(check for check in getattr(request_checks, group) if check.__name__ != name)
        monkeypatch.setattr(module, group, kept)
    records_are_read = CHECKS[name] not in BEFORE_RECORDS
    assert refuse(CASES[name]) != (CASES[name].code, records_are_read, 0)

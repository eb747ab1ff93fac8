"""A promise to persons at an organization: its policy allows the unit, its column says whose records are, its ledger knows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.client.consent.preflight import run_preflight
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.data.config import DataConfig
from cotune.data.dataset import write_manifest
from cotune.errors import PolicyError
from cotune.models.trainable import State
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, TrainingRules, dump_policy
from tests.support.failures import fails_with
from tests.support.sites import EXAMPLES

MakePlan = Callable[..., Plan]
PRIVATE = {"epsilon": 4.0, "delta": 1e-3}
PERSONS = {**PRIVATE, "unit": "patient_id", "max_records": 2}
PEOPLE = 20


@pytest.fixture
def site(make_site: Callable[..., Site], records: Path, tmp_path: Path) -> Site:
    """Of 20 people, called pid there, each with three records."""
    lines = records.read_text(encoding="utf-8").splitlines()
    file = tmp_path / "people.csv"
    file.write_text(
        "\n".join(["pid," + lines[0], *(f"{i % PEOPLE},{line}" for i, line in enumerate(lines[1:]))]), encoding="utf-8"
    )
    made = make_site()
    config = DataConfig(source=str(file), unit="pid")
    write_manifest(made.folder / "data.json", config, [(None, list(range(EXAMPLES)))])
    return made


def allow(site: Site, *units: str) -> None:
    policy = Policy.permissive()
    training = TrainingRules(**{**dict(policy.training), "units": units})
    (site.folder / "policy.toml").write_text(dump_policy(policy.model_copy(update={"training": training})))


def test_persons_are_charged_and_counted(site: Site, make_plan: MakePlan, state_for: Callable[..., State]) -> None:
    plan = make_plan(privacy=PERSONS)
    allow(site, "patient_id")
    assert run_preflight(plan, site).declined is None
    update = train_round(plan, site, 1, state_for(plan))
    (data,) = site.ledger().data_sets()
    assert (data.unit, data.records) == ("patient_id", PEOPLE)
    assert update.examples <= PEOPLE
    assert {c.purpose for c in site.ledger().charges()} >= {"training"}


@pytest.mark.parametrize(("allowed", "privacy"), [((), PRIVATE), (("patient_id",), PRIVATE), (("record",), PERSONS)])
def test_a_policy_says_whom_a_plan_may_promise_to(
    site: Site, make_plan: MakePlan, state_for: Callable[..., State], allowed: tuple[str, ...], privacy: dict[str, object]
) -> None:
    plan = make_plan(privacy=privacy)
    allow(site, *allowed)
    with pytest.raises(PolicyError) as declined:
        train_round(plan, site, 1, state_for(plan))
    assert declined.value.rule == "training.units"
    assert site.ledger().charges() == []


@pytest.mark.parametrize("order", [(PERSONS, PRIVATE), (PRIVATE, PERSONS)])
def test_the_same_records_are_not_charged_under_two_units(
    site: Site, make_plan: MakePlan, state_for: Callable[..., State], order: tuple[dict[str, object], ...]
) -> None:
    first, second = (make_plan(privacy=privacy) for privacy in order)
    train_round(first, site, 1, state_for(first))
    charges = site.ledger().charges()
    with fails_with("privacy.mixed_units"):
        train_round(second, site, 1, state_for(second))
    assert run_preflight(second, site).declined
    assert site.ledger().charges() == charges


def test_a_site_that_names_no_column_is_told_so(make_site: Callable[..., Site], make_plan: MakePlan) -> None:
    with fails_with("data.missing_unit", "data.unit"):
        run_preflight(make_plan(privacy=PERSONS), make_site())

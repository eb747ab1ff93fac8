from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cotune.client.consent.preflight import run_preflight
from cotune.client.noise_calibration import get_budget, noise_multiplier
from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.data.config import DataConfig
from cotune.data.dataset import DatasetManifest, FileSlice
from cotune.plan.plan import Plan
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.policy import Policy, change_policy
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3}
STAGES = [{"mode": mode, "rounds": 1, "local": {"batch_size": 0.1}} for mode in ("head", "lora", "full")]


def test_every_stage_is_tried_and_nothing_is_charged(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = make_plan(privacy=PRIVATE, train=STAGES)
    site = make_site()
    found = run_preflight(plan, site)
    assert isinstance(plan.privacy, RecordPrivacy)
    policy = Policy.permissive()
    sigma = noise_multiplier(plan, policy, get_budget(plan.privacy, policy, 60), 60, 1)
    assert (found.declined, found.noise_multiplier, found.epsilon, found.delta) == (None, sigma, 2.0, 1e-3)
    assert (found.organization, found.examples, found.device, found.epsilon_spent) == ("clinic", 60, "cpu", 0.0)
    assert [(s.mode, s.rounds, s.steps, s.batch) for s in found.stages] == [(m, 1, 4, 6.0) for m in ("head", "lora", "full")]
    for stage in found.stages:
        assert stage.gradient_error < 1e-5
        assert 0 < stage.seconds < 60
        assert stage.peak_memory_bytes > 2**20
    assert site.ledger().charges() == []
    assert not (site.folder / "outbox").exists()


def test_a_declined_plan_is_tried_all_the_same(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Anyone who is to change a rule wants to know for what: every rule, and the same figures as without them."""
    plan = make_plan(privacy={"epsilon": 8.0, "delta": 1e-3}, train=STAGES[:2])
    strict = change_policy(
        Policy(), {"disclosures.example_count": "exact", "budget.epsilon_total": 1e6, "budget.delta_total": 1e-3}
    )
    found = run_preflight(plan, make_site(policy=strict))
    allowed = run_preflight(plan, make_site(at="free"))
    rules = [broken.rule for broken in found.broken]
    assert {"training.base_models", "training.units", "budget.epsilon_per_run", "training.min_examples"} <= set(rules)
    assert found.declined is not None
    assert rules[0] in found.declined
    assert (found.epsilon, found.delta, found.noise_multiplier) == (8.0, 1e-3, allowed.noise_multiplier)
    assert [(s.mode, s.steps, s.batch) for s in found.stages] == [(s.mode, s.steps, s.batch) for s in allowed.stages]
    assert len(found.stages) == 2


def test_a_model_that_is_not_allowed_is_not_fetched_to_be_tried(make_plan: MakePlan, make_site: MakeSite) -> None:
    plan = make_plan(privacy=PRIVATE)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"base": "nobody/no-model"})})
    found = run_preflight(plan, make_site(policy=change_policy(Policy.permissive(), {"training.base_models": []})))
    assert [broken.rule for broken in found.broken] == ["training.base_models"]
    assert (found.epsilon, found.stages) == (2.0, ())


def test_a_plan_that_does_not_fit_into_the_rest_is_declined(make_plan: MakePlan, make_site: MakeSite) -> None:
    allowed = Policy.permissive()
    tight = allowed.model_copy(update={"budget": allowed.budget.model_copy(update={"epsilon_total": 1.0})})
    found = run_preflight(make_plan(privacy=PRIVATE), make_site(policy=tight))
    assert found.declined is not None
    assert "budget.epsilon_total: the plan asks for ε = 2 in 3 rounds, and 1.00 of the total 1 are left" in found.declined


def test_a_plan_without_privacy_is_only_judged(make_plan: MakePlan, make_site: MakeSite) -> None:
    found = run_preflight(make_plan(privacy="none"), make_site())
    assert (found.declined, found.epsilon, found.stages) == (None, None, ())


def test_a_plan_without_labels_cannot_be_checked(make_plan: MakePlan, make_site: MakeSite) -> None:
    with fails_with("plan.no_labels"):
        run_preflight(make_plan(privacy=PRIVATE, labels=()), make_site())


def test_the_model_is_as_it_was(make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., Any]) -> None:
    """A check before joining does not leave noise in the model that the process keeps."""
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    before = state_for(plan)
    run_preflight(plan, site)
    after = state_for(plan)
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_unknown_classes_are_named_to_the_organization(make_plan: MakePlan, make_site: MakeSite) -> None:
    """In training they could not be: whether it fails would tell the server of single records."""
    found = run_preflight(make_plan(privacy=PRIVATE, labels=("bad", "good", "other")), make_site())
    [warning] = found.warnings
    assert "1 classes of the records are not among the plan's (bad, good, other)" in warning
    assert (found.declined, len(found.stages)) == (None, 1)
    assert run_preflight(make_plan(privacy=PRIVATE), make_site()).warnings == ()


def test_a_plan_that_has_none_of_the_labels_here_is_declined(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Labels of another export (yes and no for true and false) are other classes; 1.0 for 1, or True for true, is none."""
    site = make_site(policy=Policy.permissive(examples=60))
    source = site.folder / "records.csv"
    for labels, usable in ((("yes", "no"), 0), (("yes", "true"), 1), ((" True", "FALSE"), 2)):
        source.write_text(f"text,label\na tree,{labels[0]}\nthe road,{labels[1]}\n", encoding="utf-8")
        plan = make_plan(privacy=PRIVATE, labels=("true", "false"), data={"source": str(source)})
        unknown = left_out(site, plan, DataConfig(source=str(source))).get("label unknown to the plan", 0)
        found = run_preflight(plan, site)
        assert unknown == 2 - usable
        assert any("not one record can be learned from" in problem for problem in found.problems) is (usable == 0)
        assert (found.declined is not None) is (usable == 0)


def test_a_plan_that_ran_here_is_not_promised_again(
    make_plan: MakePlan, make_site: MakeSite, state_for: Callable[..., Any]
) -> None:
    plan = make_plan(privacy=PRIVATE)
    site = make_site()
    for round in (1, 2):
        train_round(plan, site, round, state_for(plan))
    found = run_preflight(plan, site)
    assert found.declined is not None
    assert "this plan has run here already (rounds 1–2)" in found.declined
    assert run_preflight(make_plan(privacy=PRIVATE, seed=8), site).declined is None


LEFT_OUT = """text,label,pid
a tree,good,anna
"  ",good,anna
a table,,anna
the tree,never heard of,carl
A tree.,good,anna
the table,bad,bert
the table,so,bert
too,many,fields,here
is it,so,
it is,so,anna
so it is,so,anna
"""


def left_out(site: Site, plan: Plan, config: DataConfig) -> dict[str, int]:
    document = DatasetManifest(data=config, portions=(FileSlice(path=None),))
    (site.folder / "data.json").write_text(document.model_dump_json())
    return dict(run_preflight(plan, site).left_out)


def test_the_organization_sees_what_is_left_out_and_why(make_plan: MakePlan, make_site: MakeSite) -> None:
    """Each row that contributes nothing, by the first reason that there is; nobody else is told."""
    site = make_site(policy=Policy.permissive(examples=60))
    source = site.folder / "records.csv"
    source.write_text(LEFT_OUT, encoding="utf-8")
    first = {"blank text": 1, "missing label": 1, "unreadable": 1, "label unknown to the plan": 1}
    records = make_plan(privacy=PRIVATE, data={"source": str(source)})
    assert left_out(site, records, DataConfig(source=str(source))) == first | {"copies that differ": 4}
    assert left_out(site, records, DataConfig(source=str(source), deduplicate=True)) == first | {
        "conflicting labels": 2,
        "copies that differ": 2,  # as they are spelled
    }
    people = make_plan(privacy={**PRIVATE, "unit": "pid", "max_records": 2}, data={"source": str(source)})
    assert left_out(site, people, DataConfig(source=str(source), unit="pid")) == first | {
        "missing pid": 1,
        "more than max_records of their unit": 2,
    }


def test_copies_of_a_record_count_once(make_plan: MakePlan, make_site: MakeSite) -> None:
    site = make_site(policy=Policy.permissive(examples=60))
    source = site.folder / "records.csv"
    source.write_text("text,label\na tree,good\na tree,good\nthe tree,so\n", encoding="utf-8")
    plan = make_plan(privacy=PRIVATE, data={"source": str(source)})
    assert left_out(site, plan, DataConfig(source=str(source))) == {"copies": 1}
    assert left_out(site, plan, DataConfig(source=str(source), deduplicate=True)) == {"duplicate": 1}


def test_a_site_without_a_usable_record_is_told_so(make_plan: MakePlan, make_site: MakeSite) -> None:
    site = make_site(policy=Policy.permissive(examples=60))
    source = site.folder / "records.csv"
    source.write_text("text,label\n,good\n", encoding="utf-8")
    plan = make_plan(privacy=PRIVATE, data={"source": str(source)})
    assert left_out(site, plan, DataConfig(source=str(source))) == {"blank text": 1}
    found = run_preflight(plan, site)
    assert found.examples == 0
    assert any("no record is usable" in warning for warning in found.warnings)
    few = make_site(policy=Policy.permissive())
    assert left_out(few, plan, DataConfig(source=str(source))) == {"blank text": 1}  # said also where nothing can be tried

"""What is said before the schemas are imported is what they would say, and never more than they would."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from cotune.models.errors import PlanError
from cotune.plan import reference
from cotune.plan.document import overrides_alone, preset_names, preset_text, read_document
from cotune.plan.early import check_keys, check_rules
from cotune.plan.known_keys import PLAN, POLICY
from cotune.plan.load import load_plan
from cotune.privacy.policy import Policy, changed_policy, dump_policy

OWN = ['data.source="x"', 'model.base="m"']


def test_the_keys_are_those_of_the_schemas() -> None:
    """`python -m cotune.plan.reference docs` writes them."""
    written: dict[str, Any] = {}
    exec(reference.known_keys(), written)
    assert (written["PLAN"], written["POLICY"]) == (PLAN, POLICY)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_passes(name: str) -> None:
    check_keys(tomllib.loads(preset_text(name)), "plan")


def test_the_policy_passes() -> None:
    check_keys(tomllib.loads(dump_policy(Policy())), "policy")
    check_rules(["training.min_examples"])


@pytest.mark.parametrize(
    "override",
    [
        "local.learnin_rate=0.1",
        "learning-rate=3",
        "privacy.epsilom=3",
        "epsilon=3",
        "zzz=1",
        "locl.steps=3",
        "train=heads",
        "privacy=nonee",
        "task=text",
        "model.pooling=max",
        "simulation.pooled.stepss=3",
    ],
)
def test_a_slip_is_told_in_the_words_of_the_schema(override: str) -> None:
    with pytest.raises(PlanError) as late:
        load_plan("text", [*OWN, override])
    with pytest.raises(PlanError) as early:
        check_keys(read_document("text", [*OWN, override]), "plan")
    assert str(early.value).split(";")[0] == str(late.value).split(";")[0]
    if "unknown key" in str(late.value):
        assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "override",
    [
        "strategy=fedadam",
        'strategy={recipe="fedadam", lr=0.1}',
        "strategy.fusion.density=0.3",
        "class_weights.anything=2",
        'privacy.epsilon="3"',
        'train=[{mode="head", rounds=2, local={steps=3}}]',
        "train.0.rounds=3",
        "local.epochs=1",
        "privacy=none",
        "simulation.baselines=[]",
    ],
)
def test_what_may_be_right_passes(override: str) -> None:
    """What is not decided by names alone is left to the schema."""
    check_keys(overrides_alone([override]), "plan")


def test_a_rule_that_is_none_is_told_in_the_same_words() -> None:
    for name in ("training.min_example", "min_examples", "zzz"):
        with pytest.raises(PlanError) as late:
            changed_policy(Policy(), {name: 3})
        with pytest.raises(PlanError) as early:
            check_rules([name])
        assert str(early.value) == str(late.value)

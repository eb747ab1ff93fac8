"""What can be checked without the parts of a strategy is checked first, in the same words, and without importing PyTorch."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from cotune.errors import PlanError
from cotune.plan.load import check_key, check_tables, load_plan, parse_plan, preset_names, preset_text, read_document
from cotune.privacy.policy import Policy, change_policy, check_rules

OWN = ['data.source="x"', 'model.base="m"']
CONFIGURATION = (
    *("cotune.plan.load", "cotune.plan.reference", "cotune.plan.plan"),
    *("cotune.plan.tables", "cotune.models.config", "cotune.privacy.config", "cotune.privacy.policy"),
    *("cotune.strategies", "cotune.strategies.catalog", "cotune.strategies.compatibility", "cotune.strategies.config"),
)
SLIPS = (
    *("local.learnin_rate=0.1", "learning-rate=3", "privacy.epsilom=3", "epsilon=3", "zzz=1", "locl.steps=3", "train=heads"),
    *("privacy=nonee", "task=text", "model.pooling=max", "simulation.pooled.stepss=3", "local.steps=0", "privacy.epsilon=-1"),
    *("privacy.unit=patient", "local.learning_rate=nan", "rounds=true", "simulation.clients=1e9", "model.max_length=0"),
)


def test_tables_load_nothing_heavy() -> None:
    """All in one fresh interpreter: where anything heavy is loaded, the first table that did is named."""
    code = f"""
import importlib, sys
for name in {CONFIGURATION!r}:
    importlib.import_module(name)
    print(name, *sorted({{"torch", "transformers", "opacus", "flwr", "pandas", "scipy", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.splitlines()) == CONFIGURATION


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_passes(name: str) -> None:
    check_tables(tomllib.loads(preset_text(name)), partial=True)


@pytest.mark.parametrize("override", SLIPS)
def test_a_slip_is_told_in_the_words_of_the_whole_plan(override: str) -> None:
    table = read_document("text", [*OWN, override])
    with pytest.raises(PlanError) as late:
        parse_plan(table)
    with pytest.raises(PlanError) as early:
        check_tables(table)
    assert str(early.value) == str(late.value)


def test_a_slip_is_found_before_pytorch_is_imported() -> None:
    """All in one fresh interpreter: what is told before the first slip that imports PyTorch."""
    code = f"""
import sys
from cotune import CotuneError
from cotune.plan.load import load_plan
for slip in {SLIPS!r}:
    try:
        load_plan("text", [*{OWN!r}, slip])
    except CotuneError:
        if "torch" not in sys.modules:
            print(slip)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.splitlines()) == SLIPS


@pytest.mark.parametrize(
    "override",
    [
        "strategy=fedadam",
        'strategy={recipe="fedadam", lr=0.1}',
        "strategy.fusion.density=0.3",
        'privacy.epsilon="3"',
        'train=[{mode="head", rounds=2, local={steps=3}}]',
        "privacy=none",
        "simulation.baselines=[]",
    ],
)
def test_what_may_be_right_passes(override: str) -> None:
    check_tables(read_document("text", [*OWN, override]))


def test_absent_keys_are_nothing_wrong_in_a_part_of_a_plan() -> None:
    check_tables({"rounds": 3}, partial=True)
    with pytest.raises(PlanError):
        check_tables({"rounds": 3})
    with pytest.raises(PlanError):
        check_tables({"rounds": -3}, partial=True)


@pytest.mark.parametrize("key", ["privacy.epsilon", "strategy.fusion.anything", "class_weights.anything", "train.0.rounds"])
def test_a_key_of_a_plan_is_known(key: str) -> None:
    check_key(key)


@pytest.mark.parametrize("key", ["privacy.epsilom", "locl.steps", "zzz", "local.steps.more"])
def test_a_key_of_no_plan_is_refused(key: str) -> None:
    with pytest.raises(PlanError):
        check_key(key)


def test_a_rule_that_is_none_is_told_in_the_same_words() -> None:
    check_rules(["training.min_examples"])
    for name in ("training.min_example", "min_examples", "zzz"):
        with pytest.raises(PlanError) as late:
            change_policy(Policy(), {name: 3})
        with pytest.raises(PlanError) as early:
            check_rules([name])
        assert str(early.value) == str(late.value)


def test_a_plan_of_nothing_but_an_unknown_key_names_it() -> None:
    with pytest.raises(PlanError, match="zzz"):
        load_plan("text", [*OWN, "zzz=1"])

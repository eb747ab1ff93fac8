from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.plan.reference import explain_key, list_keys
from cotune.privacy.policy import Policy


def names_in(value: object, path: str = "") -> set[str]:
    """The keys of a plan as it is written out; of its lists of tables, those of every table."""
    if isinstance(value, dict):
        below = [names_in(inner, f"{path}.{key}" if path else key) for key, inner in value.items()]
        return set().union(*below, {path} - {""})
    if isinstance(value, list):
        return {path}.union(*(names_in(each, path) for each in value if isinstance(each, dict)))
    return {path}


def test_every_key_that_a_plan_has_is_listed_once() -> None:
    stages = [{"mode": "head", "rounds": 1}, {"mode": "lora", "rounds": 1}]
    full = {"model": {"base": "x"}, "data": {"source": "y"}, "client_privacy": {"clip_norm": 1.0}, "simulation": {"pooled": {}}}
    strategy = {"strategy": {"server_optimizer": "sgd", "weighting": "uniform"}}
    written = names_in(parse_plan({**full, **strategy, "train": stages}).model_dump(mode="json"))
    listed = [key.name for key in list_keys(Plan)]
    assert len(listed) == len(set(listed))
    parameters = {
        name for name in written if name.startswith("strategy.") and name.count(".") == 2
    }  # of parts: `strategies NAME`
    assert written - parameters <= set(listed)


@pytest.mark.parametrize("document", [Plan, Policy])
def test_every_key_says_what_it_means(document: type[Plan] | type[Policy]) -> None:
    for key in list_keys(document):
        assert key.meaning, key.name
        assert key.type, key.name
        assert key.default, key.name


@given(st.sampled_from(list_keys(Plan)))
def test_a_key_is_found_by_its_name_and_by_its_end(key: object) -> None:
    name = getattr(key, "name")  # noqa: B009
    assert explain_key(name, Plan)[0] == key
    assert key in explain_key(name.rpartition(".")[2], Plan) or name.rpartition(".")[2] in {k.name for k in list_keys(Plan)}


def test_a_table_is_explained_with_its_keys() -> None:
    found = [key.name for key in explain_key("lora", Plan)]
    assert found[0] == "lora"
    assert set(found[1:]) == {key.name for key in list_keys(Plan) if key.name.startswith("lora.")}


@pytest.mark.parametrize(
    ("name", "meant"), [("epsilom", "privacy.epsilon"), ("privacy.epsilom", "privacy.epsilon"), ("stpes", "local.steps")]
)
def test_a_key_that_does_not_exist(name: str, meant: str) -> None:
    with pytest.raises(PlanError, match=meant):
        explain_key(name, Plan)

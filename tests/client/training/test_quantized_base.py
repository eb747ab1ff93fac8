"""An organization's round on a base model in 4 bits: what it lacks, or has otherwise, costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.models.base.lookup import find_base
from cotune.models.base.quantized_layers import check_bitsandbytes
from cotune.models.trainable import State, get_model
from cotune.plan.plan import Plan
from tests.support.failures import fails_with

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]
PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}


@pytest.fixture
def plan(make_plan: MakePlan, base_model: Callable[[str], Path]) -> Plan:
    model: dict[str, Any] = {"base": str(base_model("llama")), "quantization": "nf4"}
    return make_plan(train="lora", privacy=PRIVATE, model=model)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """No model is kept in memory, and nothing about the package."""
    for known in (get_model, check_bitsandbytes):
        known.cache_clear()
    yield
    for known in (get_model, check_bitsandbytes):
        known.cache_clear()


def test_a_round_trains_adapters_and_is_charged(plan: Plan, make_site: MakeSite, state_for: StateFor) -> None:
    site = make_site(simulated=True)
    update = train_round(plan, site, 1, state_for(plan))
    assert any(update.delta[name].any() for name in update.delta if ".lora_B." in name)
    assert not any(name.endswith("_proj.weight") for name in update.delta)
    assert len(site.ledger().spent()) == 1


def test_nothing_is_charged_without_bitsandbytes(
    plan: Plan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    site = make_site()
    state = state_for(plan)
    get_model.cache_clear()
    check_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with fails_with("model.no_bitsandbytes", "cotune[qlora]"):
        train_round(plan, site, 1, state)
    assert site.ledger().spent() == []


def test_hash_of_other_settings_is_declined(plan: Plan, make_site: MakeSite, state_for: StateFor) -> None:
    site = make_site()
    full = plan.model.model_copy(update={"quantization": "none"})
    mixed = plan.model.model_copy(update={"base_hash": find_base(full).content_hash})
    with fails_with("model.other_quantization", "none", "nf4"):
        train_round(plan.model_copy(update={"model": mixed}), site, 1, state_for(plan))
    assert site.ledger().spent() == []

"""The version of the state that an organization holds: what is built on it, and what counts as lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from cotune.client.held_state import complete, hold, release
from cotune.client.site import Site
from cotune.plan.plan import Plan
from cotune.protocol.messages import Request, state_digest
from cotune.protocol.refusals import VersionLost

BEFORE = {"w": torch.arange(4.0), "b": torch.ones(2)}
CHANGE = {"w": torch.full((4,), 0.5)}
AFTER = {"w": torch.arange(4.0) + 0.5, "b": torch.ones(2)}


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(rounds=5, wire_down="int8")


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


def request(plan: Plan, state: Mapping[str, Tensor], round: int = 2) -> Request:
    return Request(plan.canonical(), round, "clinic", state)


def building(plan: Plan, *, versions: tuple[str, ...] = (), changes: tuple[Mapping[str, Tensor], ...] = (CHANGE,)) -> Request:
    found = versions or (state_digest(BEFORE), state_digest(AFTER))
    return replace(request(plan, {}, 3), versions=found, changes=changes)


def file_of(plan: Plan, site: Site) -> Path:
    return site.kept_folder(plan.plan_id, "received") / "state.safetensors"


def test_a_request_builds_on_what_the_last_one_held(plan: Plan, site: Site) -> None:
    hold(request(plan, BEFORE), plan, site)
    built = complete(building(plan), plan, site)
    assert state_digest(built.state) == state_digest(AFTER)
    assert (built.versions, built.changes) == ((), ())


def test_a_request_that_comes_again_builds_on_its_own_result(plan: Plan, site: Site) -> None:
    """As after a crash: the state was stored before the round was trained."""
    hold(request(plan, BEFORE), plan, site)
    hold(complete(building(plan), plan, site), plan, site)
    assert state_digest(complete(building(plan), plan, site).state) == state_digest(AFTER)


def test_the_newest_of_several_versions_is_built_on(plan: Plan, site: Site) -> None:
    """Rounds without a change have one digest before and after."""
    hold(request(plan, BEFORE), plan, site)
    asked = building(
        plan, versions=(64 * "0", state_digest(BEFORE), state_digest(BEFORE), state_digest(AFTER)), changes=({}, {}, CHANGE)
    )
    assert state_digest(complete(asked, plan, site).state) == state_digest(AFTER)


def test_whole_requests_are_left_as_they_are(plan: Plan, site: Site) -> None:
    whole = request(plan, BEFORE)
    assert complete(whole, plan, site) is whole


@pytest.mark.parametrize(
    "changes",
    [
        {"w": torch.full((4,), 0.25)},  # another result
        {"w": torch.full((1,), 0.5)},  # would be broadcast
        {"w": torch.full((4,), 0.5), "c": torch.ones(2)},  # not in the state
        {},
    ],
)
def test_what_builds_another_state_is_not_used(plan: Plan, site: Site, changes: dict[str, Tensor]) -> None:
    hold(request(plan, BEFORE), plan, site)
    with pytest.raises(VersionLost):
        complete(building(plan, changes=(changes,)), plan, site)


@pytest.mark.parametrize("held", [None, AFTER | {"b": torch.zeros(2)}], ids=["nothing", "another"])
def test_a_version_that_the_request_does_not_name_is_lost(plan: Plan, site: Site, held: dict[str, Tensor] | None) -> None:
    if held is not None:
        hold(request(plan, held), plan, site)
    with pytest.raises(VersionLost):
        complete(building(plan), plan, site)


@given(content=st.binary(max_size=200) | st.integers(0, 400).map(lambda count: save(dict(BEFORE))[:count]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_the_file_are_a_lost_version(plan: Plan, site: Site, content: bytes) -> None:
    file = file_of(plan, site)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    if content != save(dict(BEFORE)):
        with pytest.raises(VersionLost):
            complete(building(plan), plan, site)


@pytest.mark.parametrize("kind", [torch.int32, torch.bfloat16, torch.float64])
def test_tensors_of_another_type_are_a_lost_version(plan: Plan, site: Site, kind: torch.dtype) -> None:
    """Also where their bytes are those of the version."""
    file = file_of(plan, site)
    file.parent.mkdir(parents=True)
    same_size = kind == torch.int32
    file.write_bytes(save({name: t.view(kind) if same_size else t.to(kind) for name, t in BEFORE.items()}))
    with pytest.raises(VersionLost):
        complete(building(plan), plan, site)


def test_nothing_is_held_that_no_request_builds_on(make_plan: Callable[..., Plan], plan: Plan, site: Site) -> None:
    whole = make_plan(rounds=5)
    hold(request(whole, BEFORE), whole, site)
    hold(request(plan, BEFORE, plan.rounds), plan, site)
    assert not (site.folder / "kept").exists()


def test_one_version_is_held_until_the_run_is_over(plan: Plan, site: Site) -> None:
    for state in (BEFORE, AFTER):
        hold(request(plan, state), plan, site)
    assert [file.name for file in file_of(plan, site).parent.iterdir()] == ["state.safetensors"]
    release(plan, site)
    release(plan, site)
    assert not file_of(plan, site).exists()

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cotune.client.site import Site
from cotune.privacy.accounting.composition import Steps
from cotune.strategies.types import Update
from tests.support.failures import fails_with

MakeSite = Callable[..., Site]


def update(**changes: Any) -> Update:
    delta = {"head.weight": torch.tensor([[1.5, -0.25], [float(2**-30), 0.0]]), "head.bias": torch.ones(2)}
    return Update(
        **({"organization": "clinic", "round": 4, "delta": delta, "examples": 60, "steps": 7, "received": "state"} | changes)
    )


def outbox(site: Site) -> Path:
    return site.folder / "outbox" / "update.safetensors"


def test_a_site_says_who_it_is(make_site: MakeSite) -> None:
    site = make_site("clinic", simulated=True)
    assert site.organization == "clinic"
    assert site.file.simulated
    assert site.file.device == "cpu"
    assert len(site.dataset(("bad", "good", "so"))) == 60


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"organization": "a", "simulatd": true}', '{"organization": 3}'])
def test_a_folder_that_is_no_site(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "site.json").write_text(content)
    with fails_with("data.not_a_site", "site.json"):
        Site(tmp_path)


def test_a_site_is_not_simulated_unless_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "site.json").write_text('{"organization": "a"}')
    assert not Site(tmp_path).file.simulated


@pytest.mark.parametrize("epsilon", [None, 0.0, 2.5])
def test_a_kept_update_comes_back(make_site: MakeSite, epsilon: float | None) -> None:
    site = make_site()
    sent = update(epsilon=epsilon)
    site.store_update(sent, "plan")
    got = Site(site.folder).finished_update("plan", 4, "state")  # by another process
    assert got is not None
    assert (got.organization, got.round, got.examples, got.steps, got.epsilon) == ("clinic", 4, 60, 7, epsilon)
    assert got.delta.keys() == sent.delta.keys()
    for name, tensor in sent.delta.items():
        assert got.delta[name].dtype == torch.float32
        assert torch.equal(got.delta[name], tensor)


def test_a_transposed_tensor_is_kept_as_it_is(make_site: MakeSite) -> None:
    site = make_site()
    tensor = torch.arange(6.0).reshape(2, 3).T
    site.store_update(update(delta={"w": tensor}), "plan")
    got = site.finished_update("plan", 4, "state")
    assert got is not None
    assert torch.equal(got.delta["w"], tensor)


@pytest.mark.parametrize("request_", [("other", 4, "state"), ("plan", 3, "state"), ("plan", 4, "other")])
def test_another_request_gets_nothing(make_site: MakeSite, request_: tuple[str, int, str]) -> None:
    site = make_site()
    assert site.finished_update("plan", 4, "state") is None
    site.store_update(update(), "plan")
    assert site.finished_update(*request_) is None
    assert site.finished_update("plan", 4, "state") is not None


def test_only_the_last_update_is_kept(make_site: MakeSite) -> None:
    site = make_site()
    site.store_update(update(), "plan")
    site.store_update(update(round=5), "plan")
    assert site.finished_update("plan", 4, "state") is None
    assert site.finished_update("plan", 5, "state") is not None
    assert [file.name for file in outbox(site).parent.iterdir()] == ["update.safetensors"]


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def garbage(file: Path) -> None:
    file.write_bytes(b"\xff" * 64)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def without_description(file: Path) -> None:
    save_file({"w": torch.ones(1)}, file)


def half_described(file: Path) -> None:
    save_file({"w": torch.ones(1)}, file, metadata={"update": '{"plan_id": "plan", "round": 4, "received": "state"}'})


def described_in_riddles(file: Path) -> None:
    save_file({"w": torch.ones(1)}, file, metadata={"update": "["})


@pytest.mark.parametrize("damage", [truncated, garbage, emptied, without_description, half_described, described_in_riddles])
def test_a_damaged_outbox_is_not_trained_over(make_site: MakeSite, damage: Callable[[Path], None]) -> None:
    site = make_site()
    site.store_update(update(), "plan")
    damage(outbox(site))
    with fails_with("run.damaged_document", "update.safetensors"):
        site.finished_update("plan", 4, "state")
    outbox(site).unlink()
    assert site.finished_update("plan", 4, "state") is None


def test_the_ledger_is_the_sites_own(make_site: MakeSite) -> None:
    one = make_site("clinic")
    other = make_site("bank")
    one.ledger().reserve("plan", 1, Steps(1.0, 0.5, 3))
    assert Site(one.folder).ledger().spent() == [Steps(1.0, 0.5, 3)]
    assert other.ledger().spent() == []


def test_a_ledger_that_is_none_stops_everything(make_site: MakeSite) -> None:
    site = make_site()
    (site.folder / "ledger.sqlite").write_text("this is no database, but it is long enough to be taken for one" * 20)
    with fails_with("privacy.unusable_ledger"):
        site.ledger()

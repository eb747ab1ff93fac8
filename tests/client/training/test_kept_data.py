"""What a round keeps of the records for the next one is what a fresh look at them gives, and never that of other records."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.client.training.stage_setup import from_records
from cotune.data import dataset
from cotune.models.encoding import FeatureRows, find_features
from cotune.models.trainable import State
from cotune.plan.plan import Plan

MakePlan = Callable[..., Plan]
MakeSite = Callable[..., Site]
StateFor = Callable[..., State]

PRIVATE = {"epsilon": 2.0, "delta": 1e-3, "clip_norm": 1.0}


def test_rounds_with_and_without_kept_data_are_the_same(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(train="head", rounds=2)
    state = state_for(plan)
    rows = list(reversed(range(40)))
    site = make_site(at="kept", rows=rows)
    kept = [train_round(plan, site, number, state) for number in (1, 2)]
    assert site.counted_dataset(plan) is site.counted_dataset(plan)

    def copied(*given: Any) -> FeatureRows:
        return FeatureRows.of(find_features(*given).copy())

    monkeypatch.setattr(from_records, "find_features", copied)
    site = make_site(at="fresh", rows=rows)
    for number, before in zip((1, 2), kept, strict=True):
        dataset._kept.clear()
        fresh = train_round(plan, site, number, state)
        assert fresh.delta.keys() == before.delta.keys()
        assert all(torch.equal(fresh.delta[name], tensor) for name, tensor in before.delta.items())


@pytest.mark.parametrize("simulated", [False, True])
def test_changed_records_are_charged_as_other_data(
    make_plan: MakePlan, make_site: MakeSite, state_for: StateFor, records: Path, simulated: bool
) -> None:
    """A word of one record is another one: the file is as large as before."""
    plan = make_plan(train="head", privacy=PRIVATE, rounds=2)
    state = state_for(plan)
    site = make_site(simulated=simulated)
    train_round(plan, site, 1, state)
    before = site.counted_dataset(plan)
    lines = records.read_text(encoding="utf-8").splitlines()
    word = next(word for word in ("the", "is", "very", "it") if f" {word} " in f" {lines[1]} ")
    lines[1] = f" {lines[1]}".replace(f" {word} ", f" {word[::-1]} ", 1)[1:]
    time = records.stat().st_mtime_ns + 10**9
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.utime(records, ns=(time, time))
    train_round(plan, site, 2, state)
    first, second = site.ledger().data_sets()
    assert len(site.counted_dataset(plan)) == len(before)
    assert second.shares == {first.fingerprint: first.records - 1}
    assert site.ledger().charges()[-1].data == second.fingerprint


def test_kept_data_sets_are_bounded(make_plan: MakePlan, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan()
    dataset._kept.clear()
    monkeypatch.setattr(dataset._kept, "max_size", 100)
    monkeypatch.setattr(dataset._kept, "max_entries", 4)
    sites = [make_site(f"clinic-{number}", rows=range(number, number + 30)) for number in range(4)]
    for site in sites:
        site.dataset(plan.labels)
    assert sorted(map(len, dataset._kept.values())) == [30, 30, 30]
    small = [make_site(f"small-{number}", rows=range(number, number + 2)) for number in range(6)]
    for site in small:
        site.dataset(plan.labels)
    assert sorted(map(len, dataset._kept.values())) == [2, 2, 2, 2]
    everything = make_site("all", rows=range(60)).dataset(plan.labels)
    monkeypatch.setattr(dataset._kept, "max_size", 10)
    make_site("none", rows=range(1)).dataset(plan.labels)
    assert len(everything) == 60
    assert dataset._kept.size == 1
    assert sorted(map(len, dataset._kept.values())) == [1]

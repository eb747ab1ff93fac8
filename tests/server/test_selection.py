from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cotune.models.errors import PlanError
from cotune.plan.load import parse_plan
from cotune.server.selection import check_sample_size, select
from tests.server.conftest import NewRun

PEOPLE = tuple(f"org-{i}" for i in range(10))


def names(new_run: NewRun, round: int, **changes: Any) -> list[str]:
    return [person.name for person in select(new_run(*PEOPLE, **changes), round)]


def test_everybody_is_asked_by_default(new_run: NewRun) -> None:
    assert names(new_run, 1) == list(PEOPLE)


def test_so_many_are_asked_in_every_round_in_their_order_and_the_same_again_after_a_crash(new_run: NewRun) -> None:
    for round in range(1, 30):
        asked = names(new_run, round, server={"sample_size": 3})
        assert len(asked) == 3
        assert asked == sorted(set(asked))
        assert asked == names(new_run, round, server={"sample_size": 3})
    assert names(new_run, 1, server={"sample_size": 10}) == list(PEOPLE)


def test_all_are_asked_equally_often_and_the_seed_decides(new_run: NewRun) -> None:
    folder = new_run(*PEOPLE, server={"sample_size": 3})
    asked = Counter(person.name for round in range(1, 1001) for person in select(folder, round))
    assert min(asked[name] for name in PEOPLE) > 300 - 5 * 14.5  # of a binomial with 1000 × 0.3: five standard deviations
    assert max(asked.values()) < 300 + 5 * 14.5
    drawn = [names(new_run, round, server={"sample_size": 3}) for round in range(1, 11)]
    assert drawn != [names(new_run, round, server={"sample_size": 3}, seed=8) for round in range(1, 11)]


def test_more_than_there_are_cannot_be_asked(new_run: NewRun) -> None:
    folder = new_run("org-1", "org-2", server={"sample_size": 3})
    for refused in (lambda: select(folder, 1), lambda: check_sample_size(folder.plan, 2)):
        with pytest.raises(PlanError, match=r"server\.sample_size = 3 and 2 organisations: expected at most"):
            refused()
    check_sample_size(folder.plan, 3)


def test_one_way_to_sample() -> None:
    table = {"model": {"base": "b"}, "data": {"source": "d"}, "privacy": "none"}
    with pytest.raises(PlanError, match=r"sample_size = 3 asks exactly so many, and sample_rate = 0\.5 each by chance"):
        parse_plan({**table, "server": {"sample_size": 3, "sample_rate": 0.5}})
    private = {"client_privacy": {"epsilon": 8.0}, "strategy": {"weighting": "uniform"}, "server": {"sample_size": 3}}
    with pytest.raises(PlanError, match=r"expected server\.sample_rate instead"):
        parse_plan({**table, **private})

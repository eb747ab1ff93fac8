from __future__ import annotations

from collections import Counter
from typing import Any

from cotune.plan.load import parse_plan
from cotune.server.rounds.selection import check_sample_size, count_to_complete, select
from tests.support.failures import fails_with
from tests.support.run_folders import NewRun

PEOPLE = tuple(f"org-{i}" for i in range(10))


def names(new_run: NewRun, round: int, **changes: Any) -> list[str]:
    return [person.name for person in select(new_run(*PEOPLE, **changes), round)]


def test_everybody_is_asked_by_default(new_run: NewRun) -> None:
    assert names(new_run, 1) == list(PEOPLE)


def test_sample_is_in_order_and_the_same_after_a_crash(new_run: NewRun) -> None:
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
        with fails_with("plan.sample_too_large", "server.sample_size", "3", "2"):
            refused()
    check_sample_size(folder.plan, 3)


def test_one_way_to_sample() -> None:
    table = {"model": {"base": "b"}, "data": {"source": "d"}, "privacy": "none"}
    with fails_with("plan.invalid", "sample_size", "3", "sample_rate", "0.5"):
        parse_plan({**table, "server": {"sample_size": 3, "sample_rate": 0.5}})
    private = {"client_privacy": {"epsilon": 8.0}, "strategy": {"weighting": "uniform"}, "server": {"sample_size": 3}}
    with fails_with("plan.invalid", "server.sample_rate"):
        parse_plan({**table, **private})


def test_over_selection_asks_more_after_the_sample(new_run: NewRun) -> None:
    """ceil(3 · 1.5) = 5, ceil(4 · 1.25) = 5, ceil(5 · 1.2) = 6, whatever 1.2 is in binary."""
    for size, more, asked in ((3, 0.5, 5), (4, 0.25, 5), (5, 0.2, 6), (3, 0.0, 3), (8, 10.0, 10)):
        server = {"sample_size": size, "over_selection": more}
        for round in range(1, 10):
            found = names(new_run, round, server=server)
            assert len(set(found)) == len(found) == asked
            assert found[:size] == sorted(found[:size])
            assert found == names(new_run, round, server=server)
    plan = new_run(*PEOPLE, server={"sample_size": 3, "over_selection": 0.5}).plan
    assert [count_to_complete(plan, asked) for asked in (5, 3, 2)] == [3, 3, 2]
    assert count_to_complete(new_run(*PEOPLE, server={"sample_size": 3}).plan, 3) == 3
    assert count_to_complete(new_run(*PEOPLE).plan, 10) == 10


def test_others_take_the_place_of_those_that_are_left_out(new_run: NewRun) -> None:
    folder = new_run(*PEOPLE, server={"sample_size": 8})
    for without, asked in (({"org-0"}, 8), ({"org-0", "org-1", "org-2"}, 7), (set(PEOPLE), 0)):
        found = {person.name for person in select(folder, 1, without)}
        assert len(found) == asked
        assert not found & without


def test_leaving_somebody_out_changes_no_draw_of_the_others(new_run: NewRun) -> None:
    folder = new_run(*PEOPLE, server={"sample_rate": 0.5})
    for round in range(1, 20):
        everybody = [person.name for person in select(folder, round)]
        assert [p.name for p in select(folder, round, {"org-3"})] == [name for name in everybody if name != "org-3"]

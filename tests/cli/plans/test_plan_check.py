"""`cotune plan check`: for a coordinator, who has no records; for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.privacy.policy import BudgetRules
from cotune.simulations.forecast.forecast import forecast_for
from tests.support.console import Cotune

PRIVATE = ("--set", "privacy={epsilon=8}", "--set", "local.batch_size=40", "--set", 'labels=["bad","good","so"]')


def rows(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("org-")}


@pytest.mark.parametrize("source", ["without", "elsewhere"])
def test_a_coordinator_needs_no_records(cotune: Cotune, folder: Path, source: str) -> None:
    """Neither a [data] table nor a file that is named there."""
    text = (folder / "toy.toml").read_text()
    written = {"without": "", "elsewhere": '[data]\nsource = "/nowhere/records.csv"\n'}[source]
    (folder / "theirs.toml").write_text(text.replace('[data]\nsource = "reviews.csv"\n', written))
    (folder / "reviews.csv").unlink()
    shown = cotune("plan", "check", "theirs.toml", "--examples", "1000,5000", *PRIVATE)
    assert (shown.code, shown.err) == (0, "")
    assert [row[1:4] for row in rows(shown.out).values()] == [[n, "40", "6"] for n in ("1,000", "5,000")]
    assert all(float(row[5]) <= 8.0 == float(row[6]) for row in rows(shown.out).values())
    assert not list(folder.glob("runs"))


def test_it_names_the_rule_by_which_a_new_policy_declines(cotune: Cotune) -> None:
    shown = cotune("plan", "check", "toy.toml", "--examples", "1000,5000", *PRIVATE)
    (line,) = [line for line in shown.out.splitlines() if "budget.epsilon_per_run" in line]
    assert f"own_epsilon = {BudgetRules().epsilon_per_run:g}" in line
    within = cotune("plan", "check", "toy.toml", "--examples", "1000,5000", *PRIVATE, "--set", "privacy.epsilon=3")
    assert "budget.epsilon_per_run" not in within.out


def test_json_is_all_that_is_on_stdout(cotune: Cotune, folder: Path) -> None:
    for also in (("--examples", "1000,5000"), ()):
        shown = cotune("plan", "check", "toy.toml", *PRIVATE, *also, "--json")
        assert (shown.code, shown.err) == (0, "")
        seen = json.loads(shown.out)
        table = rows(cotune("plan", "check", "toy.toml", *PRIVATE, *also).out)
        assert [o["name"] for o in seen["organizations"]] == list(table)
        for o in seen["organizations"]:
            assert f"{o['noise_multiplier']:.3f}" == table[o["name"]][4]
            assert f"{o['examples']:,}" == table[o["name"]][1]
        assert len(seen["plan_id"]) == len(seen["base_hash"]) == 64
        assert (seen["test_examples"] is None) == bool(also)


def test_records_are_either_stated_or_read(cotune: Cotune) -> None:
    for option in (("--data", "reviews.csv"), ("--clients", "3"), ("--by", "label")):
        shown = cotune("plan", "check", "toy.toml", "--examples", "1000", *option)
        assert shown.code == 2
        assert "--examples" in shown.err
    assert cotune("plan", "check", "toy.toml", "--examples", "none").code == 2


def test_the_forecast_is_that_of_the_library(cotune: Cotune, folder: Path) -> None:
    from cotune.plan.load import load_plan

    seen = json.loads(cotune("plan", "check", "toy.toml", "--examples", "700", *PRIVATE, "--json").out)
    expected = forecast_for(load_plan("toy.toml", [each for each in PRIVATE if each != "--set"]), (700,))
    assert seen == json.loads(json.dumps(expected.as_dict(), default=list))

"""`cotune plan check`: for a coordinator, who has no records; for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.privacy.policy import BudgetRules
from cotune.simulations.forecast.forecast import forecast_for
from tests.support.console import Cotune
from tests.support.multi_task import write_tasks

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


HELD = {"one holder": '[["mood", "length"], ["mood"]]', "two holders": '[["mood", "length"], ["length", "mood"]]'}
TASKS = """
train = "lora"
rounds = 1
privacy = "none"

[[tasks]]
name = "mood"

[[tasks]]
name = "length"

[model]
base = "{base}"
max_length = 16

[data]
source = "two.csv"

[local]
batch_size = 0.5
steps = 2

[simulation]
clients = 2
"""


@pytest.mark.parametrize("where", [(), ("--examples", "100,100")], ids=["records", "examples"])
@pytest.mark.parametrize("held", HELD)
def test_a_head_with_one_holder_is_called_its_release(cotune: Cotune, folder: Path, held: str, where: tuple[str, ...]) -> None:
    """Nothing is averaged into it; said of that task alone, from records or from who holds what."""
    write_tasks(folder / "two.csv")
    (folder / "two.toml").write_text(TASKS.format(base=folder / "base"), encoding="utf-8")
    shown = cotune("plan", "check", "two.toml", "--set", f"simulation.tasks={HELD[held]}", *where)
    assert shown.code == 0, shown.err
    said = [line for line in shown.out.splitlines() if "own release" in line]
    assert ["the task length is trained by org-1 alone" in line for line in said] == ([True] if held == "one holder" else [])


def test_unknown_holders_of_tasks_are_called_unknown(cotune: Cotune, folder: Path) -> None:
    """Of a federation, the coordinator knows numbers of records alone; the classes of a task may be unknown, too."""
    (folder / "two.toml").write_text(TASKS.format(base=folder / "base"), encoding="utf-8")
    shown = cotune("plan", "check", "two.toml", "--examples", "100,100,100")
    assert shown.code == 0, shown.err
    (line,) = [line for line in shown.out.splitlines() if "own release" in line]
    assert "not known" in line
    assert "mood/first class" in shown.out

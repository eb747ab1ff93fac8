"""What the ledger says to its owner, and that an auditor can compute it again without cotune."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.client.ledger_report import export_ledger, summarize_ledger
from cotune.client.site import Site
from cotune.privacy.accounting.composition import Steps, epsilon
from cotune.privacy.accounting.filters import epsilon_filter, filter_order, renyi, renyi_epsilon
from cotune.privacy.accounting.tradeoff import gaussian_mu, true_positive_rate
from cotune.privacy.config import compute_delta
from cotune.privacy.ledger.charges import Limit
from cotune.privacy.policy import BudgetRules, Policy

MakeSite = Callable[..., Site]
DOCUMENT = Path(__file__).parents[2] / "docs" / "ledger.md"


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    """Two data sets, the second grown from the first; two runs on the first, the second of them interrupted, one on the second."""
    site = make_site(policy=Policy(budget=BudgetRules(epsilon_total=8.0)))
    ledger = site.ledger()
    small = ledger.register_data_set([i.to_bytes(16, "big") for i in range(1000)])
    for round in (1, 2, 3):
        ledger.settle(ledger.reserve("a" * 64, round, Steps(1.1, 0.02, 20), data=small, plan="tweets"), 20, seconds=3.0)
    ledger.reserve("b" * 64, 1, Steps(1.5, 0.02, 20), data=small, plan="other")
    grown = ledger.register_data_set([i.to_bytes(16, "big") for i in range(1500)])
    ledger.settle(ledger.reserve("c" * 64, 1, Steps(20.0, 1.0, 1), data=grown, plan="other", purpose="label histogram"), 1)
    return site


def test_the_overview_is_composed_from_the_events(site: Site) -> None:
    [found] = summarize_ledger(site)["collections"]
    small, grown = found["data_sets"]
    delta = compute_delta("1/n^1.5", 1500)  # of the larger one
    events = [Steps(1.1, 0.02, 60), Steps(1.5, 0.02, 20), Steps(20.0, 1.0, 1)]
    order = filter_order(8.0, delta / 2)
    assert (small["records"], grown["records"], found["delta"]) == (1000, 1500, delta)
    assert found["epsilon"] == epsilon_filter(events, 8.0, delta / 2)  # the second run may have been chosen after the first
    assert found["composition"] == f"renyi filter, order {order}"
    assert found["epsilon_left"] == 8.0 - found["epsilon"]
    assert found["epsilon_at_small_delta"] == renyi_epsilon(renyi(events, order), order, 1e-6 / 2) > found["epsilon"]
    runs = {run["plan_id"][0]: run for run in found["runs"]}
    assert max(run["true_positive_rate"] for run in runs.values()) < found["true_positive_rate"] < 1
    assert grown["shares_records_with"] == {small["fingerprint"]: 1000}
    assert [(r["plan"], r["rounds"], r["steps"], r["interrupted"]) for r in runs.values()] == [
        ("tweets", 3, 60, 0),
        ("other", 1, 20, 1),
        ("other", 1, 0, 0),
    ]
    assert runs["a"]["epsilon"] == epsilon(events[:1], delta)
    assert runs["a"]["epsilon_at_small_delta"] == epsilon(events[:1], 1e-6)
    assert runs["a"]["gaussian_mu"] == gaussian_mu(events[:1])
    assert runs["a"]["true_positive_rate"] == true_positive_rate(events[:1], 0.01)


def test_each_collection_has_a_table_of_its_own(make_site: MakeSite) -> None:
    """What is in no collection stands in all of them."""
    site = make_site(policy=Policy(budget=BudgetRules(epsilon_total=8.0)))
    ledger = site.ledger()
    names = {}
    for number, name in enumerate(("", "wards", "images")):
        names[name] = ledger.register_data_set([bytes([number, i]) for i in range(50)])
        ledger.reserve(f"plan {name}", 1, Steps(1.5, 0.1, 10), data=names[name], collection=name)
    ledger.record_unprotected("plan x", 1, "training", data=names["wards"], collection="wards")
    wards, images = summarize_ledger(site)["collections"]
    assert (wards["collection"], images["collection"]) == ("wards", "images")
    assert [d["fingerprint"] for d in wards["data_sets"]] == [names[""], names["wards"]]
    assert [d["fingerprint"] for d in images["data_sets"]] == [names[""], names["images"]]
    assert [run["plan_id"] for run in wards["runs"]] == ["plan ", "plan wards"]
    assert (len(wards["unprotected"]), len(images["unprotected"])) == (1, 0)


def test_a_single_run_is_composed_by_pld(make_site: MakeSite) -> None:
    """What it has cost is said at δ; half of δ is kept for a second run in what may still be charged."""
    site = make_site(policy=Policy(budget=BudgetRules(epsilon_total=8.0)))
    ledger = site.ledger()
    steps = Steps(1.1, 0.02, 60)
    delta = 1e-5
    data = ledger.register_data_set([i.to_bytes(16, "big") for i in range(1000)])
    ledger.reserve("a" * 64, 1, steps, data=data, limits=[Limit("budget.epsilon_total", 8.0, delta)])
    [found] = summarize_ledger(site)["collections"]
    assert (found["delta"], found["composition"]) == (delta, "pld")  # the δ that was in force, not that of a rule
    assert found["epsilon"] == epsilon([steps], delta)
    assert found["epsilon_left"] == 8.0 - epsilon([steps], delta / 2)
    assert found["epsilon_at_small_delta"] == epsilon([steps], 1e-6)
    assert found["true_positive_rate"] == true_positive_rate([steps], 0.01)


def test_a_site_that_never_trained_has_no_ledger_and_gets_none(make_site: MakeSite) -> None:
    site = make_site()
    assert summarize_ledger(site) == {"organization": "clinic", "head": None, "collections": []}
    assert not site.ledger_file.exists()


def test_an_auditor_needs_dp_accounting_alone(site: Site, tmp_path: Path) -> None:
    """The program in the document, in an interpreter that cannot import cotune."""
    [program] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "export.json"
    file.write_text(json.dumps(export_ledger(site), indent=1))
    blocked = "import sys\nsys.modules['cotune'] = None\n"
    command = [sys.executable, "-W", "ignore", "-c", blocked + program, str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    [line, _], [table] = said, summarize_ledger(site)["collections"]
    _, _, spent, _, delta, *_ = line.split()
    assert float(delta) == table["delta"]
    assert float(spent) == pytest.approx(table["epsilon"], rel=0.01)
    assert said[-1] == f"head {summarize_ledger(site)['head']}"

    tampered = export_ledger(site)
    tampered["entries"][2]["body"]["count"] = 2
    file.write_text(json.dumps(tampered))
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "entry 3 was changed" in refused.stderr


def test_what_left_without_privacy_is_not_passed_over(site: Site) -> None:
    ledger = site.ledger()
    small, _ = ledger.data_sets()
    ledger.record_unprotected("d" * 64, 4, "training", data=small.fingerprint, plan="plain")
    for table in (*summarize_ledger(site)["collections"], *export_ledger(site)["collections"]):
        [left] = table["unprotected"]
        assert (left["plan"], left["round"], left["what"]) == ("plain", 4, "training")


def test_the_command_loads_nothing_that_trains() -> None:
    code = "import cotune.cli.client.ledger, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "opacus", "flwr", "pandas"} & set(done.stdout.split())

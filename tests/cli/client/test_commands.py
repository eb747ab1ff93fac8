from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from cotune.client.site import Site
from cotune.plan.load import load_plan
from cotune.privacy.accounting.display_rounding import round_up
from cotune.privacy.claimed_guarantee import describe_attack
from cotune.privacy.ledger.ledger import Ledger
from cotune.privacy.policy import Policy, read_policy
from cotune.simulations.run import simulate
from tests.support.console import Cotune, write_folder

PRIVATE = ("privacy.epsilon=4", "simulation.baselines=[]", "rounds=2")


@pytest.fixture(scope="module")
def whole(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and of what it began with."""
    write_folder(folder := tmp_path_factory.mktemp("whole"), base_model("bert"))
    plan = load_plan(folder / "toy.toml", PRIVATE)
    with chdir(folder):
        simulate(plan, folder / "run", device="cpu")
    return folder


@pytest.fixture
def site(whole: Path, folder: Path) -> Path:
    """The site of an organization that took part in a run."""
    shutil.copytree(whole / "run", folder / "run")
    return folder / "run" / "sites" / "org-1"


def test_the_ledger_is_shown(cotune: Cotune, site: Path) -> None:
    shown = cotune("client", "ledger", site)
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(cotune("client", "ledger", site, "--json").out)
    [table] = found["collections"]
    [data], [run] = table["data_sets"], table["runs"]
    assert f"data set {data['fingerprint'][:12]}…: {data['records']} records" in shown.out
    assert re.search(rf"{run['plan_id'][:12]}… +toy +2 +{run['steps']} +0 ", shown.out)
    assert f"head of the log: {found['head']}" in shown.out
    summary = json.loads((site.parents[1] / "summary.json").read_text())
    assert table["epsilon"] == pytest.approx(summary["organizations"][0]["epsilon_spent"])
    assert describe_attack(table["true_positive_rate"]) in shown.out
    assert f"ε {round_up(table['epsilon_at_small_delta'])} at δ = 1e-06" in shown.out
    assert table["true_positive_rate"] == run["true_positive_rate"] < 1  # of a single run


def test_the_ledger_is_exported(cotune: Cotune, site: Path, folder: Path) -> None:
    assert cotune("client", "ledger", site, "--export", "out.json").code == 0
    exported = json.loads((folder / "out.json").read_text())
    assert [e["steps"] for e in exported["collections"][0]["events"]] == [c.steps.count for c in Site(site).ledger().charges()]
    assert {e["kind"] for e in exported["entries"]} == {"key", "data", "reserve", "settle", "disclosure"}


def test_an_export_is_verified(cotune: Cotune, site: Path, folder: Path) -> None:
    cotune("client", "ledger", site, "--export", "out.json")
    shown = cotune("privacy", "verify", "out.json")
    assert (shown.code, shown.err) == (0, "")
    assert "the export holds" in shown.out
    exported = json.loads((folder / "out.json").read_text())
    assert exported["head"] in shown.out.replace("\n", "")
    found = json.loads(cotune("privacy", "verify", "out.json", "--json").out)
    assert (found["valid"], found["head"]) == (True, exported["head"])

    exported["collections"][0]["epsilon"] /= 2
    (folder / "out.json").write_text(json.dumps(exported))
    assert cotune("privacy", "verify", "out.json").code == 1
    assert not json.loads(cotune("privacy", "verify", "out.json", "--json").out)["valid"]
    (folder / "out.json").write_text("[]")
    refused = cotune("privacy", "verify", "out.json")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)


def test_a_ledger_that_was_put_back_is_one_sentence(cotune: Cotune, folder: Path) -> None:
    site = folder / "clinic"
    assert cotune("client", "init", site, "--name", "clinic").code == 0
    Site(site).ledger().close()  # all of it is in one file then
    shutil.copy(site / "ledger.sqlite", site / "ledger.old")
    Ledger(site / "ledger.sqlite").register_data_set([b"0" * 16])
    for side in ("-wal", "-shm"):
        (site / f"ledger.sqlite{side}").unlink(missing_ok=True)
    shutil.move(site / "ledger.old", site / "ledger.sqlite")
    shown = cotune("client", "ledger", site)
    assert (shown.code, shown.out) == (2, "")
    assert "an older copy was put back" in shown.err
    assert shown.err.count("\n") == 1


def test_a_plan_is_checked_before_joining(cotune: Cotune, site: Path) -> None:
    done = site.parents[1] / "plan.toml"
    plan = site.parents[1] / "next.toml"
    over = cotune("client", "check", site, done)
    assert over.code == 1
    assert "this plan has run here already (rounds 1–2)" in over.out
    plan.write_text(done.read_text().replace("seed = 7", "seed = 8"))
    shown = cotune("client", "check", site, plan)
    assert (shown.code, shown.err.strip()) == (0, "")
    assert "the policy allows this plan" in shown.out
    assert re.search(r"head +2 +\d+ ", shown.out)
    assert json.loads(cotune("client", "check", site, plan, "--json").out)["epsilon"] == 4.0
    (site / "policy.toml").write_text("")
    declined = cotune("client", "check", site, plan)
    assert declined.code == 1
    assert "declined by the rule training.base_models" in declined.out


def test_a_site_that_spent_nothing_says_so(cotune: Cotune, folder: Path) -> None:
    (folder / "site.json").write_text('{"organization": "clinic"}')
    assert "clinic has spent nothing" in cotune("client", "ledger", ".").out
    assert json.loads(cotune("client", "ledger", ".", "--json").out)["collections"] == []
    assert not (folder / "ledger.sqlite").exists()
    assert cotune("client", "ledger", "elsewhere").code == 2


def test_the_strict_policy_is_printed(cotune: Cotune, folder: Path) -> None:
    (folder / "policy.toml").write_text(cotune("client", "policy").out, encoding="utf-8")
    assert read_policy(folder / "policy.toml") == Policy()
    (folder / "site.json").write_text('{"organization": "clinic"}')
    (folder / "policy.toml").write_text("[budget]\nepsilon_total = 2.0\n")
    assert "epsilon_total = 2.0 " in cotune("client", "policy", ".").out


def test_setting_a_rule_keeps_comments_and_order(cotune: Cotune, folder: Path) -> None:
    (folder / "site.json").write_text('{"organization": "clinic"}')
    written = "# agreed by the board on 2 November\n[training]  # what may be trained\nmax_rounds   = 20   # see the minutes\n"
    (folder / "policy.toml").write_text(written)
    done = cotune("client", "policy", ".", "--set", "training.max_rounds=50", "--set", "budget.own_epsilon=2.5")
    assert (done.code, done.out) == (0, "training.max_rounds: 20 → 50\nbudget.own_epsilon: absent → 2.5\n")
    kept = (folder / "policy.toml").read_text()
    assert kept.startswith(written.replace("= 20 ", "= 50 "))
    assert read_policy(folder / "policy.toml").budget.own_epsilon == 2.5


def test_a_student_is_distilled_and_charged(cotune: Cotune, site: Path, folder: Path) -> None:
    labels = '["bad", "good", "so"]'
    toy = (folder / "run" / "model").as_posix()
    settings = f'name = "student"\nrounds = 2\ntrain = "head"\nlabels = {labels}\n'
    (folder / "student.toml").write_text(
        f'{settings}[model]\nbase = "{folder / "base"}"\nmax_length = 16\nprecision = "float32"\n'
        '[data]\nsource = "reviews.csv"\n[local]\nsteps = 2\nbatch_size = 20\n[privacy]\nepsilon = 2.0\ndelta = 1e-3\n'
    )
    refused = cotune("client", "distill", site, "student.toml", toy, "--out", "small")
    assert refused.code == 2
    assert "--teachers-released" in refused.err
    before = len(list(Site(site).ledger().charges()))
    done = cotune("client", "distill", site, "student.toml", toy, "--out", "small", "--teachers-released", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert (found["steps"], found["model"]) == (4, "small")
    assert 0 < found["epsilon"] <= 2
    assert len(list(Site(site).ledger().charges())) == before + 2
    assert json.loads(cotune("predict", "small", "great day", "--json").out)

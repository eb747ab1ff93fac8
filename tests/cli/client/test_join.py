"""An organization's way into a federation, as it is typed."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cotune.cli.client.node_output import NodeOutput
from cotune.client.audit_log import AuditLog
from cotune.client.consent.approvals import Approvals
from cotune.client.site import Site
from cotune.client.site_setup import get_key_fingerprint
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.plan.load import load_plan
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, read_policy
from cotune.protocol.federation_file import Invitation
from cotune.protocol.statements import FINISHED, TRAIN, RequestStatement
from cotune.server.deployment.keys.certificates import create_authority
from cotune.server.deployment.members import Members, read_public_key
from tests.support.console import Cotune, Started
from tests.support.failures import fails_with

SETTINGS = ("labels=['bad','good','so']", "privacy={epsilon=4.0,delta=1e-3}", "model.precision=float32")


@pytest.fixture
def plan(folder: Path) -> Plan:
    base = find_base(ModelConfig(base=str(folder / "base"))).content_hash
    return load_plan(folder / "toy.toml", [*SETTINGS, f"model.base_hash={base}"])


@pytest.fixture
def address() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def invite(folder: Path, address: str) -> Callable[[Plan], Path]:
    """A plan -> a federation.toml that holds it."""
    create_authority(folder / "certificates", ["127.0.0.1"])
    authority = (folder / "certificates" / "ca.crt").read_text()

    def write(plan: Plan) -> Path:
        file = folder / "federation.toml"
        file.write_text(
            Invitation("tests", address, authority, plan, id=32 * "a", signing_key=64 * "b").to_toml(), encoding="utf-8"
        )
        return file

    return write


@pytest.fixture
def site(cotune: Cotune, folder: Path) -> Path:
    made = cotune("client", "init", "site", "--name", "hospital-a", "--device", "cpu")
    assert (made.code, made.err) == (0, "")
    return folder / "site"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_site_is_made_for_its_owner_alone(cotune: Cotune, site: Path, folder: Path) -> None:
    assert mode(site) == 0o700
    assert {path.name for path in site.iterdir()} >= {"site.json", "node.key", "node.pub", "policy.toml", "ledger.sqlite"}
    assert {mode(path) for path in site.iterdir()} == {0o600}
    assert read_policy(site / "policy.toml") == Policy()
    assert (site / "node.pub").read_text().endswith(" hospital-a\n")
    again = cotune("client", "init", "site", "--name", "hospital-a")
    assert again.code == 1
    assert "is a site already: expected a new folder; its key and ledger are not written over" in again.err


def test_the_fingerprint_is_the_one_that_the_coordinator_sees(cotune: Cotune, folder: Path) -> None:
    shown = cotune("client", "init", "site", "--name", "hospital-a").out
    member = Members(folder / "members.json").invite("hospital-a", read_public_key(folder / "site" / "node.pub"))
    assert member.fingerprint in shown
    assert member.fingerprint == hashlib.sha256(member.key).hexdigest() == get_key_fingerprint(Site(folder / "site"))


def test_a_key_that_is_there_already_is_taken(cotune: Cotune, folder: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", "own"], check=True)
    assert cotune("client", "init", "site", "--name", "hospital-a", "--key", "own").code == 0
    assert read_public_key(folder / "site" / "node.pub") == read_public_key(folder / "own.pub")
    assert cotune("client", "init", "other", "--name", "hospital-a", "--key", "toy.toml").code == 1
    assert not (folder / "other" / "site.json").exists()


@pytest.mark.parametrize("name", ["Hospital A", "../x", ""])
def test_a_name_that_is_none(cotune: Cotune, folder: Path, name: str) -> None:
    shown = cotune("client", "init", "site", "--name", name)
    assert shown.code == 2
    assert "cannot be the name of an organization" in shown.err
    assert not (folder / "site").exists()


def allow(cotune: Cotune, site: Path, shown: str) -> None:
    """Types the commands that a check has printed."""
    for line in shown.splitlines():
        if "to allow it: " in line:
            command = line.split("--set ", 1)[1].strip("'")
            assert cotune("client", "policy", site, "--set", command).code == 0


def test_all_broken_rules_are_shown_with_what_would_allow_them(
    cotune: Cotune, site: Path, plan: Plan, invite: Callable[[Plan], Path]
) -> None:
    document = invite(plan)
    shown = cotune("client", "check", site, document, "--data", "reviews.csv", "--offline")
    assert shown.code == 1
    for rule in ("training.base_models", "training.min_examples", "budget.epsilon_per_run"):
        assert f"declined by the rule {rule}" in shown.out
    assert f"--set 'training.base_models=[\"{plan.model.base_hash}\"]'" in shown.out
    allow(cotune, site, shown.out)
    after = cotune("client", "check", site, document, "--offline")
    assert (after.code, after.err.strip()) == (0, ""), after.out
    assert "the policy allows this plan" in after.out
    assert Invitation.from_toml(document.read_text()).fingerprint in after.out
    assert mode(site / "data.json") == 0o600
    found = json.loads(cotune("client", "check", site, document, "--offline", "--json").out)
    assert (found["epsilon"], found["examples"], found["broken"], found["connection"]) == (
        4.0,
        239,
        [],
        None,
    )  # one text is there twice
    assert found["federation"]["plan_id"] == plan.plan_id
    assert {"cotune", "flwr", "torch"} <= found["versions"].keys()


def test_a_check_says_why_the_server_is_not_reached(
    cotune: Cotune, site: Path, plan: Plan, invite: Callable[[Plan], Path], address: str
) -> None:
    shown = cotune("client", "check", site, invite(plan), "--data", "reviews.csv")
    assert shown.code == 1
    assert f"not connected: nothing listens at {address}" in shown.out


def test_without_records_there_is_one_sentence(cotune: Cotune, site: Path, plan: Plan, invite: Callable[[Plan], Path]) -> None:
    shown = cotune("client", "check", site, invite(plan), "--offline")
    assert (shown.code, shown.out) == (2, "")
    assert "does not say where the records are: name their file with --data" in shown.err
    wrong = cotune("client", "check", site, invite(plan), "--offline", "--data", "reviews.csv", "--text", "txt")
    assert "has no column 'txt': use --text=COLUMN" in wrong.err
    assert not (site / "data.json").exists()


def test_a_model_in_another_place(cotune: Cotune, site: Path, plan: Plan, invite: Callable[[Plan], Path], folder: Path) -> None:
    elsewhere = plan.model_copy(update={"model": plan.model.model_copy(update={"base": "/srv/of/the/coordinator"})})
    document = invite(elsewhere)
    lacking = cotune("client", "check", site, document, "--data", "reviews.csv", "--offline")
    allow(cotune, site, lacking.out)
    lacking = cotune("client", "check", site, document, "--offline")
    assert lacking.code == 2
    assert "/srv/of/the/coordinator is not a folder" in lacking.err
    assert "a copy of it in another folder is named with --model FOLDER" in lacking.err
    assert cotune("client", "check", site, document, "--offline", "--model", "base").code == 0
    assert cotune("client", "check", site, document, "--offline").code == 0  # it is remembered
    assert Site(site).file.base == (folder / "base").resolve()


def test_another_model_is_not_taken_for_the_plans(
    cotune: Cotune, site: Path, plan: Plan, invite: Callable[[Plan], Path], base_model: Callable[[str], Path]
) -> None:
    shown = cotune("client", "check", site, invite(plan), "--data", "reviews.csv", "--offline", "--model", base_model("gpt2"))
    assert shown.code == 2
    assert "expected" in shown.err
    assert "as in the plan" in shown.err
    assert Site(site).file.base is None


def test_rules_are_set_and_checked_before_they_are_written(cotune: Cotune, site: Path) -> None:
    shown = cotune("client", "policy", site, "--set", "training.max_rounds=50", "--set", "disclosures.example_count=rounded")
    assert shown.out == 'training.max_rounds: 200 → 50\ndisclosures.example_count: "noised" → "rounded"\n'
    written = (site / "policy.toml").read_text()
    assert "# rounds of one plan" in written
    for setting, said in (
        ("training.max_round=5", "has no rule \"training.max_round\"; did you mean 'training.max_rounds'?"),
        ("training.max_rounds=many", "training.max_rounds"),
        ("training.max_rounds", "expected rule=value"),
    ):
        wrong = cotune("client", "policy", site, "--set", setting)
        assert wrong.code == 2
        assert said in wrong.err
    assert (site / "policy.toml").read_text() == written
    assert mode(site / "policy.toml") == 0o600
    assert cotune("client", "policy", "--set", "training.max_rounds=5").code == 2


def test_a_plan_that_waits_is_shown_and_approved(cotune: Cotune, site: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no plan waits for approval" in cotune("client", "approve", site, "--yes").err
    approvals = Approvals(Site(site))
    approvals.approve(plan, "test")
    changed = plan.model_copy(update={"rounds": 9})
    with fails_with("policy.training.approval"):
        approvals.check(changed, Policy())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # as under cron
    unanswered = cotune("client", "approve", site)
    assert (unanswered.code, approvals.ids()) == (1, [plan.plan_id])
    assert unanswered.err.endswith("cotune: stopped, as the question was not answered; --yes answers it beforehand\n")
    shown = cotune("client", "approve", site, "--yes")
    assert shown.code == 0, shown.err
    assert "rounds: 2 → 9" in shown.out
    assert "seed" not in shown.out
    approvals.check(changed, Policy())
    assert "is approved already" in cotune("client", "approve", site, changed.plan_id[:10]).out


def test_the_delivery_of_the_model_is_not_shown_as_another_round(cotune: Cotune, site: Path) -> None:
    log = AuditLog(site)
    said = {"federation": "f", "run": "r", "plan": "ab" * 32, "round": 10, "recipient": "clinic", "admitted": 0, "received": "cd"}
    for serial, kind in enumerate((TRAIN, FINISHED)):
        statement = RequestStatement(**said, kind=kind, cohort=2, roster="ef", serial=serial, at="2026-11-27T12:00:00Z")
        log.append("request", round=10, statement=statement.text(), key="ab" * 32)
    shown = cotune("client", "sent", site)
    assert shown.out.count("request to train, round 10") == 1
    assert shown.out.count("request with the finished model, round 10") == 1


def test_what_was_sent_is_shown_and_checked(cotune: Cotune, site: Path) -> None:
    log = AuditLog(site)
    log.append("refusal", round=1, reason="the disk is full")
    log.append("update", round=2, plan="toy", plan_id="ab" * 32, bytes=1234, sha256="cd" * 32, epsilon=0.51)
    shown = cotune("client", "sent", site)
    assert "refusal, round 1: the disk is full" in shown.out
    assert "update toy (abababababab…), round 2" in shown.out
    assert "ε 0.51 stated" in shown.out
    assert f"SHA-256 of the last: {log.head}" in shown.out
    found = json.loads(cotune("client", "sent", site, "--json").out)
    assert (len(found["entries"]), found["head"]) == (2, log.head)
    log.file.write_text(log.file.read_text().replace("the disk is full", "all is well"))
    changed = cotune("client", "sent", site)
    assert (changed.code, changed.out) == (1, "")
    assert "line 2 does not follow from the line before" in changed.err


def test_a_node_says_a_thing_once_until_it_changes() -> None:
    console = Console(width=200, record=True, force_terminal=False, highlight=False)
    shown = NodeOutput(console)
    for round in ("1", "2"):
        shown("begun", {"round": round, "trains": True})
        shown("answered", {"round": round, "seconds": 1.0, "entry": {"what": "refusal", "reason": "the rule budget says no"}})
    update = {"what": "update", "bytes": 5100, "epsilon_spent": 0.941, "epsilon_allowed": 3.0}
    shown("answered", {"round": "3", "seconds": 1.0, "entry": update})
    shown("answered", {"round": "4", "seconds": 1.0, "entry": {"what": "refusal", "reason": "the rule budget says no"}})
    shown("begun", {"round": "4", "trains": False})
    shown("answered", {"round": "4", "seconds": 1.0, "entry": {"what": "receipt", "model": "site/models/toy"}})
    assert [line[20:] for line in console.export_text().splitlines()] == [
        "round 1 begins; first, records are encoded, which may take minutes",
        "round 1: no update was sent: the rule budget says no",
        "round 2 begins",
        "round 2: no update was sent, for the same reason",
        "round 3 is answered: 5.1 kB sent after 1.0 s, ε 0.95 of 3 spent",
        "round 4: no update was sent: the rule budget says no",
        "the finished model is in site/models/toy",
    ]


def test_join_stays_says_once_what_is_wrong_and_ends_well(
    started: Started, cotune: Cotune, site: Path, plan: Plan, invite: Callable[[Plan], Path], address: str
) -> None:
    with started("client", "join", site, invite(plan), "--data", "reviews.csv") as process:
        until_line = time.monotonic() + 600
        while not (site / "node" / "lock").exists() and process.poll() is None and time.monotonic() < until_line:
            time.sleep(0.1)
        time.sleep(3.0)  # several attempts
        process.terminate()
        out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    assert out.count(f"nothing listens at {address}") == 1
    assert "declined by the rule training.base_models" in out
    assert "this plan is declined whenever it is asked for, until the policy allows it" in out
    assert Approvals(Site(site)).ids() == [plan.plan_id]
    assert {mode(file) for file in site.rglob("*") if file.is_file()} == {0o600}

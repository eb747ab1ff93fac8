from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from cotune.protocol.federation_file import Invitation
from cotune.server.deployment.join_files import list_disclosures, render_join_page
from cotune.server.deployment.keys.certificates import create_authority
from tests.support.pages import blocks_of, commands_of

SIGNS = {"id": 32 * "a", "signing_key": 64 * "b"}


def plan_of(**changes: Any) -> Plan:
    return parse_plan(
        {"model": {"base": "x", "base_hash": "ab" * 32}, "data": {"source": "x.csv"}, "labels": ["a", "b"], **changes}
    )


def test_the_page_says_whom_to_join_and_what_to_type(tmp_path: Path) -> None:
    create_authority(tmp_path, [])
    invitation = Invitation(
        "clinics & co", "fed.example.org:9092", (tmp_path / "ca.crt").read_text(), plan_of(rounds=12), **SIGNS
    )
    page = render_join_page(invitation)
    assert page.startswith("# Join clinics & co\n")
    commands = [command for block in blocks_of("JOIN.md", page) for command in commands_of(block)]
    assert [command.split()[:3] for command in commands] == [
        ["pip", "install", f"./cotune-{version('cotune')}-py3-none-any.whl"],
        *(["cotune", "client", verb] for verb in ("init", "check", "join", "sent", "ledger", "approve")),
    ]
    for what in ("fed.example.org:9092", "in each of 12 rounds", invitation.plan.plan_id[:12], "abababababababab"):
        assert what in page
    assert invitation.fingerprint not in page  # anyone who could change the document on its way could change the page too
    assert len(page.splitlines()) < 60


def test_what_leaves_is_what_the_plan_asks_for() -> None:
    private = list(list_disclosures(plan_of(privacy={"epsilon": 3.0})))
    assert "the classification head: with differential privacy for every single record, ε at most 3 " in private[0]
    assert len(private) == 2
    open_ = list(
        list_disclosures(plan_of(privacy="none", train="full", disclosures={"local_metrics": True, "label_histogram": True}))
    )
    assert "the whole model: **without differential privacy**" in open_[0]
    assert len(open_) == 4


def test_what_a_strategy_wants_is_named_and_what_is_kept_is_not() -> None:
    assert any("how much privacy noise" in said for said in list_disclosures(plan_of(strategy={"weighting": "noise_aware"})))
    private = list(list_disclosures(plan_of(train="lora", lora={"factors": "ab", "keep": "b"})))
    assert "one half of the adapters (the other half and the head stay with you)" in private[0]
    assert len(list(list_disclosures(plan_of(strategy={"client_term": "scaffold"})))) == 2  # its control variates stay

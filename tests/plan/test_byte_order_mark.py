"""What Notepad and PowerShell save begins with a byte order mark, which is none of the content."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.cli.client.check import _read
from cotune.errors import PlanError
from cotune.plan.load import load_plan
from cotune.privacy.policy import Policy, dump_policy, read_policy
from tests.support.failures import fails_with

MARK = b"\xef\xbb\xbf"
PLAN = b'labels = ["a", "b"]\n[model]\nbase = "m"\n[data]\nsource = "r.csv"\n'


def test_a_plan_with_a_mark_is_the_plan_without(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes(PLAN)
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / "plan.toml").write_bytes(MARK + PLAN)
    marked = load_plan(tmp_path / "marked" / "plan.toml")
    assert marked == load_plan(tmp_path / "plan.toml")
    assert marked.labels == ("a", "b")
    assert _read(str(tmp_path / "marked" / "plan.toml")) == (None, marked)


def test_a_policy_with_a_mark_is_the_policy_without(tmp_path: Path) -> None:
    policy = Policy.model_validate({"training": {"min_examples": 9}})
    (tmp_path / "policy.toml").write_bytes(MARK + dump_policy(policy).encode())
    assert read_policy(tmp_path / "policy.toml") == policy


def test_a_federation_toml_with_a_mark_is_one_under_any_name(tmp_path: Path) -> None:
    """It was taken for a plan, unless it was called federation.toml: its first key was an unknown one."""
    (tmp_path / "ours.toml").write_bytes(MARK + b'protocol = 0\nname = "x"\n[server]\naddress = "x"\n')
    with fails_with("plan.missing_plan", "federation.toml"):
        _read(str(tmp_path / "ours.toml"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_named_as_what_they_are_not(tmp_path: Path, encoding: str) -> None:
    """PowerShell's > writes UTF-16."""
    (tmp_path / "plan.toml").write_bytes(PLAN.decode().encode(encoding))
    with pytest.raises(PlanError) as raised:
        load_plan(tmp_path / "plan.toml")
    assert "\n" not in str(raised.value)
    (tmp_path / "policy.toml").write_bytes(dump_policy(Policy()).encode(encoding))
    with pytest.raises(PlanError):
        read_policy(tmp_path / "policy.toml")

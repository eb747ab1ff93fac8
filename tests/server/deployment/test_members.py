from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import RunError
from cotune.server.deployment.members import Members, read_public_key
from tests.support.failures import fails_with


def ssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


PRIVATE = [ec.generate_private_key(ec.SECP384R1()) for _ in range(3)]
KEYS = [ssh(key) for key in PRIVATE]


def test_a_member_has_the_key_as_flower_keeps_it(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.json")
    member = members.invite("hospital-a", KEYS[0], (500, 20_000))
    assert load_pem_public_key(member.key) == PRIVATE[0].public_key()
    assert members.all() == members.active() == (member,)
    assert (tmp_path / "members.json").stat().st_mode & 0o777 == 0o600


def test_the_same_invitation_again_changes_nothing_but_the_range(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.json")
    first = members.invite("a", KEYS[0])
    assert members.invite("a", KEYS[0]) == first
    assert members.invite("a", KEYS[0], (1, 5)).examples == (1, 5)
    assert [member.invited for member in members.all()] == [first.invited]


def test_a_name_and_a_key_belong_to_one_organization(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.json")
    members.invite("a", KEYS[0])
    with fails_with("run.key_in_use"):
        members.invite("b", KEYS[0])
    with fails_with("run.name_in_use"):
        members.invite("a", KEYS[1])
    with fails_with("plan.invalid_name"):
        members.invite("../a", KEYS[1])
    with fails_with("run.unknown_member"):
        members.revoke("c")


def test_a_revoked_key_never_comes_back_and_the_name_may(tmp_path: Path) -> None:
    members = Members(tmp_path / "members.json")
    members.invite("a", KEYS[0])
    assert members.revoke("a").revoked
    assert members.active() == ()
    for name in ("a", "b"):
        with fails_with("run.key_in_use"):
            members.invite(name, KEYS[0])
    assert members.invite("a", KEYS[1]).name == "a"
    assert [member.public_key for member in members.all()] == KEYS[:2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("invite", "revoke")), st.sampled_from("abc"), st.integers(0, 2)), max_size=12))
def test_names_and_keys_of_active_members_stay_distinct(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]
) -> None:
    members = Members(tmp_path_factory.mktemp("members") / "members.json")
    revoked: set[str] = set()
    for what, name, key in steps:
        try:
            if what == "invite":
                members.invite(name, KEYS[key])
            else:
                revoked.add(members.revoke(name).public_key)
        except RunError:
            continue
    active = members.active()
    assert len({member.name for member in active}) == len({member.key for member in active}) == len(active)
    assert not revoked & {member.public_key for member in active}


@pytest.mark.parametrize("content", ["{", "[]", '{"members": [{"name": "a"}]}'])
def test_a_damaged_list_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "members.json").write_text(content)
    with fails_with("run.damaged_document", "members.json"):
        Members(tmp_path / "members.json").all()


def test_a_list_with_one_key_twice_is_damaged(tmp_path: Path) -> None:
    member = {"public_key": KEYS[0], "invited": "2026-01-01"}
    (tmp_path / "members.json").write_text(json.dumps({"members": [{"name": "a", **member}, {"name": "b", **member}]}))
    with fails_with("run.damaged_document", "members.json"):
        Members(tmp_path / "members.json").active()


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "A", "a\nb", ".", "con\x00"])
def test_a_name_that_was_put_in_by_hand_is_checked_again(tmp_path: Path, name: str) -> None:
    """It becomes the name of files."""
    member = {"name": name, "public_key": KEYS[0], "invited": "2026-01-01"}
    (tmp_path / "members.json").write_text(json.dumps({"members": [member]}))
    with fails_with("run.damaged_document", "members.json"):
        Members(tmp_path / "members.json").active()


def test_a_key_that_was_put_in_by_hand_and_is_none(tmp_path: Path) -> None:
    member = {"name": "a", "public_key": "ssh-unheard-of AAAA", "invited": "2026-01-01"}
    (tmp_path / "members.json").write_text(json.dumps({"members": [member]}))
    with fails_with("run.damaged_document", "members.json"):
        Members(tmp_path / "members.json").active()


def test_a_public_key_is_read_without_its_comment(tmp_path: Path) -> None:
    (tmp_path / "node.pub").write_text(f"{KEYS[0]} somebody@somewhere\n")
    assert read_public_key(tmp_path / "node.pub") == KEYS[0]


@pytest.mark.parametrize(
    "content",
    ["", "ssh-rsa nonsense", pytest.param(ssh(ed25519.Ed25519PrivateKey.generate()), id="another curve"), "é"],
)
def test_what_is_no_key_of_a_node_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "node.pub").write_text(content, encoding="utf-8")
    with fails_with("run.invalid_key", "node.pub"):
        read_public_key(tmp_path / "node.pub")

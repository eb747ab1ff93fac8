from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.errors import CotuneError, DataError, DeviceError, ModelError, RunError
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.plan.load import load_plan, parse_plan
from cotune.plan.plan import Plan
from cotune.server.deployment.creation import create_federation, renew_server
from cotune.server.deployment.federation import FederationFolder, ServerConfig, get_public_address, write_config
from cotune.server.deployment.keys import certificates
from cotune.server.deployment.keys.signing import public_hex, read_signing_key
from tests.support.datasets import sentences, write_csv
from tests.support.failures import fails_with
from tests.support.stacked import bundle, stated
from tests.support.tiny_models import copy_without_weights

LABELS = ["bad", "good", "so"]
RULES = """
from cotune.strategies.registry import fusion

@fusion("first", cite="")
def first(updates):
    return dict(updates[0].delta)
"""


@pytest.fixture
def plan(base_model: Callable[[str], Path]) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        table = {"name": "toy", "model": {"base": str(base_model("bert"))}, "data": {"source": "x.csv"}, "labels": LABELS}
        return parse_plan({**table, **changes})

    return make


def config(**changes: Any) -> ServerConfig:
    return ServerConfig(**{"name": "toy", "hosts": ("fed.example.org", "10.0.0.7"), "device": "cpu", **changes})


def test_a_federation_is_a_folder_that_only_its_owner_reads(plan: Callable[..., Plan], tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        made = create_federation(tmp_path / "new" / "fed", plan(), config(test=None, port=9000))
    finally:
        os.umask(before)
    assert {path.name for path in made.path.iterdir()} == {
        *("server.toml", "plan.toml", "federation.toml", "JOIN.md", "certificates", "superlink", "runs"),
    }
    for path in (made.path, *made.path.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert made.config == config(port=9000, id=made.config.id, quotas=made.config.quotas, base=made.config.base)
    assert made.members.all() == ()
    for host in ("fed.example.org", "10.0.0.7", "127.0.0.1"):
        certificates.check_certificate(made.certificates, host)


def test_plan_is_resolved_and_the_same_in_the_handout(plan: Callable[..., Plan], tmp_path: Path) -> None:
    wanted = plan()
    made = create_federation(tmp_path / "fed", wanted, config())
    assert made.plan.model.base_hash == find_base(wanted.model).content_hash
    assert made.plan.labels == tuple(LABELS)
    assert made.invitation.plan.plan_id == made.plan.plan_id
    assert (made.invitation.name, made.invitation.address) == ("toy", "fed.example.org:9092")
    assert made.invitation.certificates == (made.certificates / "ca.crt").read_bytes()
    assert made.invitation.id == made.config.id
    assert made.invitation.signing_key == public_hex(read_signing_key(made.certificates))


def test_federation_of_stacking_takes_the_classes_of_its_members(
    plan: Callable[..., Plan], base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bundle(base_model, tmp_path)
    made = create_federation(tmp_path / "fed", plan(labels=[], model={"base": str(base), "members": stated("a", "b")}), config())
    assert made.plan.labels == tuple(LABELS)
    assert made.plan.model.base_hash == find_base(ModelConfig(base=str(base))).content_hash
    assert made.plan.model.base == "folder:together"
    with fails_with("model.unstated_members"):
        create_federation(tmp_path / "other", plan(model={"base": str(base)}), config())
    assert not (tmp_path / "other").exists()


def test_members_see_base_model_name_and_hash_but_no_folder(plan: Callable[..., Plan], tmp_path: Path) -> None:
    wanted = plan()
    place = Path(wanted.model.base).resolve()
    made = create_federation(tmp_path / "fed", wanted, config())
    assert made.plan.model.base == f"folder:{place.name}"
    assert made.config.base == place
    for handed_out in ("federation.toml", "JOIN.md", "plan.toml"):
        assert str(place.parent) not in (made.path / handed_out).read_text(encoding="utf-8")


def test_wherever_the_folder_is_the_plan_is_the_same(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """Also by another way there."""
    wanted = plan()
    place = Path(wanted.model.base).resolve()
    (tmp_path / "link").symlink_to(place)
    linked = plan(model={"base": str(tmp_path / "link")})
    assert (
        create_federation(tmp_path / "a", wanted, config()).plan.plan_id
        == create_federation(tmp_path / "b", linked, config()).plan.plan_id
    )


def test_class_names_default_to_those_of_the_test_records(plan: Callable[..., Plan], tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", sentences(60))
    assert create_federation(tmp_path / "fed", plan(labels=[]), config(test=test)).plan.labels == tuple(LABELS)
    with fails_with("plan.missing_labels"):
        create_federation(tmp_path / "other", plan(labels=[]), config())
    with fails_with("data.unknown_class"):
        create_federation(tmp_path / "other", plan(labels=["bad", "good"]), config(test=test))


def test_the_files_of_own_rules_lie_beside_the_plan(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(RULES)
    (tmp_path / "my.toml").write_text(
        f'privacy = "none"\nlabels = ["a", "b"]\nstrategy = {{ fusion = "rules.py:first" }}\n'
        f'[model]\nbase = "{base_model("bert")}"\n[data]\nsource = "x.csv"\n'
    )
    made = create_federation(tmp_path / "fed", load_plan(tmp_path / "my.toml"), config())
    (tmp_path / "rules.py").unlink()
    assert (made.path / "rules.py").read_text() == RULES
    assert made.plan.strategy.fusion.name == "rules.py:first"
    assert made.invitation.plan.plan_id == made.plan.plan_id


@pytest.mark.parametrize(
    ("plan_changes", "config_changes", "error", "sentence"),
    [
        ({}, {"hosts": ("fed.example.org:9092",)}, RunError, "is no host"),
        ({}, {"test": Path("/nowhere.csv")}, DataError, "does not exist"),
        ({}, {"device": "abacus"}, DeviceError, "is not known"),
        ({"model": {"base": "/nowhere"}}, {}, ModelError, "is not a folder"),
    ],
)
def test_a_failure_leaves_nothing_behind(
    plan: Callable[..., Plan],
    tmp_path: Path,
    plan_changes: dict[str, Any],
    config_changes: dict[str, Any],
    error: type[CotuneError],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        create_federation(tmp_path / "fed", plan(**plan_changes), config(**config_changes))
    assert list(tmp_path.glob("**/*fed*")) == []


def test_what_is_there_stays_as_it_is(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = create_federation(tmp_path / "fed", plan(), config())
    before = {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    with fails_with("run.folder_exists", "fed"):
        create_federation(tmp_path / "fed", plan(), config())
    assert {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()} == before


def test_a_place_that_cannot_hold_a_folder_is_one_sentence(plan: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with fails_with("run.not_writable", "file/fed"):
        create_federation(tmp_path / "file" / "fed", plan(), config())


def test_a_renewed_certificate_needs_nothing_of_organizations(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = create_federation(tmp_path / "fed", plan(), config())
    authority, key, handed_out, shown = (
        (made.path / name).read_bytes()
        for name in ("certificates/ca.crt", "certificates/server.key", "federation.toml", "certificates/server.crt")
    )
    assert renew_server(made) is False
    assert renew_server(made, ("fed.example.org", "fed2.example.org")) is False
    assert (made.certificates / "server.crt").read_bytes() != shown
    assert (made.certificates / "ca.crt").read_bytes() == authority
    assert (made.certificates / "server.key").read_bytes() == key
    assert (made.path / "federation.toml").read_bytes() == handed_out
    certificates.check_certificate(made.certificates, "fed2.example.org")
    assert FederationFolder(made.path).config.hosts == ("fed.example.org", "fed2.example.org")


def test_another_first_host_is_another_address(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = create_federation(tmp_path / "fed", plan(), config())
    plan_id = made.plan.plan_id
    assert renew_server(made, ("new.example.org",)) is True
    again = FederationFolder(made.path)
    assert (again.invitation.address, again.invitation.plan.plan_id) == ("new.example.org:9092", plan_id)
    assert "new.example.org:9092" in (made.path / "JOIN.md").read_text()


def test_an_address_of_ipv6_has_brackets() -> None:
    assert get_public_address(config(hosts=("2001:db8::7",))) == "[2001:db8::7]:9092"


def test_the_configuration_is_toml_without_what_is_not_given(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = create_federation(tmp_path / "fed", plan(), config(database=False))
    table = tomllib.loads((made.path / "server.toml").read_text())
    assert "test" not in table
    assert table["database"] is False


def test_older_federation_gets_signing_key_with_certificate(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """And organizations the federation.toml that says so; once."""
    made = create_federation(tmp_path / "fed", plan(), config())
    (made.certificates / "signing.key").unlink()
    write_config(made.path, made.config.model_copy(update={"id": ""}))
    old = FederationFolder(made.path)
    assert renew_server(old)
    assert old.invitation.signing_key == public_hex(read_signing_key(made.certificates))
    assert old.invitation.id == FederationFolder(made.path).config.id != made.config.id
    assert not renew_server(old)


@pytest.fixture
def without_weights(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Plan]:
    """(changes) -> the plan with the base model's hashes, which is looked for where its weights are not."""
    whole = plan().model
    lacking = copy_without_weights(Path(whole.base), tmp_path / Path(whole.base).name)
    return lambda **changes: plan(model={"base": str(lacking), **find_base(whole).pins}, **changes)


def test_server_without_weights_makes_the_same_plan(
    plan: Callable[..., Plan], without_weights: Callable[..., Plan], tmp_path: Path
) -> None:
    whole = create_federation(tmp_path / "a", plan(), config())
    made = create_federation(tmp_path / "b", without_weights(), config())
    assert made.plan.plan_id == whole.plan.plan_id
    assert made.config.quotas.reply == pytest.approx(whole.config.quotas.reply, rel=0.01)
    assert not list((made.config.base or tmp_path).glob("*.safetensors"))


def test_what_needs_the_weights_is_refused_at_once(without_weights: Callable[..., Plan], tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", sentences(30))
    public = {"public": {"source": str(test)}, "strategy": "feddf"}
    for wanted, test_set in ((without_weights(), test), (without_weights(train="full"), None), (without_weights(**public), None)):
        with fails_with("model.weights_needed"):
            create_federation(tmp_path / "fed", wanted, config(test=test_set))
    with fails_with("model.lora_targets"):
        create_federation(tmp_path / "fed", without_weights(train="lora", lora={"targets": ["nothing"]}), config())
    assert not (tmp_path / "fed").exists()


def test_base_of_the_configuration_stands_for_the_one_of_the_plan(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """The plan keeps its name, such as a hub id."""
    whole = plan().model
    named = plan(model={"base": "some/model", **find_base(whole).pins})
    made = create_federation(tmp_path / "fed", named, config(base=Path(whole.base)))
    assert (made.plan.model.base, made.config.base) == ("some/model", Path(whole.base))
    wrong = plan(model={"base": "some/model", "base_hash": "0" * 64})
    with fails_with("model.other_hash"):
        create_federation(tmp_path / "other", wrong, config(base=Path(whole.base)))

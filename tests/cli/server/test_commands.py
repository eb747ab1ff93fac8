from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cotune.client.node.trust import Trust
from cotune.protocol.federation_file import read_invitation
from tests.support.console import Cotune
from tests.support.tiny_models import copy_without_weights


@pytest.fixture
def fed(cotune: Cotune, folder: Path) -> Path:
    done = cotune("server", "init", "fed", "--plan", "toy.toml", "--host", "fed.example.org", "--test", "reviews.csv")
    assert (done.code, done.err) == (0, "")
    return folder / "fed"


@pytest.fixture
def key(folder: Path) -> Path:
    public = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (folder / "node.pub").write_bytes(public + b" hospital-a\n")
    return folder / "node.pub"


def test_init_says_what_to_hand_out_and_what_comes_next(cotune: Cotune, folder: Path) -> None:
    done = cotune(
        "server",
        "init",
        "fed",
        "--plan",
        "toy.toml",
        "--host",
        "::1",
        "--host",
        "b.org",
        "--set",
        'labels=["x", "y"]',
        "--memory",
    )
    assert (done.code, done.err) == (0, "")
    assert "labels: x, y" in done.out
    assert done.out.endswith("next: cotune server start fed\n")
    settings = (folder / "fed" / "server.toml").read_text()
    assert "database = false" in settings
    assert '"::1"' in settings
    assert 'address = "[::1]:9092"' in (folder / "fed" / "federation.toml").read_text()
    (fingerprint,) = re.findall(r"\b[0-9a-f]{64}\b", done.out)
    assert json.loads(cotune("server", "list", "fed", "--json").out)["fingerprint"] == fingerprint


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ((), 2, "the plan does not list the class names"),
        (("--test", "nowhere.csv"), 2, "does not exist"),
        (("--port", "9093"), 2, "--port and --superlink-port are both 9093: expected two different ports"),
        (("--set", "rounds=0"), 2, "the plan has rounds = 0"),
        (("--test", "reviews.csv", "--host", "fed:1"), 1, "is no host"),
    ],
)
def test_what_init_refuses_is_one_sentence(
    cotune: Cotune, folder: Path, options: tuple[str, ...], code: int, sentence: str
) -> None:
    done = cotune("server", "init", "fed", "--plan", "toy.toml", "--host", "fed.example.org", *options)
    assert (done.code, done.out) == (code, "")
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not (folder / "fed").exists()


def test_a_folder_that_is_there_is_left_alone(cotune: Cotune, fed: Path) -> None:
    done = cotune("server", "init", "fed", "--plan", "toy.toml", "--host", "fed.example.org", "--test", "reviews.csv")
    assert done.code == 1
    assert done.err == f"cotune: {fed} is there already: expected the name of a new folder, as nothing is overwritten\n"


def test_an_organization_is_invited_listed_and_revoked(cotune: Cotune, fed: Path, key: Path) -> None:
    assert "nobody is invited so far" in cotune("server", "list", "fed").out
    invited = cotune("server", "invite", "fed", "hospital-a", key, "--examples", "500:20000")
    assert (invited.code, invited.err) == (0, "")
    (fingerprint,) = re.findall(r"\b[0-9a-f]{64}\b", invited.out)
    (member,) = json.loads(cotune("server", "list", "fed", "--json").out)["members"]
    assert (member["name"], member["fingerprint"], member["examples"]) == ("hospital-a", fingerprint, [500, 20_000])
    shown = cotune("server", "list", "fed").out
    assert f"{fingerprint[:16]}…" in shown
    assert "500 to 20,000" in shown
    assert cotune("server", "revoke", "fed", "hospital-a").code == 0
    assert "revoked 2" in cotune("server", "list", "fed").out
    again = cotune("server", "invite", "fed", "hospital-a", key)
    assert again.code == 1
    assert "which was revoked" in again.err


@pytest.mark.parametrize("examples", ["500", "0:5", "9:5", "a:b", "1:-5"])
def test_a_range_that_is_none_is_refused(cotune: Cotune, fed: Path, key: Path, examples: str) -> None:
    done = cotune("server", "invite", "fed", "hospital-a", key, "--examples", examples)
    assert (done.code, done.err) == (
        2,
        f'cotune: --examples "{examples}" is not understood: expected two numbers from 1 on, such as 500:20000\n',
    )


def test_a_certificate_is_renewed(cotune: Cotune, fed: Path) -> None:
    before = (fed / "certificates" / "server.crt").read_bytes()
    done = cotune("server", "renew", "fed")
    assert (done.code, done.err) == (0, "")
    assert "stop `cotune server start` and start it again" in done.out
    assert "address" not in done.out
    assert (fed / "certificates" / "server.crt").read_bytes() != before
    moved = cotune("server", "renew", "fed", "--host", "new.example.org")
    assert "give federation.toml to every organization again" in moved.out
    assert 'address = "new.example.org:9092"' in (fed / "federation.toml").read_text()


def test_an_organization_renews_its_key_by_a_file(cotune: Cotune, fed: Path, folder: Path) -> None:
    assert cotune("client", "init", "site", "--name", "hospital-a", "--device", "cpu").code == 0
    unknown = cotune("client", "renew-key", "site")
    assert (unknown.code, "cotune client join" in unknown.err) == (1, True)
    Trust.join(folder / "site", read_invitation(fed / "federation.toml"))
    assert cotune("server", "invite", "fed", "hospital-a", folder / "site" / "node.pub", "--examples", "1:9").code == 0
    made = cotune("client", "renew-key", "site")
    assert (made.code, made.err) == (0, "")
    accepted = cotune("server", "accept-key", "fed", folder / "site" / "node-renewal.json")
    assert (accepted.code, accepted.err) == (0, "")
    (shown,) = re.findall(r"\b[0-9a-f]{64}\b", made.out)
    assert shown in accepted.out
    former, present = json.loads(cotune("server", "list", "fed", "--json").out)["members"]
    assert (former["name"], present["name"], present["fingerprint"]) == ("hospital-a", "hospital-a", shown)
    assert former["revoked"]
    assert not present["revoked"]
    (folder / "forged.json").write_text((folder / "site" / "node-renewal.json").read_text().replace("hospital-a", "hospital-b"))
    for file in ("forged.json", "toy.toml", "nowhere.json"):
        refused = cotune("server", "accept-key", "fed", file)
        assert (refused.code, refused.err.count("\n")) == (1, 1)


def test_the_federations_keys_are_announced_and_then_used(cotune: Cotune, fed: Path, folder: Path, key: Path) -> None:
    early = cotune("server", "renew-keys", "fed", "--switch")
    assert (early.code, early.err.count("\n")) == (1, 1)
    assert cotune("client", "init", "site", "--name", "hospital-a", "--device", "cpu").code == 0
    Trust.join(folder / "site", read_invitation(fed / "federation.toml"))
    assert cotune("server", "invite", "fed", "hospital-a", key).code == 0
    announced = cotune("server", "renew-keys", "fed")
    assert (announced.code, announced.err) == (0, "")
    assert "hospital-a" in announced.out
    (new,) = re.findall(r"\b[0-9a-f]{64}\b", announced.out)
    refused = cotune("server", "renew-keys", "fed", "--switch")
    assert (refused.code, "hospital-a" in refused.err) == (1, True)
    for _ in range(2):
        assert new in cotune("client", "trust", "site", fed / "server-renewals.jsonl").out
    (folder / "nothing.jsonl").write_text("")
    nothing = cotune("client", "trust", "site", "nothing.jsonl")
    assert (nothing.code, nothing.err.count("\n")) == (1, 1)
    switched = cotune("server", "renew-keys", "fed", "--switch", "--anyway")
    assert (switched.code, switched.err) == (0, "")
    assert read_invitation(fed / "federation.toml").signing_key == new
    assert cotune("server", "renew", "fed").code == 0
    sent = cotune("client", "sent", "site")
    assert "keys" in sent.out
    assert cotune("client", "sent", "site", "--verify").code == 0


@pytest.mark.parametrize("command", [("start",), ("list",), ("revoke", "a"), ("renew",), ("renew-keys",)])
def test_a_folder_that_is_no_federation_is_one_sentence(cotune: Cotune, folder: Path, command: tuple[str, ...]) -> None:
    done = cotune("server", command[0], "base", *command[1:])
    assert done.code == 1
    assert "expected one that `cotune server init` made" in done.err


def test_init_says_whether_the_server_holds_the_base_model(cotune: Cotune, folder: Path) -> None:
    """A server whose copy lacks the weights takes a plan that was pinned where they are, and tells it; with a test set it does not."""
    lacking = copy_without_weights(folder / "base", folder / "lacking")
    settings = ("--set", 'labels=["bad", "good", "so"]', "--set", "name=toy")
    init = ("server", "init", "--host", "fed.example.org", *settings)
    whole = cotune(*init, "a", "--plan", "toy.toml")
    assert "the server holds the base model" in whole.out
    refused = cotune(*init, "b", "--plan", "toy.toml", "--model", lacking)
    assert (refused.code, "cotune plan pin" in refused.err) == (2, True)
    pinned = cotune("plan", "pin", "toy.toml")
    assert (pinned.code, pinned.err) == (0, "")
    (folder / "pinned.toml").write_text(pinned.out, encoding="utf-8")
    tested = cotune(*init, "b", "--plan", "pinned.toml", "--model", lacking, "--test", "reviews.csv")
    assert (tested.code, "the test set cannot be evaluated" in tested.err) == (2, True)
    assert not (folder / "b").exists()
    made = cotune(*init, "b", "--plan", "pinned.toml", "--model", lacking)
    assert (made.code, made.err) == (0, "")
    assert "the server does not hold the weights of the base model" in made.out
    plans = [(folder / fed / "plan.toml").read_text(encoding="utf-8") for fed in ("a", "b")]
    assert plans[0] == plans[1]

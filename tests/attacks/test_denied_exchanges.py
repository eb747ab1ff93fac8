"""What was asked and answered cannot be denied, invented or changed afterwards: not by the server, and not by an organization.

On commit a605cba the log of an organization and the events of a run were each side's own word: a server could deny that it had
asked (15 steps charged of 10), a member could deny the update that it had sent, and 1 of 1 changed logs went unnoticed on the other
side. An answer that nobody had signed entered the model.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict, UserConfig

from cotune.cli.main import run as command
from cotune.client.app import app
from cotune.client.audit_log import AuditLog
from cotune.client.node.trust import Trust, TrustedServer
from cotune.client.site import Site
from cotune.plan.plan import Plan
from cotune.privacy.policy import Policy, change_policy
from cotune.protocol.refusals import dump_refusal, refusal_digest
from cotune.protocol.signatures import detach
from cotune.protocol.statements import RECEIPT, REFUSAL, ReplyStatement, RequestStatement, sign
from cotune.server.deployment.keys.signing import public_hex, read_signing_key
from cotune.server.deployment.signed_trail import read_trail
from cotune.server.runs.deliveries import read_deliveries
from cotune.server.runs.run_folder import Participant, RunFile, RunFolder
from tests.support.delivery import deliver
from tests.support.organizations import adding
from tests.support.rounds import play
from tests.support.run_folders import NewRun
from tests.support.signing import FEDERATION, countersign
from tests.support.unreliable_grid import PRIVATE, WildGrid, real, told, wild

NAMES = ("bank", "clinic")


# --- answers


def unsigned(content: RecordDict) -> None:
    del content["signed"]


def changed_on_its_way(content: RecordDict) -> None:
    record = content["update"]
    assert isinstance(record, ConfigRecord)
    record["examples"] = 11


@pytest.mark.parametrize(
    ("spoil", "key", "changes"),
    [
        (unsigned, PRIVATE[0], {}),
        (changed_on_its_way, PRIVATE[0], {}),
        (None, PRIVATE[1], {}),
        (None, ec.generate_private_key(ec.SECP384R1()), {}),
        (None, PRIVATE[0], {"request": 64 * "0"}),
        (None, PRIVATE[0], {"sender": "org-2"}),
        (None, PRIVATE[0], {"kind": RECEIPT}),
        (None, PRIVATE[0], {"sha256": 64 * "0"}),
    ],
)
def test_unsigned_reply_does_not_enter_the_model(
    new_run: NewRun, spoil: Callable[[RecordDict], None] | None, key: ec.EllipticCurvePrivateKey, changes: dict[str, str]
) -> None:
    """It is kept aside, and a strike; the others' round goes on."""
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5}))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": adding(3.0)})
    answered = grid.answer

    def answer(message: Any) -> Any:
        reply = answered(message)
        if grid._name(message) == "org-1":
            if changes or key is not PRIVATE[0]:
                del reply.content["signed"]
                countersign(reply.content, message.content, "org-1", key, **changes)
            if spoil is not None:
                spoil(reply.content)
        return reply

    grid.answer = answer  # type: ignore[method-assign]
    progress = play(folder, grid)
    assert progress.history[0]["participants"] == ["org-2"]
    assert progress.history[0]["quarantined"] == ["org-1"]
    assert "sign" in told(folder, "update_quarantined")[0]["reason"]
    replies = [line for line in read_trail(folder.path) if line["event"] == "reply"]
    assert [json.loads(line["statement"])["sender"] for line in replies] == ["org-2"]


# --- both ends, with the organizations' own app


@pytest.fixture
def played(make_plan: Callable[..., Plan], make_site: Callable[..., Site], tmp_path: Path) -> tuple[RunFolder, dict[str, Site]]:
    """A run of two organizations that train on their records, with the model delivered."""
    people = tuple(Participant(name=name) for name in NAMES)
    file = RunFile(run="x", created="now", engine="in-process", device="cpu", participants=people)
    folder = real(RunFolder.create(tmp_path / "run", make_plan(rounds=2, server={"absent_seconds": 5.0}), file))
    sites = {name: make_site(name) for name in NAMES}
    grid = joined(folder, sites)
    play(folder, grid)
    assert deliver(grid, folder) == []
    assert sorted(read_deliveries(folder)) == list(NAMES)
    return folder, sites


def joined(folder: RunFolder, sites: dict[str, Site]) -> WildGrid:
    """The organizations' own app, each with its key, and trusting the server."""
    key = public_hex(read_signing_key(Path(folder.file.federation) / "certificates"))
    grid = WildGrid(app, len(NAMES))
    grid.names = list(NAMES)
    grid.node_of = dict(zip(NAMES, sorted(grid.get_node_ids()), strict=True))
    for (name, site), private in zip(sites.items(), PRIVATE, strict=False):
        server = TrustedServer(signing_key=key, certificates="")
        Trust(federation=FEDERATION, name="fed", generations=(server,)).write(site.folder)
        (site.folder / "node.key").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        node = grid.node_of[name]
        config = UserConfig({"site": str(site.folder)})
        grid._contexts[node] = Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=UserConfig())
    answered = grid.answer
    one = threading.Lock()

    def in_turn(message: Message) -> Message:
        """They share this process and its model: real ones have a process each."""
        with one:
            return answered(message)

    grid.answer = in_turn  # type: ignore[method-assign]
    return grid


def cotune(*words: object) -> int:
    """The exit code of a command. It quietens cotune's log for its process; here that process goes on."""
    level = logging.getLogger("cotune").level
    before = sys.argv
    sys.argv = ["cotune", *map(str, words)]
    try:
        command()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
        logging.getLogger("cotune").setLevel(level)
    return 0


def rewritten(log: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
    """A log with other lines, chained again as somebody would who has the file."""
    entries = [change(entry) for entry in AuditLog.at(log).entries()]
    forged = AuditLog.at(log.with_name("forged.jsonl"))
    for entry in entries:
        if entry is not None:
            entry = {key: value for key, value in entry.items() if key not in ("at", "before")}
            forged.append(entry.pop("what"), **entry)
    return forged.file


def test_both_ends_of_an_honest_run_agree(played: tuple[RunFolder, dict[str, Site]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, sites = played
    for site in sites.values():
        assert cotune("server", "verify-trail", folder.path, "--site-log", site.folder / "audit.jsonl") == 0
        assert "3 requests and 3 answers" in capsys.readouterr().out
        assert cotune("client", "sent", site.folder, "--verify") == 0
        assert cotune("client", "sent", site.folder, "--trail", folder.path / "trail.jsonl") == 0
        assert "0 contradictions, 0 at one end only" in capsys.readouterr().out.splitlines()[-1]


def no_update(entry: dict[str, Any]) -> dict[str, Any] | None:
    return None if (entry["what"], entry["round"]) == ("update", 2) else entry


def another_update(entry: dict[str, Any]) -> dict[str, Any] | None:
    return {**entry, "sha256": 64 * "0"} if (entry["what"], entry["round"]) == ("update", 2) else entry


def another_statement(entry: dict[str, Any]) -> dict[str, Any] | None:
    if (entry["what"], entry["round"]) != ("update", 2):
        return entry
    said = json.loads(entry["statement"])
    return {**entry, "statement": json.dumps({**said, "sha256": 64 * "0"}, separators=(",", ":"), sort_keys=True)}


def another_request(entry: dict[str, Any]) -> dict[str, Any] | None:
    if (entry["what"], entry["round"]) != ("request", 2):
        return entry
    said = json.loads(entry["statement"])
    return {**entry, "statement": json.dumps({**said, "round": 7}, separators=(",", ":"), sort_keys=True)}


@pytest.mark.parametrize("change", [no_update, another_update, another_statement, another_request])
def test_an_organization_that_changes_its_log_is_contradicted(
    played: tuple[RunFolder, dict[str, Site]], change: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> None:
    """Although its lines are chained again."""
    folder, sites = played
    forged = rewritten(sites["clinic"].folder / "audit.jsonl", change)
    assert cotune("server", "verify-trail", folder.path, "--site-log", forged) == 1


def test_a_server_that_denies_a_request_is_contradicted(played: tuple[RunFolder, dict[str, Site]]) -> None:
    folder, sites = played
    trail = folder.path / "trail.jsonl"
    lines = trail.read_text().splitlines(keepends=True)
    asked = next(i for i, line in enumerate(lines) if '"event": "request"' in line and r"\"recipient\":\"clinic\"" in line)
    trail.write_text("".join(lines[:asked] + lines[asked + 1 :]))
    assert cotune("client", "sent", sites["clinic"].folder, "--trail", trail) == 1
    assert cotune("client", "sent", sites["bank"].folder, "--trail", trail) == 0


def test_server_that_misreports_a_reply_is_contradicted(played: tuple[RunFolder, dict[str, Site]]) -> None:
    folder, sites = played
    trail = folder.path / "trail.jsonl"
    found = [json.loads(line) for line in trail.read_text().splitlines()]
    reply = next(entry for entry in found if entry["event"] == "reply" and '"sender":"clinic"' in entry["statement"])
    said = json.loads(reply["statement"])
    reply["statement"] = json.dumps({**said, "sha256": 64 * "0"}, separators=(",", ":"), sort_keys=True)
    trail.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    assert cotune("client", "sent", sites["clinic"].folder, "--trail", trail) == 1


def test_what_was_lost_on_its_way_is_no_contradiction(
    played: tuple[RunFolder, dict[str, Site]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sites = played
    trail = folder.path / "trail.jsonl"
    lines = [line for line in trail.read_text().splitlines(keepends=True) if '"event": "reply", "round": 2' not in line]
    trail.write_text("".join(lines))
    assert cotune("server", "verify-trail", folder.path, "--site-log", sites["clinic"].folder / "audit.jsonl") == 0
    assert "at one end only" in capsys.readouterr().out


# --- who declined what


@pytest.fixture
def declined(make_plan: Callable[..., Plan], make_site: Callable[..., Site], tmp_path: Path) -> tuple[RunFolder, dict[str, Site]]:
    """A round of two organizations, of which one declines by a rule of its own."""
    people = tuple(Participant(name=name) for name in NAMES)
    file = RunFile(run="x", created="now", engine="in-process", device="cpu", participants=people)
    plan = make_plan(rounds=1, server={"absent_seconds": 5.0, "quorum": 0.5})
    folder = real(RunFolder.create(tmp_path / "run", plan, file))
    strict = change_policy(Policy.permissive(), {"training.min_cohort": 5})
    sites = {"bank": make_site("bank"), "clinic": make_site("clinic", policy=strict)}
    play(folder, joined(folder, sites))
    return folder, sites


def replies_of(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    found = [line for line in read_trail(folder.path) if line["event"] == "reply"]
    return [line for line in found if json.loads(line["statement"])["sender"] == name]


def test_a_refusal_is_signed_and_both_ends_show_it(declined: tuple[RunFolder, dict[str, Site]]) -> None:
    folder, sites = declined
    [refused] = replies_of(folder, "clinic")
    assert json.loads(refused["statement"])["kind"] == REFUSAL
    assert "training.min_cohort" in refused["words"]
    assert told(folder, "update_dropped")[0]["reason"] == refused["words"]
    log = sites["clinic"].folder / "audit.jsonl"
    assert cotune("server", "verify-trail", folder.path, "--site-log", log) == 0
    assert cotune("client", "sent", sites["clinic"].folder, "--trail", folder.path / "trail.jsonl") == 0


def test_an_organization_that_denies_its_refusal_is_contradicted(declined: tuple[RunFolder, dict[str, Site]]) -> None:
    folder, sites = declined

    def changed(entry: dict[str, Any]) -> dict[str, Any] | None:
        return {key: value for key, value in entry.items() if key != "statement"} if entry["what"] == "refusal" else entry

    log = sites["clinic"].folder / "audit.jsonl"
    entries = AuditLog.at(log).entries()
    assert [entry["what"] for entry in entries] == ["refusal"]
    request = {"statement": entries[0]["refused"], "signature": entries[0]["refused_signature"]}
    forged = rewritten(log, changed)
    AuditLog.at(forged).append("request", **request)
    assert cotune("server", "verify-trail", folder.path, "--site-log", forged) == 1


def test_server_that_alters_a_refusal_is_contradicted(declined: tuple[RunFolder, dict[str, Site]]) -> None:
    folder, sites = declined
    trail = folder.path / "trail.jsonl"
    trail.write_text(trail.read_text().replace("training.min_cohort does not allow this plan", "training.min_cohort is fine"))
    assert cotune("client", "sent", sites["clinic"].folder, "--trail", trail) == 1


def test_a_refusal_in_another_s_name_is_not_believed(new_run: NewRun) -> None:
    """The words are not shown as those of the organization."""
    folder = real(new_run("org-1", "org-2", rounds=1, server={"quorum": 0.5}))
    grid = wild(folder, {"org-1": adding(1.0), "org-2": adding(3.0)})
    answered = grid.answer

    def answer(message: Any) -> Any:
        reply = answered(message)
        if grid._name(message) == "org-1":
            words = "declined: its rule training.max_rounds does not allow this plan"
            _, signed = detach(message.content)
            assert signed is not None
            request = RequestStatement.parse(signed.text)
            statement = ReplyStatement(request.digest, "org-1", REFUSAL, refusal_digest(words), 64 * "0")
            return Message(Error(1001, dump_refusal(words, statement, sign(statement, PRIVATE[1]))), reply_to=message)
        return reply

    grid.answer = answer  # type: ignore[method-assign]
    play(folder, grid)
    [dropped] = told(folder, "update_dropped")
    assert "max_rounds" not in dropped["reason"]
    assert replies_of(folder, "org-1") == []

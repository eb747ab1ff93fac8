"""`cotune server run` and `status` as they are typed, without a server: what they refuse, and what they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from cotune.cli.progress import remote_line, showing_remote_progress
from cotune.cli.server.run import _show_result
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.new_run import create_run
from cotune.server.runs.run_folder import Progress
from tests.support.console import Cotune
from tests.support.events import make_event
from tests.support.federations import founded
from tests.support.summaries import empty_summary


@pytest.fixture
def fed(folder: Path) -> FederationFolder:
    return founded(folder / "fed", folder / "base", "hospital-a", "hospital-b")


def test_without_a_server_a_run_is_refused_and_leaves_nothing(cotune: Cotune, fed: FederationFolder) -> None:
    done = cotune("server", "run", fed.path)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("cotune: the SuperLink cannot be reached")
    assert "`cotune server start`" in done.err
    assert list(fed.runs()) == []


def test_resume_without_a_run_is_refused(cotune: Cotune, fed: FederationFolder) -> None:
    done = cotune("server", "run", fed.path, "--resume")
    assert (done.code, done.err) == (1, f"cotune: {fed.path} has no run to go on with: begin one without --resume\n")


@pytest.mark.parametrize("option", [("--new",), ("--set", "rounds=3")])
def test_resume_takes_nothing_that_begins_a_run(cotune: Cotune, fed: FederationFolder, option: tuple[str, ...]) -> None:
    done = cotune("server", "run", fed.path, "--resume", *option)
    assert done.code == 2
    assert "--resume takes neither --new nor --set" in done.err


def test_a_folder_that_is_no_federation_is_refused(cotune: Cotune, folder: Path) -> None:
    for command in ("run", "status"):
        done = cotune("server", command, folder)
        assert done.code == 1
        assert "is not the folder of a federation" in done.err


def test_status_works_while_nothing_runs(cotune: Cotune, fed: FederationFolder) -> None:
    done = cotune("server", "status", fed.path)
    assert (done.code, done.err) == (0, "")
    for words in ("federation toy: the server does not run", "certificate until 20", "no run yet", "hospital-b", "unknown"):
        assert words in done.out
    run = create_run(fed, name="one")
    run.events.write(make_event("run_started", rounds=2))
    done = cotune("server", "status", fed.path)
    for words in ("run one, plan toy", "round 0 of 2, under way", "last event: run_started"):
        assert words in done.out


def test_status_says_how_many_organizations_are_in_the_model(cotune: Cotune, fed: FederationFolder) -> None:
    run = create_run(fed)
    run.events.write(make_event("run_started", rounds=2))
    assert "in this model" not in cotune("server", "status", fed.path).out  # there is none yet
    for number, participants in ((1, ["hospital-a"]), (2, ["hospital-a", "hospital-b"])):
        whole = {"round": number, "stage": "head", "metrics": None, "epsilon": {}, "participants": participants, "dropped": []}
        run.save(Progress(number, {}, {}, (*run.load().history, whole)))
        assert f"{len(participants)} of 2 organizations" in cotune("server", "status", fed.path).out


@pytest.mark.parametrize(("rounds", "part"), [((2, 2), 2), ((2, 0), 1)])
def test_run_end_counts_organizations_in_the_model(fed: FederationFolder, rounds: tuple[int, int], part: int) -> None:
    run = create_run(fed)
    console = Console(width=200, record=True, force_terminal=True, color_system="standard", highlight=False)
    asked = {"weight": None, "epsilon_spent": None, "bytes_up": 0, "dropped": 0, "quarantined": 0, "delivered": True}
    members = [{"name": who.name, "rounds": count, **asked} for who, count in zip(run.file.participants, rounds, strict=True)]
    (run.path / "summary.json").write_text(json.dumps(empty_summary(organizations=members).as_json()), encoding="utf-8")
    _show_result(console, run)
    [line] = [line for line in console.export_text(styles=True).splitlines() if "in this model" in line]
    assert f"{part} of 2 organizations" in line
    assert line.startswith("\x1b[1;31m") == (part < 2)  # bold and red where somebody lacks


def test_status_as_json(cotune: Cotune, fed: FederationFolder) -> None:
    done = cotune("server", "status", fed.path, "--json")
    found = json.loads(done.out)
    assert [(o["name"], o["connection"]) for o in found["organizations"]] == [
        ("hospital-a", "unknown"),
        ("hospital-b", "unknown"),
    ]
    assert (found["run"], found["server_reachable"]) == (None, False)


def test_in_a_pipe_no_line_is_broken_and_no_word_cut(
    cotune: Cotune, fed: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    run = create_run(fed, name="one")
    run.events.write(
        make_event("update_dropped", round=1, organization="hospital-b", reason="declined: its rule privacy does not allow it")
    )
    lines = [line.split() for line in cotune("server", "status", fed.path).out.splitlines()]
    told = "hospital-b unknown – – – 0 B – dropped in round 1: declined: its rule privacy does not allow it"
    assert told.split() in lines


def test_remaining_time_holds_when_rounds_arrive_at_once() -> None:
    console = Console(width=200, record=True, force_terminal=False, highlight=False)
    whole = {"stage": "head", "participants": ["a"], "metrics": None, "epsilon": {}, "bytes_up": 1, "bytes_down": 1}
    with showing_remote_progress(console) as notify:
        notify("run_started", {"folder": "f", "plan": "p", "plan_id": "ab" * 32, "rounds": 5, "resumed_after": 0})
        for round, seconds in ((1, 100.0), (2, 2.0), (3, 4.0)):
            notify("round_finished", {**whole, "round": round, "seconds": seconds})
    left = [line.rpartition(", ")[2].replace("\u00a0", " ") for line in console.export_text().splitlines()[2:]]
    assert left == ["1 B down", "6.0 s left", "6.0 s left"]  # 3 · 2 s, and 2 · 3 s: the first round loads models


def test_what_only_a_real_federation_has_is_said_in_lines() -> None:
    console = Console(width=200, record=True, force_terminal=False, highlight=False)
    with showing_remote_progress(console) as notify:
        notify("run_started", {"folder": "f", "plan": "p", "plan_id": "ab" * 32, "rounds": 2, "resumed_after": 0})
        notify("waiting", {"connected": ["a"], "needed": 2, "absent": ["b", "c"]})
        notify("update_received", {"round": 1, "organization": "a", "bytes": 1200, "steps": 3, "epsilon": 0.991})
        notify("update_quarantined", {"round": 1, "organization": "b", "reason": "not finite"})
        notify("messages_refused", {"organization": "c", "count": 4, "reason": "it replies to nothing"})
        notify("client_excluded", {"organization": "b", "reason": "3 refused updates"})
        notify("delivered", {"organization": "a"})
        notify("run_lost", {"reason": "its process ended (failed)", "seconds": 4.0})
    told = console.export_text().replace("\u00a0", " ")
    for line in (
        "waiting for organizations: 1 connected, 2 needed; not connected: b, c",
        "round 1: a answered, 1.2 kB, ε 1.00 stated",
        "round 1: the update of b was rejected and quarantined: not finite",
        "c has had 4 messages refused at the public port: it replies to nothing",
        "b is left out of the run from now on: 3 refused updates",
        "a has the finished model",
        "the run ended unexpectedly (its process ended (failed)); it is submitted again in 4 seconds",
    ):
        assert line in told
    assert remote_line("round_started", {"round": 2, "organizations": ["a"]}) is None
    assert "a, b" in str(remote_line("round_started", {"round": 1, "organizations": ["a", "b"]}))

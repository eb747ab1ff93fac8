"""Files of others that hold what a terminal obeys: escape sequences, titles, links, directions, invisible and returning characters.

On commit a605cba a federation.toml of this kind moved the cursor, changed the window's title and hid text at `cotune client check`,
the first command that is run on an untrusted file; in 32 of the 45 cases it came through, most in the sentence of
their failure (with 8-bit controls also in JSON).
Each case is the real command on a file that an attacker has written; what is looked at is every byte that leaves the process.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from cotune.cli.console import open_console
from cotune.client.audit_log import AuditLog
from cotune.client.site_setup import make_site
from cotune.printable import Clean
from cotune.server.deployment.execution.supervised_process import extract_reason
from cotune.server.deployment.federation import FederationFolder
from cotune.server.deployment.new_run import create_run
from tests.support.console import Cotune, Outcome
from tests.support.events import make_event
from tests.support.federations import founded

HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x1b[1A\x1b[8m\x9b31m\x9d0;y\x9c\u202e\u2066\u200b\U000e0041\x7f\x08\rover[link=http://h]z[/link][/bold]"
OBEYED = re.compile(r"\x1b\]|\x1b\[2J|\x1b\[8m|[\x07\x08\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\U000e0041]")  # on a terminal


def is_raw(text: str) -> bool:
    """Whether anything but lines of characters that are shown is in it."""
    return any(unicodedata.category(char)[0] == "C" and char not in "\n\t" for char in text) or "\r" in text


def assert_clean(done: Outcome) -> None:
    """Something was said, nothing raw, and of a failure one line."""
    assert done.out + done.err
    assert not is_raw(done.out), ascii(done.out)
    assert not is_raw(done.err), ascii(done.err)
    assert "Traceback" not in done.err
    assert "unexpected error" not in done.err, done.err
    assert done.err.count("\n") <= 1, done.err


@pytest.fixture
def fed(folder: Path) -> FederationFolder:
    return founded(folder / "fed", folder / "base", "hospital-a", "hospital-b")


@pytest.fixture
def site(folder: Path) -> Path:
    return make_site(folder / "site", "clinic").folder


def edited(file: Path, change: Callable[[dict[str, object]], None]) -> Path:
    """The TOML file as an attacker has written it."""
    import tomllib

    document = tomllib.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(tomli_w.dumps(document), encoding="utf-8")
    return file


def named(*keys: str, value: object = HOSTILE) -> Callable[[dict[str, object]], None]:
    """The change of one key, however deep."""

    def change(document: dict[str, object]) -> None:
        table: dict[str, object] = document
        for key in keys[:-1]:
            inner = table.setdefault(key, {})
            assert isinstance(inner, dict)
            table = inner
        table[keys[-1]] = value

    return change


PLANS = [
    ("name",),
    ("model", "base"),
    ("model", "base_hash"),
    ("data", "source"),
    ("data", "text"),
    ("strategy", "fusion"),
    ("strategy", HOSTILE),
    ("task",),
    (HOSTILE,),
]


@pytest.mark.parametrize("keys", [*PLANS, ("labels",)], ids=lambda keys: "-".join(key[:8] for key in keys))
@pytest.mark.parametrize("as_json", [False, True], ids=["shown", "json"])
def test_a_federation_s_plan_at_client_check(
    cotune: Cotune, fed: FederationFolder, site: Path, keys: tuple[str, ...], as_json: bool
) -> None:
    value = [HOSTILE, "good", "so"] if keys == ("labels",) else HOSTILE
    file = edited(fed.path / "federation.toml", named("plan", *keys, value=value))
    assert_clean(cotune("client", "check", site, file, "--data", "reviews.csv", "--offline", *(["--json"] if as_json else [])))


@pytest.mark.parametrize("keys", [("name",), ("id",), ("server", "address"), ("server", "certificates"), (HOSTILE,)])
def test_a_federation_at_client_check(cotune: Cotune, fed: FederationFolder, site: Path, keys: tuple[str, ...]) -> None:
    file = edited(fed.path / "federation.toml", named(*keys))
    done = cotune("client", "check", site, file, "--offline")
    assert done.code != 0
    assert_clean(done)


def test_a_federation_that_is_no_toml(cotune: Cotune, fed: FederationFolder, site: Path) -> None:
    (fed.path / "federation.toml").write_text(f"{HOSTILE} = [", encoding="utf-8")
    assert_clean(cotune("client", "check", site, fed.path / "federation.toml"))


@pytest.mark.parametrize("keys", PLANS, ids=lambda keys: "-".join(key[:8] for key in keys))
def test_a_plan_at_plan_check(cotune: Cotune, folder: Path, keys: tuple[str, ...]) -> None:
    assert_clean(cotune("plan", "check", edited(folder / "toy.toml", named(*keys))))


def test_labels_of_a_table(cotune: Cotune, folder: Path) -> None:
    with (folder / "reviews.csv").open("a", encoding="utf-8", newline="") as file:
        file.writelines(f'great words number {i},"{HOSTILE}"\n' for i in range(60))
    done = cotune("plan", "check", "toy.toml")
    assert "over" in done.out
    assert_clean(done)


def test_a_model_s_configuration(cotune: Cotune, folder: Path) -> None:
    import shutil

    copy = folder / "model"
    shutil.copytree((folder / "base").resolve(), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": HOSTILE, "id2label": {"0": HOSTILE}}))
    assert_clean(cotune("plan", "check", "toy.toml", "--set", f"model.base={copy}"))


@pytest.mark.parametrize("keys", [("training", HOSTILE), (HOSTILE,), ("training", "approval"), ("privacy", "max_epsilon")])
def test_a_policy(cotune: Cotune, site: Path, keys: tuple[str, ...]) -> None:
    edited(site / "policy.toml", named(*keys))
    done = cotune("client", "policy", site)
    assert done.code != 0
    assert_clean(done)


def test_a_log_of_what_was_sent(cotune: Cotune, site: Path) -> None:
    AuditLog(site).append("refusal", plan=HOSTILE, plan_id=HOSTILE, round=HOSTILE, reason=HOSTILE, server=HOSTILE)
    AuditLog(site).append("update", plan=HOSTILE, plan_id=64 * "0", round=1, bytes=5, sha256=HOSTILE, epsilon=1.0)
    for words in ((), ("--json",), ("--verify",)):
        done = cotune("client", "sent", site, *words)
        assert not is_raw(done.out + done.err), ascii(done.out + done.err)
    shown = cotune("client", "sent", site)
    assert (shown.code, len(shown.out.splitlines())) == (0, 3)
    [refused, _] = json.loads(cotune("client", "sent", site, "--json").out)["entries"]
    assert refused["reason"] == HOSTILE  # clean JSON means what was written


def test_what_a_run_has_told_and_its_members(cotune: Cotune, fed: FederationFolder) -> None:
    run = create_run(fed, name="one")
    run.events.write(make_event("run_started", rounds=2))
    run.events.write(make_event("update_dropped", round=1, organization="hospital-b", reason=HOSTILE))
    run.events.write(make_event("run_failed", round=1, reason=f"{HOSTILE}\nrun two: finished"))
    for words in ((), ("--json",)):
        done = cotune("server", "status", fed.path, *words)
        assert "over" in done.out
        assert_clean(done)
    assert "run two: finished" not in cotune("server", "status", fed.path).out.splitlines()  # no line of its own
    members = fed.path / "members.json"
    members.write_text(members.read_text().replace("hospital-a", json.dumps(HOSTILE)[1:-1]), encoding="utf-8")
    for command in ("status", "list"):
        assert_clean(cotune("server", command, fed.path))


def test_what_is_compared(cotune: Cotune) -> None:
    assert_clean(cotune("compare", "toy.toml", "--vary", f"strategy.fusion={HOSTILE}"))
    assert_clean(cotune("compare", "toy.toml", "--vary", f"{HOSTILE}=1"))


@pytest.mark.parametrize("text", [HOSTILE, f"ValueError: {HOSTILE}", f"12:00 ERROR {HOSTILE}"])
def test_what_a_process_of_the_server_has_said_last(text: str) -> None:
    """`cotune server start` shows it of a log that others can write to."""
    assert not is_raw(extract_reason(text))


# --- a terminal


class Terminal:
    """A real one, whose other end is read."""

    def __init__(self) -> None:
        self._outer, inner = pty.openpty()
        self.stream = open(inner, "w", encoding="utf-8")  # noqa: SIM115  # closed below
        self._read = bytearray()
        self._reader = threading.Thread(target=self._collect)
        self._reader.start()

    def _collect(self) -> None:
        while True:
            try:
                piece = os.read(self._outer, 65536)
            except OSError:  # the inner end is closed
                return
            if not piece:
                return
            self._read += piece

    def shown(self) -> str:
        self.stream.close()
        self._reader.join(600)
        os.close(self._outer)
        return self._read.decode()


def test_on_a_terminal_own_styles_are_shown_and_no_others(
    cotune: Cotune, fed: FederationFolder, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal.stream)  # not in a fixture: pytest sets its own between the two
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    edited(fed.path / "federation.toml", named("plan", "labels", value=[HOSTILE, "good", "so"]))
    cotune("client", "check", site, fed.path / "federation.toml", "--data", "reviews.csv", "--offline")
    cotune("client", "check", site, edited(fed.path / "federation.toml", named("plan", "name")), "--offline")
    shown = terminal.shown()
    assert "\x1b[1m" in shown  # bold
    assert "\\u202e" in shown
    assert not OBEYED.search(shown), ascii(shown)


def test_words_cannot_style_themselves_nor_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a command forgot to escape them: markup that is not the commands' own is text."""
    below = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Clean(io.TextIOWrapper(below, encoding="utf-8")))
    console = open_console()
    for words in ("[link=http://h]here[/link]", "[reverse]x", "[@click=f]x[/]", "a[/bold]b", ":smile:", HOSTILE):
        console.print(f"[bold]{words}[/bold]")
    sys.stdout.flush()
    shown = below.getvalue().decode()
    assert not is_raw(shown)
    for words in ("[link=http://h]here[/link]", "[reverse]x", "[@click=f]x[/]", "a[/bold]b", ":smile:"):
        assert words in shown


def test_commands_have_no_other_screen() -> None:
    """Anyone who makes a console of its own prints past what is looked at here."""
    rooms = [Path(open_console.__code__.co_filename).parents[1] / room for room in ("cli", "client", "server", "simulations")]
    found = [file.name for room in rooms for file in room.rglob("*.py") if re.search(r"\bConsole\(", file.read_text("utf-8"))]
    assert found == []

"""Pages that list names list all of them: keys of plan and policy, events of a run, fields of a round, files of its folder."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotune.plan.reference import render_pages
from cotune.server.rounds.round_result import RoundResult

ROOT = Path(__file__).parents[2]
RUN_FOLDER = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
TELLING = {"tell", "_tell", "told"}  # how an event is told: the name first, in a literal
OF_NODES = {"again", "answered", "begun", "connected", "disconnected", "dropped", "features", "step"}  # client/observe.py
OF_TRAILS = {"request", "reply"}  # trail.jsonl


def calls(file: Path) -> Iterator[str]:
    """First arguments, where they are literals, of the calls that tell an event in a module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in TELLING and isinstance(node.args[0].value, str):
            yield node.args[0].value


def events() -> set[str]:
    files = [file for room in ("server", "simulations") for file in (ROOT / room).rglob("*.py") if file.parent.name != "proxy"]
    return {event for file in files for event in calls(file)} - OF_NODES - OF_TRAILS


def section(title: str) -> str:
    return RUN_FOLDER.partition(f"## {title}")[2].partition("\n## ")[0]


def named_in_rows(text: str) -> set[str]:
    """What stands in the first cells of tables."""
    return {name for cell in re.findall(r"^\| (.+?) \|", text, re.MULTILINE) for name in re.findall(r"`([\w.-]+)`", cell)}


@pytest.mark.parametrize("name", list(render_pages()))
def test_every_key_of_plan_and_policy_is_on_its_page(name: str) -> None:
    """`python -m cotune.plan.reference docs` writes them."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == render_pages()[name]


def test_every_event_is_on_the_page_and_no_other() -> None:
    assert len(events()) > 20
    assert named_in_rows(section("events.jsonl")) == events()


def test_every_field_of_a_round_is_on_the_page() -> None:
    entry = RoundResult(1, ("a",), (), 1, {}).entry("head", None, 1.0)
    added = set(re.findall(r'entry(?:\["|\s\|= \{")(\w+)"', (ROOT / "server" / "rounds" / "loop.py").read_text(encoding="utf-8")))
    row = next(line for line in RUN_FOLDER.splitlines() if line.startswith("| `rounds[]`"))
    for name in {*entry, *added, "applied", "weights", "norms", "suspects"} - {"organization", "reason"}:
        assert f"`{name}`" in row, name


def test_every_file_that_a_run_leaves_is_on_the_page() -> None:
    """Names of files that the code of a run's folder writes, as its modules say in their first lines or calls."""
    listed = " ".join(re.findall(r"^\| (.+?) \|", RUN_FOLDER.partition("## summary.json")[0], re.MULTILINE))
    for name in (
        "strikes.json",
        "cohort.json",
        "trail.jsonl",
        "delivered.json",
        "stopped.json",
        "superlink.json",
        "events.jsonl",
    ):
        assert any(f'"{name}"' in file.read_text(encoding="utf-8") for file in (ROOT / "server").rglob("*.py")), name
        assert f"`{name}`" in listed, name

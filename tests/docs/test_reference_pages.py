"""Reference pages are written from the models: they list every key of plan and policy, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.plan.reference import render_pages
from cotune.reporting.documents.events import known_events
from cotune.server.reference import EVERY_RUN, REAL_RUN, page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(render_pages()))
def test_every_key_of_plan_and_policy_is_on_its_page(name: str) -> None:
    """`python -m cotune.plan.reference docs` writes them."""
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == render_pages()[name]


def test_the_page_of_a_runs_folder_is_not_stale() -> None:
    """`python -m cotune.server.reference docs` writes it."""
    assert (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8") == page()


def test_every_key_of_a_runs_documents_has_a_meaning() -> None:
    assert len(known_events()) >= 30
    rows = [line for line in page().splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.endswith("|  |") or "):  " in row or "): ;" in row] == []


@pytest.mark.parametrize("file", [file.name for file in (*EVERY_RUN, *REAL_RUN) if file.name.endswith((".json", ".jsonl"))])
def test_every_file_of_the_page_is_written_by_the_server(file: str) -> None:
    sources = [path for path in (ROOT / "server").rglob("*.py") if path.name != "reference.py"]
    assert any(f'"{file}"' in path.read_text(encoding="utf-8") for path in sources)

"""docs/security.md promises nothing whose test does not exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_file_that_the_page_names_exists() -> None:
    named = re.findall(r"`((?:tests/[\w/]+/)?test_\w+\.py)`", PAGE)
    assert len(named) > 50
    for name in named:
        assert (ROOT / name).is_file() if "/" in name else list((ROOT / "tests").rglob(name)), name


def test_every_test_that_the_page_names_exists() -> None:
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert any(f"def {name}(" in file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")), name


def test_every_attack_is_on_the_page() -> None:
    for file in (ROOT / "tests" / "attacks").glob("test_*.py"):
        assert file.name in PAGE, file.name

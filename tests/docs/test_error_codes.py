"""Every error has a code of its area, and docs/errors.md lists all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("error_codes_script", ROOT / "scripts" / "error_codes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


def test_the_page_is_what_the_sources_say(script: ModuleType) -> None:
    written = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert written == script.page(), "stale: run `python scripts/error_codes.py docs/errors.md`"


def test_every_error_has_a_code_of_its_area(script: ModuleType) -> None:
    without = [f"{each.file}:{each.line} {each.kind} {each.code or 'no code'}" for each in script.missing_codes()]
    assert without == []


def test_errors_without_code_or_of_another_area_are_found(script: ModuleType, tmp_path: Path) -> None:
    for room in ("errors.py", "printable.py"):
        (tmp_path / room).touch()
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "bad.py").write_text(
        'raise PlanError("no code")\n'
        'raise DataError(f"of {another} area", code="plan.unknown_key")\n'
        'raise RunError("fine", code="run.fine")\n'
        "raise DataError(str(error), code=error.code)\n"
        'class Away(RunError):\n    code = "run.away"\n'
        'raise Away("fine")\n'
    )
    assert [(each.line, each.code) for each in script.missing_codes(tmp_path)] == [(1, None), (2, "plan.unknown_key")]
    page = script.page(tmp_path)
    assert "| `run.fine` | `plan/bad.py` | fine |" in page
    assert "| `plan.unknown_key` |" in page

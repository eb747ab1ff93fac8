"""The tests stand where what they test stands, and share what tests/support holds."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOMS = TESTS.parent
OTHERS = {"attacks", "deployment", "docs", "support"}  # what no single room is answerable for, and what tests share
FILES = sorted(TESTS.rglob("*.py"))
OF_BENCHMARKS = TESTS / "docs" / "test_benchmarks.py"  # runs them


STATEMENT = re.compile(r"^[ \t]*(?:from|import)[ \t]+(?:tests|benchmarks)\b[^\n(]*(?:\([^)]*\))?", re.MULTILINE)


@cache
def _imported(file: Path) -> tuple[tuple[str, ...], ...]:
    """The words of each statement that imports from the tests or the benchmarks, or looks so within a string."""
    return tuple(tuple(re.findall(r"\w+", found)) for found in STATEMENT.findall(file.read_text(encoding="utf-8")))


def test_every_folder_is_a_room() -> None:
    folders = {file.parent.relative_to(TESTS) for file in FILES} - {Path()}
    assert len(folders) > 20
    missing = [str(f) for f in folders if str(f) not in OTHERS and not (ROOMS / f / "__init__.py").is_file()]
    assert missing == []


def test_every_folder_of_a_room_is_packaged() -> None:
    packages = tomllib.loads((ROOMS / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = [file.parent for file in ROOMS.glob("*/__init__.py")]
    folders = {file.parent.relative_to(ROOMS) for room in rooms for file in room.rglob("*.py")}
    assert set(packages) == {"cotune", *(".".join(("cotune", *folder.parts)) for folder in folders)}
    assert len(packages) == len(set(packages))


@pytest.mark.parametrize("room", [path.parent.name for path in ROOMS.glob("*/__init__.py")])
def test_every_room_has_tests(room: str) -> None:
    assert list((TESTS / room).rglob("test_*.py")) != []


def test_support_holds_no_tests_and_test_folders_nothing_else() -> None:
    for file in FILES:
        is_test = file.name.startswith("test_") or file.name == "conftest.py"
        assert is_test == (file.parent.name != "support"), file


def test_no_test_imports_another() -> None:
    for file in FILES:
        for words in _imported(file):
            assert not [word for word in words if word.startswith("test_") or word == "conftest"], f"{file}: {' '.join(words)}"


def test_nothing_imports_from_benchmarks() -> None:
    for file in set(FILES) - {OF_BENCHMARKS}:
        text = file.read_text(encoding="utf-8")
        assert file == Path(__file__) or '"benchmarks"' not in text, file
        assert not [words for words in _imported(file) if words[1] == "benchmarks"], file


def test_imports_are_noticed() -> None:
    text = "from tests.support.kills import (\n    end,\n    test_it,\n)\n    import benchmarks.gpu\nimport tests_of_others\n"
    assert [re.findall(r"\w+", found) for found in STATEMENT.findall(text)] == [
        ["from", "tests", "support", "kills", "import", "end", "test_it"],
        ["import", "benchmarks", "gpu"],
    ]
